"""Keeps our own decisions out of what ``torch.compile`` traces: they are Python, not arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def eagerly(function: F) -> F:
    """Runs a function, and all that it calls, as it is."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def between_graphs(function: F) -> F:
    """Runs a function as it is; the model's code that it calls is compiled all the same."""
    return cast(F, torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]
