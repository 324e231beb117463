"""Which generation and step is this call of the denoiser?

The clock reads the timestep that the denoiser is given: an unchanged one is a further call of the
same step (guidance in two calls), one further along is the next step, one that turns back is a
new generation. A pipeline's noise scheduler adds what the timestep alone cannot tell: it makes a
new list of timesteps for every generation, and the list says how many steps there will be. Where
neither settles it the clock does not vouch for what was kept, and the step is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import ScheduleMismatchError
from ..model.digests import are_unrelated
from .seen_latents import SeenLatents
from .solver_progress import SolverProgress
from .timesteps import are_close, timestep_value


@dataclass(frozen=True)
class Tick:
    """One call of a denoiser, placed.

    Attributes:
        step: Index of the solver step, from 0.
        call: Index of the call within its step, from 0.
        starts: Whether a new generation begins with this call.
        same_generation: Whether what earlier calls kept belongs to this generation for certain.
        inside: Whether it belongs to a generation at all; not so if a noise scheduler announced
            one, and this call is none of its.
    """

    step: int
    call: int
    starts: bool
    same_generation: bool
    inside: bool = True


class Snapshot(NamedTuple):
    """All that a clock knows at a moment."""

    clock: dict[str, Any]
    solver: dict[str, Any]
    latents: dict[str, Any]

    @property
    def sketch(self) -> Tensor | None:
        """What was remembered of the last step's latents."""
        known: Tensor | None = self.latents["sketch"]
        return known

    @property
    def announced_list(self) -> Any:
        """The list of timesteps that the noise scheduler had announced."""
        return self.solver["announced_list"]


