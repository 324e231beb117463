"""Finds the generation and step of each denoiser call.

The clock reads the timestep passed to the denoiser. An unchanged timestep is a further call of the
same step (guidance in two calls), a timestep further along is the next step, and a reversal starts
a new generation. A pipeline's noise scheduler adds what timesteps alone cannot show: it creates a
new list of timesteps for every generation, whose length is the number of steps. If neither is
conclusive, kept values are not reused and the step is computed.
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
    """The place of one denoiser call in its generation.

    Attributes:
        step: Index of the solver step, from 0.
        call: Index of the call within its step, from 0.
        starts: Whether a new generation begins with this call.
        same_generation: Whether values kept by earlier calls certainly belong to this generation.
        inside: Whether the call belongs to a generation. False if a noise scheduler announced a
            generation and this call is not part of it.
    """

    step: int
    call: int
    starts: bool
    same_generation: bool
    inside: bool = True


class Snapshot(NamedTuple):
    """A copy of a clock's state."""

    clock: dict[str, Any]
    solver: dict[str, Any]
    latents: dict[str, Any]

    @property
    def sketch(self) -> Tensor | None:
        """A sample of the last step's latents."""
        sketch: Tensor | None = self.latents["sketch"]
        return sketch

    @property
    def announced_list(self) -> Any:
        """The list of timesteps that the noise scheduler had announced."""
        return self.solver["announced_list"]


