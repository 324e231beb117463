"""Which generation and step is this call of the denoiser?

The clock reads the timestep that the denoiser is given: an unchanged one is a further call of the
same step (guidance in two calls), one further along is the next step, one that turns back is a
new generation. A pipeline's noise scheduler adds what the timestep alone cannot tell: it makes a
new list of timesteps for every generation, and the list says how many steps there will be. Where
neither settles it the clock does not vouch for what was kept, and the step is computed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ScheduleMismatchError
from ..model.digests import Digest, are_equal, are_unrelated, correlation, digest, sketch, version
from .timesteps import AnnouncedTimesteps, are_close, timestep_value


@dataclass(frozen=True)
class Tick:
    """One call of a denoiser, placed.

    Attributes:
        step: Index of the solver step, from 0.
        call: Index of the call within its step, from 0.
        starts: Whether a new generation begins with this call.
        vouched: Whether what earlier calls kept belongs to this generation for certain.
        inside: Whether it belongs to a generation at all; not so if a noise scheduler announced
            one, and this call is none of its.
    """

    step: int
    call: int
    starts: bool
    vouched: bool
    inside: bool = True


class Clock:
    """Places every call of a denoiser in its generation.

    Args:
        announced: Returns the noise scheduler's tensor of timesteps, or None if there is none.
        expected: Timesteps that the schedule was measured at, if known.
        position: Returns the index in that tensor at which the noise scheduler is, if it counts.
        planned: Steps that a generation should have. One that starts in the middle of the
            announced list counts its steps from there if that many are left, or if this is None;
            otherwise it counts from the beginning of the list.
        stages: Returns how many calls the solver makes in a step, if it says.
    """

    def __init__(
        self,
        announced: Callable[[], Any] = lambda: None,
        expected: Sequence[float] | None = None,
        position: Callable[[], int | None] = lambda: None,
        planned: int | None = None,
        stages: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._announced = announced
        self._position = position
        self._stages = stages
        self._expected = expected
        self._planned = planned
        self._list: Any = None
        self._listed = AnnouncedTimesteps([], merges=True)
        self._list_is_used = False
        self.step = -1
        self.position: int | None = None  # where the noise scheduler was at the last call
        self._given: list[Any] = []  # timesteps: numbers, and tensors that nobody has read yet
        self.forget()

    @property
    def num_steps(self) -> int | None:
        """Steps of this generation as its noise scheduler announced them, if it did."""
        return len(self._listed) - self._offset if self._follows_list else None

    def stages(self, step: int) -> int | None:
        """How often the solver asks in a step for each branch; None if it does not say."""
        if not self._follows_list or self._stages() is None:
            return None
        return self._listed.entries(step + self._offset)

    @property
    def first_timestep(self) -> float:
        """The timestep of this generation's first call, which is always read."""
        return timestep_value(self._given[0], batch=0)

    @property
    def last_given(self) -> Any:
        """The timestep of the last step as it was given, perhaps unread."""
        return self._given[-1]

    @property
    def sketch(self) -> Tensor | None:
        """What is remembered of the last step's latents where no list of timesteps is followed."""
        return self._sketch

    @property
    def announced_list(self) -> Any:
        """The list of timesteps that the noise scheduler announced last."""
        return self._list

    @property
    def timesteps(self) -> list[float]:
        """The timestep of every step of this generation so far, in the model's own unit."""
        self._given = [timestep_value(timestep, batch=0) for timestep in self._given]
        return list(self._given)

    @property
    def entries(self) -> list[int]:
        """Where each step so far stands in the announced list; empty if none is followed."""
        if not self._follows_list:
            return []
        steps = range(self._offset, self._offset + len(self._given))
        return [self._listed.entry_of(step) for step in steps]

    def snapshot(self) -> dict[str, Any]:
        """All that the clock knows, for ``restore``."""
        return {**vars(self), "_given": list(self._given)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Takes back what calls since a snapshot did."""
        vars(self).update(snapshot)

    def forget(self) -> None:
        """Makes the next call the first one of a new generation."""
        self._given = []
        self._last_position: int | None = None
        self._position_is_trusted: bool | None = None  # None until it is seen to move, or not to
        self._previous: Tensor | None = None  # a sketch of the latents of the last call
        self._follows_list = False
        self._offset = 0
        self._direction = 0.0
        self._call = 0
        self._latents: weakref.ref[Tensor] | None = None
        self._version: int | None = None
        self._digest: Digest | None = None
        self._sketch: Tensor | None = None
        self._first_step = 0
        self._undecided = False
        self._distrusted = False
        self._follows_plan = self._expected is not None

    def tick(self, timestep: Any, latents: Tensor | None) -> Tick:
        """Places a call.

        Args:
            timestep: The denoiser's timestep, as ``timestep_value`` takes it. One in the memory
                of an accelerator is read at the first call of a generation, and at the others
                only if the noise scheduler does not count its steps.
            latents: What is denoised; the calls of one step get the same tensor.

        Raises:
            ScheduleMismatchError: If the samples of a batch are at different timesteps.
        """
        self.position = position = self._position()
        self._listen(position)
        position = self._trusted(position)
        is_far = isinstance(timestep, Tensor) and timestep.device.type not in ("cpu", "meta")
        if is_far and self._position_is_trusted:
            moved = self._moved(position)
            if moved == 0:
                return self._same_step(latents)
            if moved == 1:
                return self._next_step(timestep.detach().clone(), latents, position)
        value = timestep_value(timestep, None if latents is None else len(latents))
        if self._stands_still(value, position):
            self._position_is_trusted, position = False, None
            self.position = self._last_position = None
        if self._follows_list and not self._listed.has(value, self._next_index(position)):
            self.forget()  # not what the scheduler would give
        goes_back = self._follows_list and self._list_goes_back(value, position)
        if not self._given or self._begins_anew(value):
            return self._start(value, latents, position)
        if self._turned_back(value) and not goes_back:
            self._refuse_to_go_back(value, latents)
            return self._start(value, latents, position)
        if value == self._last and not self._moved(position):
            return self._same_step(latents)
        if value != self._last:
            self._direction = math.copysign(1.0, value - self._last)
        return self._next_step(value, latents, position)

    # ------------------------------------------------------------------------------- decisions

    def _listen(self, position: int | None) -> None:
        """Forgets what was, if the scheduler has announced a new generation or ended this one."""
        announced = self._announced()
        if announced is not None and announced is not self._list:
            self._list = announced
            # Where equal neighbours cannot be told apart they are two stages of one step.
            self._listed = AnnouncedTimesteps.of(
                announced, merges=position is None or self._stages() != 1
            )
            self._list_is_used = False
            self.forget()
        if self._follows_list and self._listed.are_over_at(position):
            self.forget()

    def _trusted(self, position: int | None) -> int | None:
        """The scheduler's position, unless it was seen to stand still while timesteps moved."""
        if self._position_is_trusted is False:
            self.position = None
            return None
        if self._last_position is not None and position != self._last_position:
            self._position_is_trusted = True
        return position

    def _stands_still(self, timestep: float, position: int | None) -> bool:
        """Whether the timesteps follow the list and nobody tells the scheduler, not even once.

        So it is where a sampler only reads the list, or steps a copy of the scheduler.
        """
        if not self._follows_list or position is None or self._position_is_trusted is not None:
            return False
        if position != self._last_position or timestep == self._last:
            return False
        here = self.step + self._offset
        return here + 1 < len(self._listed) and self._listed.has(timestep, (here + 1,), keep=True)

    def _list_goes_back(self, timestep: float, position: int | None) -> bool:
        """Whether the announced list itself turns back here, as in restart sampling."""
        here = self.step + self._offset
        if here + 1 >= len(self._listed) or (position is not None and not self._moved(position)):
            return False
        return timestep != self._given[0] and self._listed.has(timestep, (here + 1,), keep=True)

    def _refuse_to_go_back(self, timestep: float, latents: Tensor | None) -> None:
        """Refuses timesteps that turn back in mid-generation while the latents go on.

        A new generation begins where generations begin, or has latents of its own.
        """
        is_complete = self._planned is not None and self.step + 1 >= self._planned
        now = None if latents is None else sketch(latents, least=64, most=4096)
        likeness = correlation(now, self._previous)
        if self._follows_list or is_complete or likeness is None or now is None:
            return
        first, last = self.first_timestep, self._last
        lies_between = min(first, last) < timestep < max(first, last)
        if not lies_between or likeness < max(0.5, 5 / math.sqrt(len(now))):
            return
        self.forget()
        raise ScheduleMismatchError(
            f"the timesteps turn back from {last:g} to {timestep:g} in the middle of a "
            "generation, while the latents go on, so steps cannot be counted: a solver that calls "
            "twice a step at unequal times (such as DPM2 ancestral), or restart sampling; use a "
            "solver whose timesteps only fall or only rise. If a generation was broken off on "
            "purpose and another begins from its latents, call run.reset() between the two"
        )

    @property
    def _last(self) -> float:
        """The timestep of the last call."""
        self._given[-1] = timestep_value(self._given[-1], batch=0)
        return float(self._given[-1])

    def _next_index(self, position: int | None) -> Sequence[int]:
        """The steps of the list that this call may belong to."""
        here = self.step + self._offset
        if position is not None and self._last_position is not None:
            return (here if position == self._last_position else self._listed.step_at(position),)
        return (here, here + 1) if here + 1 < len(self._listed) else (here,)

    def _moved(self, position: int | None) -> int | None:
        """Steps by which the scheduler has moved on since the last call; None if it cannot tell.

        It also tells timesteps apart that round to one number in a short dtype.
        """
        if not self._follows_list or position is None or self._last_position is None:
            return None
        return self._listed.step_at(position) - self._listed.step_at(self._last_position)

    def _turned_back(self, timestep: float) -> bool:
        return self._direction * (timestep - self._last) < 0

    def _begins_anew(self, timestep: float) -> bool:
        """Whether the one call before was alone: this one is where generations begin."""
        if self._follows_list or timestep == self._last:
            return False
        if self._expected is not None:
            return are_close(timestep, self._expected[0])
        if self.step > 0 or (self._planned or 0) < 3:
            return False
        # No second step of so many is this near to where falling or rising timesteps begin.
        full, steps = 1.0 if max(timestep, self._last) <= 1 else 1000.0, self._planned or 1
        begins_falling = timestep > full * (1 - 1 / steps - steps / 1000)
        return begins_falling if timestep > self._last else timestep == 0

    # ------------------------------------------------------------------------------- movements

    def _start(self, timestep: float, latents: Tensor | None, position: int | None) -> Tick:
        self.forget()
        self.step = 0
        index = self._listed.find(timestep, position)
        if index is not None:
            left = len(self._listed) - index
            self._follows_list = self._list_is_used = True
            self._offset = index if self._planned in (None, left) else 0
            self.step = index - self._offset
        elif self._list_is_used:
            return Tick(0, 0, starts=False, vouched=False, inside=False)
        self._given = [timestep]
        self._arrive(timestep, latents, position)
        return Tick(self.step, 0, starts=True, vouched=False)

    def _same_step(self, latents: Tensor | None) -> Tick:
        self._call += 1
        self._see(latents)
        # A generation broken off in its first step, and begun again, looks like guidance in two
        # calls. The same latents settle it.
        if self.step == self._first_step and not self._are_the_same(latents):
            self._undecided = self._stages() in (None, 1)
        return Tick(self.step, self._call, starts=False, vouched=not self._distrusted)

    def _next_step(self, timestep: Any, latents: Tensor | None, position: int | None) -> Tick:
        self.step += 1
        self._call = 0
        self._given.append(timestep)
        self._undecided = self._undecided and self.step == self._first_step + 1
        rises_at_once = self._planned == 2 and self._direction > 0 and self._expected is None
        followed, before = self._follows_plan, self._sketch
        self._arrive(timestep, latents, position)
        left_the_plan = followed and not self._follows_plan and not self._follows_list
        could_be_a_start = rises_at_once and not self._follows_list
        # A generation broken off, and another that begins further along, look like one; but no
        # solver's step leaves nothing of the latents.
        is_another = are_unrelated(before, self._sketch)
        self._distrusted = self._undecided or left_the_plan or could_be_a_start or is_another
        return Tick(self.step, 0, starts=False, vouched=not self._distrusted)

    def _arrive(self, timestep: Any, latents: Tensor | None, position: int | None) -> None:
        if len(self._given) == 1:
            self._first_step = self.step
        self._last_position = position
        self._see(latents)
        self._latents = None if latents is None else weakref.ref(latents)
        self._version = version(latents)
        self._digest = None if self._version is not None or latents is None else digest(latents)
        self._sketch = None if self._follows_list or latents is None else sketch(latents)
        self._distrusted = False
        if self._follows_plan and self._expected is not None and not self._follows_list:
            here = self._expected[self.step] if self.step < len(self._expected) else math.nan
            self._follows_plan = are_close(timestep, here)

    def _see(self, latents: Tensor | None) -> None:
        """Notes what the latents are like, where no scheduler says how the timesteps go."""
        self._previous = None
        if latents is not None and not self._follows_list:
            self._previous = sketch(latents, least=64, most=4096)

    def _are_the_same(self, latents: Tensor | None) -> bool:
        known = None if self._latents is None else self._latents()
        if known is None or known is not latents or self._version != version(latents):
            return False
        return self._version is not None or are_equal(self._digest, digest(latents))
