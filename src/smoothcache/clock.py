"""Which generation, step and call within the step is this call of the denoiser?

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
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .errors import ScheduleMismatchError


@dataclass(frozen=True)
class Tick:
    """One call of a denoiser, placed.

    Attributes:
        step: Index of the solver step, from 0.
        branch: Index of the call within its step, from 0.
        starts: Whether a new generation begins with this call.
        vouched: Whether what earlier calls kept belongs to this generation for certain.
    """

    step: int
    branch: int
    starts: bool
    vouched: bool


class Clock:
    """Places every call of a denoiser in its generation.

    Args:
        announced: Returns the noise scheduler's tensor of timesteps, or None if there is none.
        expected: Timesteps that the schedule was measured at, if known.
        position: Returns the index in that tensor at which the noise scheduler is, if it counts.
    """

    def __init__(
        self,
        announced: Callable[[], Any],
        expected: Sequence[float] | None = None,
        position: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._announced = announced
        self._position = position
        self._expected = expected
        self._list: Any = None
        self._listed: list[float] = []
        self.timesteps: list[float] = []
        self.step = -1
        self.forget()

    @property
    def num_steps(self) -> int | None:
        """Steps of this generation as its noise scheduler announced them, if there is one."""
        return len(self._listed) or None

    def forget(self) -> None:
        """Makes the next call the first one of a new generation."""
        self._last: float | None = None
        self._last_position: int | None = None
        self._direction = 0.0
        self._branch = 0
        self._latents: weakref.ref[Tensor] | None = None
        self._version: int | None = None
        self._undecided = False
        self._distrusted = False
        self._following = self._expected is not None

    def tick(self, timestep: float, latents: Tensor | None) -> Tick:
        """Places a call.

        Args:
            timestep: The denoiser's timestep, in its own unit.
            latents: What is denoised; the calls of one step get the same tensor.
        """
        announced = self._announced()
        if announced is not None and announced is not self._list:
            self._list = announced
            self._listed = _distinct(announced)
            self.forget()
        if self._last is None or self._turned_back(timestep) or self._is_planned_start(timestep):
            return self._start(timestep, latents)
        if timestep == self._last and not self._has_moved_on():
            return self._same_step(latents)
        return self._next_step(timestep, latents)

    def _turned_back(self, timestep: float) -> bool:
        return self._last is not None and self._direction * (timestep - self._last) < 0

    def _has_moved_on(self) -> bool:
        """Whether the scheduler is past the step of the last call.

        In a short dtype neighbouring timesteps can round to the same number. A solver that lists
        a timestep twice calls twice in a step, and counts both.
        """
        counts_steps = self._list is not None and len(self._listed) == len(self._list)
        return counts_steps and self._position() != self._last_position

    def _is_planned_start(self, timestep: float) -> bool:
        """Whether the timestep moves to the first one of the plan, as after a lone trial call."""
        return (
            self._expected is not None
            and timestep != self._last
            and _are_close(timestep, self._expected[0])
        )

    def _start(self, timestep: float, latents: Tensor | None) -> Tick:
        self.forget()
        # Image to image starts in the middle of the list.
        self.step = self._listed.index(timestep) if timestep in self._listed else 0
        self.timesteps = [timestep]
        self._arrive(timestep, latents)
        return Tick(self.step, 0, starts=True, vouched=False)

    def _same_step(self, latents: Tensor | None) -> Tick:
        self._branch += 1
        # A generation broken off in its first step, and begun again, looks like guidance in two
        # calls. The same latents settle it, and so does a scheduler that announces generations.
        if self.step == 0 and self._list is None and not self._are_the_same(latents):
            self._undecided = True
        return Tick(self.step, self._branch, starts=False, vouched=not self._distrusted)

    def _next_step(self, timestep: float, latents: Tensor | None) -> Tick:
        if self._last is not None and timestep != self._last:
            self._direction = math.copysign(1.0, timestep - self._last)
        self.step += 1
        self._branch = 0
        self.timesteps.append(timestep)
        self._undecided = self._undecided and self.step == 1
        was_following = self._following
        self._arrive(timestep, latents)
        left_the_plan = was_following and not self._following and self._list is None
        self._distrusted = self._undecided or left_the_plan
        return Tick(self.step, 0, starts=False, vouched=not self._distrusted)

    def _arrive(self, timestep: float, latents: Tensor | None) -> None:
        self._last = timestep
        self._last_position = self._position()
        self._latents = None if latents is None else weakref.ref(latents)
        self._version = _version(latents)
        self._distrusted = False
        if self._following and self._expected is not None:
            here = self._expected[self.step] if self.step < len(self._expected) else math.nan
            self._following = _are_close(timestep, here)

    def _are_the_same(self, latents: Tensor | None) -> bool:
        known = None if self._latents is None else self._latents()
        return known is not None and known is latents and self._version == _version(latents)


def timestep_value(timestep: Any) -> float:
    """The one timestep of a call, in the model's own unit.

    Args:
        timestep: A number, or a tensor of shape [], [batch] or, with a timestep for every token,
            [batch, tokens], of which the largest counts. A tensor in the memory of an accelerator
            costs one read by the host.

    Raises:
        ScheduleMismatchError: If the samples of a batch are at different timesteps.
    """
    if isinstance(timestep, Real):
        return float(timestep)
    if not isinstance(timestep, Tensor) or timestep.numel() == 0:
        raise ScheduleMismatchError(
            f"the denoiser's timestep is a {type(timestep).__name__} that holds no number, so "
            "the step cannot be told"
        )
    values = timestep.detach().to("cpu", torch.float64).numpy()
    if values.ndim == 1 and (values != values[0]).any():
        raise ScheduleMismatchError(
            "the samples of one batch are at different timesteps "
            f"({values.min():g} to {values.max():g}); one schedule cannot serve them together"
        )
    return float(values.max())


def _are_close(a: float, b: float) -> bool:
    """Whether two timesteps are the same but for the rounding of a short dtype."""
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)


def _distinct(timesteps: Any) -> list[float]:
    """The listed timesteps without repetitions in a row, which two-stage solvers make."""
    values = torch.as_tensor(timesteps).detach().to("cpu", torch.float64).numpy().tolist()
    return [t for i, t in enumerate(values) if i == 0 or t != values[i - 1]]


def _version(latents: Tensor | None) -> int | None:
    return None if latents is None or latents.is_inference() else latents._version