# A long class, because every decision of ``tick`` needs the same few attributes.
class Clock:
    """Finds the generation and step of every denoiser call.

    Args:
        announced: Returns the noise scheduler's tensor of timesteps, or None if there is none.
        expected: Timesteps of the schedule's calibration, if known.
        position: Returns the noise scheduler's index into that tensor, if it keeps one.
        planned: Number of steps of a generation. A generation that starts in the middle of the
            announced list counts its steps from there if that many are left, or if this is None;
            otherwise it counts from the beginning of the list.
        stages: Returns the number of calls per solver step, if known.

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
        self._timesteps: list[Any] = []  # numbers, and tensors that were not read yet
        self.forget()

    @property
    def num_steps(self) -> int | None:
        """Number of steps of this generation, if its noise scheduler announced them."""
        return self._solver.num_steps

    @property
    def position(self) -> int | None:
        """Position of the noise scheduler at the last call, if it counts its steps."""
        return self._solver.position

    def stages(self, step: int) -> int | None:
        """Returns the number of calls per branch in a step; None if it is unknown."""
        return self._solver.stages(step)

    @property
    def first_timestep(self) -> float:
        """Timestep of this generation's first call, which is always read."""
        return timestep_value(self._timesteps[0], batch=0)

    @property
    def last_given(self) -> Any:
        """Timestep of the last step as passed to the denoiser, possibly an unread tensor."""
        return self._timesteps[-1]

    @property
    def sketch(self) -> Tensor | None:
        """Sample of the last step's latents; None while a list of timesteps is followed."""
        return self._latents.sketch

    @property
    def announced_list(self) -> Any:
        """Tensor of timesteps that the noise scheduler announced last."""
        return self._solver.announced_list

    @property
    def timesteps(self) -> list[float]:
        """Timestep of every step of this generation so far, in the model's own unit."""
        self._timesteps = [timestep_value(timestep, batch=0) for timestep in self._timesteps]
        return list(self._timesteps)

    @property
    def entries(self) -> list[int]:
        """Index of each step so far in the announced list; empty if no list is followed."""
        return self._solver.entries(len(self._timesteps))

    def snapshot(self) -> Snapshot:
        """Returns a copy of the state, for ``restore``."""
        state = {**vars(self), "_timesteps": list(self._timesteps)}
        return Snapshot(state, dict(vars(self._solver)), dict(vars(self._latents)))

    def restore(self, snapshot: Snapshot) -> None:
        """Restores the state of a snapshot."""
        vars(self).update(snapshot.clock)
        vars(self._solver).update(snapshot.solver)
        vars(self._latents).update(snapshot.latents)

    def forget(self) -> None:
        """Resets the state; the next call starts a new generation."""
        self._solver.forget()
        self._latents.forget()
        self._timesteps = []
        self._direction = 0.0
        self._call = 0
        self._first_step = 0
        self._is_ambiguous = False
        self._is_uncertain = False
        self._matches_expected = self._expected is not None

    def tick(self, timestep: Any, latents: Tensor | None) -> Tick:
        """Returns the generation, step and call index of a call.

        Args:
            timestep: The denoiser's timestep, as ``timestep_value`` takes it. A tensor on an
                accelerator is read at the first call of a generation, and at later calls only if
                the noise scheduler does not count its steps.
            latents: The latents being denoised, the same tensor for all calls of a step.

        Raises:
            ScheduleMismatchError: If the samples of a batch are at different timesteps.
        """
        solver = self._solver
        if solver.listen():
            self.forget()
        is_on_device = isinstance(timestep, Tensor) and timestep.device.type not in ("cpu", "meta")
        if is_on_device and solver.is_trusted:
            moved = solver.moved()
            if moved == 0:
                return self._same_step(latents)
            if moved == 1:
                return self._next_step(timestep.detach().clone(), latents)
        value = timestep_value(timestep, None if latents is None else len(latents))
        if solver.may_stand_still() and value != self._last and solver.lists_next(value, self.step):
            solver.ignore_position()
        if not solver.expects(value, self.step):
            self.forget()
        is_listed = bool(self._timesteps) and self._list_reverses(value)
        if not self._timesteps or self._restarts(value):
            return self._start(value, latents)
        if self._reverses(value) and not is_listed:
            self._refuse_reversal(value, latents)
            return self._start(value, latents)
        if value == self._last and not solver.moved():
            return self._same_step(latents)
        if value != self._last:
            self._direction = math.copysign(1.0, value - self._last)
        return self._next_step(value, latents)

    # ------------------------------------------------------------------------------- decisions

    def _list_reverses(self, timestep: float) -> bool:
        """Whether the announced list itself reverses here, as in restart sampling."""
        solver = self._solver
        if solver.position is not None and not solver.moved():
            return False
        return timestep != self._timesteps[0] and solver.lists_next(timestep, self.step)

    def _refuse_reversal(self, timestep: float, latents: Tensor | None) -> None:
        """Refuses timesteps that reverse within a generation while the latents continue.

        A new generation begins at a first timestep, or has different latents.
        """
        is_complete = self._planned is not None and self.step + 1 >= self._planned
        if self._solver.is_followed or is_complete:
            return
        first, last = self.first_timestep, self._last
        lies_between = min(first, last) < timestep < max(first, last)
        if not lies_between or not self._latents.resemble(latents):
            return
        self.forget()
        raise ScheduleMismatchError(
            f"the timesteps reverse from {last:g} to {timestep:g} in the middle of a generation "
            "while the latents continue, so steps cannot be counted. Solvers with two calls per "
            "step at different timesteps (such as DPM2 ancestral) and restart sampling do so; use "
            "a solver whose timesteps only fall or only rise. If you interrupted a generation and "
            "start another from its latents, call run.reset() in between"
        )

    @property
    def _last(self) -> float:
        """Timestep of the last call."""
        self._timesteps[-1] = timestep_value(self._timesteps[-1], batch=0)
        return float(self._timesteps[-1])

    def _reverses(self, timestep: float) -> bool:
        return self._direction * (timestep - self._last) < 0

    def _restarts(self, timestep: float) -> bool:
        """Whether this call is at a first timestep, so that the call before stood alone."""
        if self._solver.is_followed or timestep == self._last:
            return False
        if self._expected is not None:
            return are_close(timestep, self._expected[0])
        if self.step > 0 or (self._planned or 0) < 3:
            return False
        # The second of this many steps is never so close to the first timestep.
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
        self._timesteps = [timestep]
        self._first_step = self.step
        self._arrive(timestep, latents)
        return Tick(self.step, 0, starts=True, same_generation=False)

    def _same_step(self, latents: Tensor | None) -> Tick:
        self._call += 1
        self._latents.see(latents, sketches=not self._solver.is_followed)
        # A generation interrupted in its first step and started again looks like guidance in two
        # calls. Equal latents rule out a restart.
        if self.step == self._first_step and not self._latents.are_the_same(latents):
            self._is_ambiguous = not self._solver.makes_several_calls()
        return Tick(self.step, self._call, starts=False, same_generation=not self._is_uncertain)

    def _next_step(self, timestep: Any, latents: Tensor | None) -> Tick:
        self.step += 1
        self._call = 0
        self._timesteps.append(timestep)
        self._is_ambiguous = self._is_ambiguous and self.step == self._first_step + 1
        rises_at_once = self._planned == 2 and self._direction > 0 and self._expected is None
        matched, before = self._matches_expected, self._latents.sketch
        self._arrive(timestep, latents)
        follows_list = self._solver.is_followed
        left_expected = matched and not self._matches_expected and not follows_list
        could_be_a_start = rises_at_once and not follows_list
        # An interrupted generation and another that starts at a later timestep look like one
        # generation, but consecutive latents of one generation are always correlated.
        is_another = are_unrelated(before, self._latents.sketch)
        self._is_uncertain = self._is_ambiguous or left_expected or could_be_a_start or is_another
        return Tick(self.step, 0, starts=False, same_generation=not self._is_uncertain)

    def _arrive(self, timestep: Any, latents: Tensor | None) -> None:
        follows_list = self._solver.is_followed
        self._solver.arrive()
        self._latents.arrive(latents, sketches=not follows_list)
        self._is_uncertain = False
        if self._matches_expected and self._expected is not None and not follows_list:
            expected = self._expected[self.step] if self.step < len(self._expected) else math.nan
            self._matches_expected = are_close(timestep, expected)
