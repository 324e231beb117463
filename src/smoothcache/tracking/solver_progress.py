"""Position of a pipeline's noise scheduler in the list of timesteps that it announced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .timesteps import AnnouncedTimesteps


class SolverProgress:
    """Follows a noise scheduler through consecutive generations.

    Args:
        announced: Returns the noise scheduler's tensor of timesteps, or None if there is none.
        position: Returns the noise scheduler's index into that tensor, if it keeps one.
        stages: Returns the number of calls per solver step, if known.

    Attributes:
        announced_list: The tensor that was announced last.
        is_followed: Whether the current generation follows the list.
        has_been_used: Whether a generation has followed this list.
        position: Position of the noise scheduler at this call; None if it keeps none, or if it
            never advances.
        is_trusted: True if the position was observed to advance, False if it does not, None if
            undecided.
    """

    def __init__(
        self,
        announced: Callable[[], Any],
        position: Callable[[], int | None],
        stages: Callable[[], int | None],
    ) -> None:
        self._announced = announced
        self._position_now = position
        self._stages = stages
        self.announced_list: Any = None
        self._list = AnnouncedTimesteps([], merges=True)
        self.has_been_used = False
        self.position: int | None = None
        self.forget()

    def forget(self) -> None:
        """Forgets the current generation."""
        self.is_followed = False
        self._offset = 0
        self._last_position: int | None = None
        self.is_trusted: bool | None = None

    # ------------------------------------------------------------------------------ generations

    def listen(self) -> bool:
        """Reads the scheduler and returns whether the current generation is over."""
        self.position = self._position_now()
        is_over = False
        announced = self._announced()
        if announced is not None and announced is not self.announced_list:
            self.announced_list = announced
            # Equal neighbours are two stages of one step, unless positions distinguish them.
            merges = self.position is None or self._stages() != 1
            self._list = AnnouncedTimesteps.of(announced, merges=merges)
            self.has_been_used = False
            is_over = True
        if is_over or (self.is_followed and self._list.are_over_at(self.position)):
            is_over = True
            self.forget()
        if self.is_trusted is False:
            self.position = None
        elif self._last_position is not None and self.position != self._last_position:
            self.is_trusted = True
        return is_over

    def start(self, timestep: float, planned: int | None) -> int | None:
        """Returns the first step of an announced generation; None if none was announced.

        Args:
            timestep: The denoiser's timestep.
            planned: Number of steps of a generation.
        """
        index = self._list.find(timestep, self.position)
        if index is None:
            return None
        self.is_followed = self.has_been_used = True
        self._offset = index if planned in (None, len(self._list) - index) else 0
        return index - self._offset

    def arrive(self) -> None:
        """Notes the position of the first call of a step."""
        self._last_position = self.position

    def ignore_position(self) -> None:
        """Uses timesteps alone from now on, because the position does not advance."""
        self.is_trusted = False
        self.position = self._last_position = None

    # --------------------------------------------------------------------------------- questions

    @property
    def num_steps(self) -> int | None:
        """Announced number of steps of this generation; None if no list is followed."""
        return len(self._list) - self._offset if self.is_followed else None

    def stages(self, step: int) -> int | None:
        """Returns the number of calls per branch in a step; None if it is unknown."""
        if not self.is_followed or self._stages() is None:
            return None
        return self._list.entries(step + self._offset)

    def makes_several_calls(self) -> bool:
        """Whether the solver makes several calls per step."""
        return self._stages() not in (None, 1)

    def entries(self, count: int) -> list[int]:
        """Returns the list indices of the first ``count`` steps; empty if no list is followed."""
        if not self.is_followed:
            return []
        return [self._list.entry_of(step) for step in range(self._offset, self._offset + count)]

    def moved(self) -> int | None:
        """Returns how many steps the scheduler has advanced since the last step; None if unknown.

        Positions also distinguish timesteps that round to one number in a low-precision dtype.
        """
        if not self.is_followed or self.position is None or self._last_position is None:
            return None
        return self._list.step_at(self.position) - self._list.step_at(self._last_position)

    def expects(self, timestep: float, step: int) -> bool:
        """Whether this timestep is consistent with the scheduler's position.

        Args:
            timestep: The denoiser's timestep.
            step: Index of the last step.
        """
        return not self.is_followed or self._list.has(timestep, self._next_entries(step))

    def may_stand_still(self) -> bool:
        """Whether the position may never advance.

        That happens if a sampler only reads the list, or steps a copy of the scheduler.
        """
        if not self.is_followed or self.position is None or self.is_trusted is not None:
            return False
        return self.position == self._last_position

    def lists_next(self, timestep: float, step: int) -> bool:
        """Whether this timestep follows a step in the list."""
        following = step + self._offset + 1
        return (
            self.is_followed
            and following < len(self._list)
            and self._list.has(timestep, (following,), keep=True)
        )

    def _next_entries(self, step: int) -> Sequence[int]:
        """Returns the steps of the list that this call may belong to."""
        here = step + self._offset
        if self.position is not None and self._last_position is not None:
            return (
                here if self.position == self._last_position else self._list.step_at(self.position),
            )
        return (here, here + 1) if here + 1 < len(self._list) else (here,)
