"""Listeners for the calls of a model's denoisers."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

from .clock import Tick


class DenoiserCall(NamedTuple):
    """One call of a denoiser.

    Attributes:
        denoiser: Prefix of the denoiser.
        tick: Generation and step of the call.
        branch: Number of the guidance branch; None if the branch is unknown.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    denoiser: str
    tick: Tick
    branch: int | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CallMode(Enum):
    """How a call of a denoiser runs."""

    AS_IT_IS = "as it is"
    UNCOMPILED = "uncompiled"
    """Compiled parts run as plain Python, so that handlers see what the layers return."""


class CallListener:
    """Base class of listeners for the calls of a model's denoisers; its methods do nothing.

    If ``before`` raises, the call does not run and ``failed`` is called.
    """

    def before(self, call: DenoiserCall) -> CallMode:
        """Called before a denoiser runs in a generation; returns the mode of the call."""
        return CallMode.AS_IT_IS

    def after(self, call: DenoiserCall) -> None:
        """Called after a denoiser has run in a generation."""

    def outside(self) -> None:
        """Called before a denoiser runs outside any generation."""

    def failed(self) -> None:
        """Called after an exception has ended a call and thereby the generation."""
