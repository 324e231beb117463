"""The current call of a denoiser, shared by all of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count


@dataclass
class Call:
    """The current call of a denoiser.

    Attributes:
        number: Unique number of the call; 0 between calls, when layers run unchanged.
        step: Index of the solver step.
        branch: Number of the guidance branch; None if it is unknown, and nothing is kept or
            reused.
        reason: Why a kept value may be missing.
        was_traced: Whether ``torch.compile`` has traced a layer that has no slots yet.
        on_outside: Called with the path of a layer that runs between calls.
    """

    number: int = 0
    step: int = 0
    branch: int | None = 0
    reason: str = ""
    was_traced: bool = False
    on_outside: Callable[[str], None] | None = None
    _numbers: Iterator[int] = field(default_factory=partial(count, 1))

    def begin(self, step: int, branch: int | None, reason: str = "") -> None:
        """Starts a call."""
        self.number, self.step, self.branch = next(self._numbers), step, branch
        self.reason = reason

    def end(self) -> None:
        """Ends the call; layers run unchanged until the next one."""
        self.number = 0
