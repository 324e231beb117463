"""What happens at the calls of a model's denoisers, for whoever wants to follow them."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

from .clock import Tick


class DenoiserCall(NamedTuple):
    """One call of a denoiser.

    Attributes:
        denoiser: Prefix of the denoiser.
        tick: Its place in the generation.
        branch: Number of the guidance branch; None if the calls of the step cannot be told apart.
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
    """Base class for what follows the calls of a model's denoisers; each method does nothing.

    A call that raises from ``before`` does not run; ``failed`` is called then.
    """

    def before(self, call: DenoiserCall) -> CallMode:
        """Called before a denoiser runs in a generation; returns how it is to run."""
        return CallMode.AS_IT_IS

    def after(self, call: DenoiserCall) -> None:
        """Called after a denoiser has run in a generation."""

    def outside(self) -> None:
        """Called before a denoiser runs outside any generation."""

    def failed(self) -> None:
        """Called after an exception has ended a call, and with it the generation."""
