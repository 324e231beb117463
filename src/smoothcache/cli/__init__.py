"""The ``smoothcache`` command; one command a file in ``commands``."""

from .app import app as app
from .commands import (
    benchmark,
    cache,
    calibrate,
    compare,
    demo,
    doctor,
    evaluate,
    figures,
    generate,
    inspect,
    plan,
    sample,
    search,
)

__all__ = [
    "app",
    "benchmark",
    "cache",
    "calibrate",
    "compare",
    "demo",
    "doctor",
    "evaluate",
    "figures",
    "generate",
    "inspect",
    "plan",
    "sample",
    "search",
]
