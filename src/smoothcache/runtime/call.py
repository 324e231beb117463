"""The call of a denoiser that is under way, which all of its layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count


@dataclass
class Call:
    """The call of a denoiser that is under way.

    Attributes:
        number: Another one for every call; 0 between calls, when layers run as they are.
        step: Index of the solver step.
        branch: Number of the guidance branch; None if it is not known, and nothing is kept or
            reused.
        reason: Why a kept value may be missing.
        was_traced: Whether ``torch.compile`` has met a layer whose values are in no slots.
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
        """Begins another call."""
        self.number, self.step, self.branch = next(self._numbers), step, branch
        self.reason = reason

    def end(self) -> None:
        """Lets the layers run as they are until the next call."""
        self.number = 0