# Longer than most classes, because every decision of ``tick`` needs the same few facts.
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

    Attributes:
        step: The last step; -1 before the first call.
    """

    def __init__(
        self,
        announced: Callable[[], Any] = lambda: None,
        expected: Sequence[float] | None = None,
        position: Callable[[], int | None] = lambda: None,
        planned: int | None = None,
        stages: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._solver = SolverProgress(announced, position, stages)
        self._latents = SeenLatents()
        self._expected = expected
        self._planned = planned
        self.step = -1
        self._given: list[Any] = []  # timesteps: numbers, and tensors that nobody has read yet
        self.forget()

    @property
    def num_steps(self) -> int | None:
        """Steps of this generation as its noise scheduler announced them, if it did."""
        return self._solver.num_steps

    @property
    def position(self) -> int | None:
        """Where the noise scheduler was at the last call, if it counts its steps."""
        return self._solver.position

    def stages(self, step: int) -> int | None:
        """How often the solver asks in a step for each branch; None if it does not say."""
        return self._solver.stages(step)

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
        return self._latents.sketch

    @property
    def announced_list(self) -> Any:
        """The list of timesteps that the noise scheduler announced last."""
        return self._solver.announced_list

    @property
    def timesteps(self) -> list[float]:
        """The timestep of every step of this generation so far, in the model's own unit."""
        self._given = [timestep_value(timestep, batch=0) for timestep in self._given]
        return list(self._given)

    @property
    def entries(self) -> list[int]:
        """Where each step so far stands in the announced list; empty if none is followed."""
        return self._solver.entries(len(self._given))

    def snapshot(self) -> Snapshot:
        """All that the clock knows, for ``restore``."""
        own = {**vars(self), "_given": list(self._given)}
        return Snapshot(own, dict(vars(self._solver)), dict(vars(self._latents)))

    def restore(self, snapshot: Snapshot) -> None:
        """Takes back what calls since a snapshot did."""
        vars(self).update(snapshot.clock)
        vars(self._solver).update(snapshot.solver)
        vars(self._latents).update(snapshot.latents)

    def forget(self) -> None:
        """Makes the next call the first one of a new generation."""
        self._solver.forget()
        self._latents.forget()
        self._given = []
        self._direction = 0.0
        self._call = 0
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
        solver = self._solver
        if solver.listen():
            self.forget()
        is_far = isinstance(timestep, Tensor) and timestep.device.type not in ("cpu", "meta")
        if is_far and solver.is_trusted:
            moved = solver.moved()
            if moved == 0:
                return self._same_step(latents)
            if moved == 1:
                return self._next_step(timestep.detach().clone(), latents)
        value = timestep_value(timestep, None if latents is None else len(latents))
        if solver.may_stand_still() and value != self._last and solver.lists_next(value, self.step):
            solver.distrust()
        if not solver.expects(value, self.step):
            self.forget()
        goes_back = bool(self._given) and self._list_goes_back(value)
        if not self._given or self._begins_anew(value):
            return self._start(value, latents)
        if self._turned_back(value) and not goes_back:
            self._refuse_to_go_back(value, latents)
            return self._start(value, latents)
        if value == self._last and not solver.moved():
            return self._same_step(latents)
        if value != self._last:
            self._direction = math.copysign(1.0, value - self._last)
        return self._next_step(value, latents)

    # ------------------------------------------------------------------------------- decisions

    def _list_goes_back(self, timestep: float) -> bool:
        """Whether the announced list itself turns back here, as in restart sampling."""
        solver = self._solver
        if solver.position is not None and not solver.moved():
            return False
        return timestep != self._given[0] and solver.lists_next(timestep, self.step)

    def _refuse_to_go_back(self, timestep: float, latents: Tensor | None) -> None:
        """Refuses timesteps that turn back in mid-generation while the latents go on.

        A new generation begins where generations begin, or has latents of its own.
        """
        is_complete = self._planned is not None and self.step + 1 >= self._planned
        if self._solver.is_followed or is_complete:
            return
        first, last = self.first_timestep, self._last
        lies_between = min(first, last) < timestep < max(first, last)
        if not lies_between or not self._latents.goes_on_with(latents):
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

    def _turned_back(self, timestep: float) -> bool:
        return self._direction * (timestep - self._last) < 0

    def _begins_anew(self, timestep: float) -> bool:
        """Whether the one call before was alone: this one is where generations begin."""
        if self._solver.is_followed or timestep == self._last:
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

    def _start(self, timestep: float, latents: Tensor | None) -> Tick:
        self.forget()
        self.step = 0
        step = self._solver.start(timestep, self._planned)
        if step is not None:
            self.step = step
        elif self._solver.has_been_used:
            return Tick(0, 0, starts=False, same_generation=False, inside=False)
        self._given = [timestep]
        self._first_step = self.step
        self._arrive(timestep, latents)
        return Tick(self.step, 0, starts=True, same_generation=False)

    def _same_step(self, latents: Tensor | None) -> Tick:
        self._call += 1
        self._latents.see(latents, sketches=not self._solver.is_followed)
        # A generation broken off in its first step, and begun again, looks like guidance in two
        # calls. The same latents settle it.
        if self.step == self._first_step and not self._latents.are_the_same(latents):
            self._undecided = not self._solver.makes_several_calls()
        return Tick(self.step, self._call, starts=False, same_generation=not self._distrusted)

    def _next_step(self, timestep: Any, latents: Tensor | None) -> Tick:
        self.step += 1
        self._call = 0
        self._given.append(timestep)
        self._undecided = self._undecided and self.step == self._first_step + 1
        rises_at_once = self._planned == 2 and self._direction > 0 and self._expected is None
        followed, before = self._follows_plan, self._latents.sketch
        self._arrive(timestep, latents)
        follows_list = self._solver.is_followed
        left_the_plan = followed and not self._follows_plan and not follows_list
        could_be_a_start = rises_at_once and not follows_list
        # A generation broken off, and another that begins further along, look like one; but no
        # solver's step leaves nothing of the latents.
        is_another = are_unrelated(before, self._latents.sketch)
        self._distrusted = self._undecided or left_the_plan or could_be_a_start or is_another
        return Tick(self.step, 0, starts=False, same_generation=not self._distrusted)

    def _arrive(self, timestep: Any, latents: Tensor | None) -> None:
        follows_list = self._solver.is_followed
        self._solver.arrive()
        self._latents.arrive(latents, sketches=not follows_list)
        self._distrusted = False
        if self._follows_plan and self._expected is not None and not follows_list:
            here = self._expected[self.step] if self.step < len(self._expected) else math.nan
            self._follows_plan = are_close(timestep, here)
