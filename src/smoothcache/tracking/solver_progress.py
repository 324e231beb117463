"""How far a pipeline's noise scheduler has come in the list of timesteps that it announced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .timesteps import AnnouncedTimesteps


class SolverProgress:
    """Follows a noise scheduler through one generation after the other.

    Args:
        announced: Returns the noise scheduler's tensor of timesteps, or None if there is none.
        position: Returns the index in that tensor at which the noise scheduler is, if it counts.
        stages: Returns how many calls the solver makes in a step, if it says.

    Attributes:
        announced_list: The tensor that was announced last.
        is_followed: Whether the generation under way follows the list.
        has_been_used: Whether a generation has followed this list.
        position: Where the noise scheduler is at this call; None if it does not count, or if it
            was seen to stand still.
        is_trusted: Whether its position was seen to move; False if it was seen not to, None if
            neither was seen yet.
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
        """Forgets the generation under way."""
        self.is_followed = False
        self._offset = 0
        self._last_position: int | None = None
        self.is_trusted: bool | None = None

    # ------------------------------------------------------------------------------ generations

    def listen(self) -> bool:
        """Reads the scheduler; says whether the generation that was under way is over."""
        self.position = self._position_now()
        is_over = False
        announced = self._announced()
        if announced is not None and announced is not self.announced_list:
            self.announced_list = announced
            # Where equal neighbours cannot be told apart they are two stages of one step.
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
        """The step at which a generation begins that the scheduler announced; None if it did not.

        Args:
            timestep: What the denoiser is given.
            planned: Steps that a generation should have.
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

    def distrust(self) -> None:
        """Goes by timesteps alone from now on, because the position stands still."""
        self.is_trusted = False
        self.position = self._last_position = None

    # --------------------------------------------------------------------------------- questions

    @property
    def num_steps(self) -> int | None:
        """Steps of this generation as they were announced; None if no list is followed."""
        return len(self._list) - self._offset if self.is_followed else None

    def stages(self, step: int) -> int | None:
        """How often the solver asks in a step for each branch; None if it does not say."""
        if not self.is_followed or self._stages() is None:
            return None
        return self._list.entries(step + self._offset)

    def makes_several_calls(self) -> bool:
        """Whether the solver says that it calls several times in a step."""
        return self._stages() not in (None, 1)

    def entries(self, count: int) -> list[int]:
        """Where the first steps of the generation stand in the list; empty if none is followed."""
        if not self.is_followed:
            return []
        return [self._list.entry_of(step) for step in range(self._offset, self._offset + count)]

    def moved(self) -> int | None:
        """Steps by which the scheduler has moved on since the last step; None if it cannot tell.

        It also tells timesteps apart that round to one number in a short dtype.
        """
        if not self.is_followed or self.position is None or self._last_position is None:
            return None
        return self._list.step_at(self.position) - self._list.step_at(self._last_position)

    def expects(self, timestep: float, step: int) -> bool:
        """Whether the scheduler would give this timestep now.

        Args:
            timestep: What the denoiser is given.
            step: The last step.
        """
        return not self.is_followed or self._list.has(timestep, self._next_entries(step))

    def may_stand_still(self) -> bool:
        """Whether the position could be one that nobody moves, not even once.

        So it is where a sampler only reads the list, or steps a copy of the scheduler.
        """
        if not self.is_followed or self.position is None or self.is_trusted is not None:
            return False
        return self.position == self._last_position

    def lists_next(self, timestep: float, step: int) -> bool:
        """Whether the list goes on with this timestep after a step."""
        following = step + self._offset + 1
        return (
            self.is_followed
            and following < len(self._list)
            and self._list.has(timestep, (following,), keep=True)
        )

    def _next_entries(self, step: int) -> Sequence[int]:
        """The steps of the list that this call may belong to."""
        here = step + self._offset
        if self.position is not None and self._last_position is not None:
            return (
                here if self.position == self._last_position else self._list.step_at(self.position),
            )
        return (here, here + 1) if here + 1 < len(self._list) else (here,)
