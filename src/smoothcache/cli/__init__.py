"""The ``smoothcache`` command; one command a file in ``commands``."""

from .app import app as app
from .commands import (
    benchmark,
    calibrate,
    compare,
    demo,
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
    "calibrate",
    "compare",
    "demo",
    "evaluate",
    "figures",
    "generate",
    "inspect",
    "plan",
    "sample",
    "search",
]
