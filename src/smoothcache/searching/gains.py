"""Fits how much of each predicted change to take, so that a run under a schedule meets another.

A line through the last computed outputs of a denoiser goes astray in the same way in every sample:
where the curve bends, and because what was predicted before has led elsewhere. One number for each
gap, the *gain* on the predicted change, makes up for most of it. It is fitted where it shows, at
the latents with which the next computed step begins, and with all that has gone astray before:
fitted to the outputs themselves, gains come out too small, and the run falls ever further behind.

For the fit the user's sampler runs again and again from the start, but the denoiser only once at
each computed step: what it returned is played back. So any solver and any guidance will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..model.arguments import Signature
from ..model.denoisers import find_denoisers
from ..model.outputs import taken_apart
from ..runtime.reused_layer import combined
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from ..steps.predictors import PREDICTORS, axis_positions, extrapolation_weights
from ..tracking.attachment import Attachment
from ..tracking.clock import Tick
from ..tracking.timesteps import timestep_value

LARGEST_GAIN = 3.0
Run = Callable[[int], Any]


class _Reached(BaseException):
    """Ends a generation at the step that was wanted."""


@dataclass
class Trajectory:
    """What the denoiser was given in one generation.

    Attributes:
        times: The timestep of every step.
        latents: What was denoised at every step, on the CPU.
    """

    times: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)

    def at(self, time: float) -> Tensor | None:
        """The latents at a timestep, linearly between those of the steps around it."""
        for i in range(len(self.times) - 1):
            begin, end = self.times[i], self.times[i + 1]
            if min(begin, end) <= time <= max(begin, end) and begin != end:
                share = (time - begin) / (end - begin)
                return torch.lerp(self.latents[i], self.latents[i + 1], share)
        return None


class _Listener:
    """Notes what the denoiser is given; its methods are those that an attachment calls."""

    def __init__(self, model: Any) -> None:
        (self._denoiser,) = find_denoisers(model).values()
        self._signature = Signature(self._denoiser)

    def before(
        self, denoiser: str, tick: Tick, branch: int | None, args: tuple[Any, ...], kwargs: Any
    ) -> bool:
        """Is told of a call."""
        latents = self._signature.sort(args, kwargs).latents
        if tick.call == 0 and latents is not None:
            self._arrived(tick.step, latents)
        self._called(tick.step, branch)
        return True

    def _arrived(self, step: int, latents: Tensor) -> None:
        """A step begins."""

    def _called(self, step: int, branch: int | None) -> None:
        """A call begins."""

    def after(self, denoiser: str, tick: Tick) -> None:
        """Nothing is to be done after a call."""

    def outside(self) -> None:
        """Nothing is to be done about a call that is no part of the generation."""

    def failed(self) -> None:
        """Nothing is to be done after a call that raised."""


class Recorder(_Listener):
    """Listens to a generation and keeps its trajectory."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._latents: list[Tensor] = []

    def _arrived(self, step: int, latents: Tensor) -> None:
        self._latents.append(_copied(latents))

    def run(self, model: Any, run: Callable[[], Any]) -> tuple[Any, Trajectory]:
        """What a generation returns, and its trajectory."""
        attachment = Attachment(model, {}, {}, self)
        try:
            output = run()
            times = attachment.clock.timesteps
        finally:
            attachment.remove()
        return output, Trajectory(times, self._latents)


class _Player(_Listener):
    """Plays one generation under a row of the whole denoiser, from what was computed before."""

    def __init__(self, model: Any, schedule: Schedule, row: Row) -> None:
        super().__init__(model)
        self._model = model
        self._schedule = schedule
        self.row = row
        predictor = PREDICTORS[row.predictor]
        self._order = predictor.order
        self._axis = axis_positions(predictor.axis, schedule.num_steps, schedule.noise_levels)
        self._known: dict[tuple[int, int | None], tuple[list[Any], Callable[[list[Any]], Any]]] = {}

    def play(self, run: Callable[[], Any], until: int) -> tuple[Tensor, float | None]:
        """The latents with which a step begins, and its timestep; the output after the last one."""
        self._until = until
        schedule = self._schedule
        attachment = Attachment(
            self._model, {}, {"": self}, self, schedule.timesteps, schedule.num_steps
        )
        try:
            output = run()
        except _Reached:
            return self._latents, self._time
        finally:
            attachment.remove()
        tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
        return torch.cat([x.detach().cpu().float().flatten() for x in tensors]), None

    def before(
        self, denoiser: str, tick: Tick, branch: int | None, args: tuple[Any, ...], kwargs: Any
    ) -> bool:
        """Is told of a call, of which the timestep is noted too."""
        self._time = timestep_value(self._signature.sort(args, kwargs).timestep, batch=0)
        return super().before(denoiser, tick, branch, args, kwargs)

    def _arrived(self, step: int, latents: Tensor) -> None:
        if step == self._until:
            self._latents = _copied(latents)
            raise _Reached

    def _called(self, step: int, branch: int | None) -> None:
        self._step, self._branch = step, branch

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        place = (self._step, self._branch)
        steps = self._steps_to_predict_from()
        if steps and not self.row.computed[self._step]:
            leaves, rebuild = self._predicted(steps)
        else:  # also at the first call of a branch that begins in mid-generation
            if place not in self._known:
                self._known[place] = taken_apart(forward(*args, **kwargs))
            leaves, rebuild = self._known[place]
        return rebuild([x.clone() if isinstance(x, Tensor) else x for x in leaves])

    def _steps_to_predict_from(self) -> list[int]:
        """The last steps before this one at which the branch was computed."""
        branch = self._branch
        known = (s for s, of in self._known if of == branch and s < self._step)
        return sorted(known)[-self._order - 1 :]

    def _predicted(self, steps: list[int]) -> tuple[list[Any], Callable[[list[Any]], Any]]:
        kept = [self._known[step, self._branch] for step in steps]
        gain = 1.0 if self.row.gains is None else self.row.gains[self._step]
        places = [self._axis[step] for step in steps]
        weights = extrapolation_weights(places, self._axis[self._step], gain)
        values = [
            combined([leaves[i] for leaves, _ in kept], weights, consume=False)
            for i in range(len(kept[-1][0]))
        ]
        return values, kept[-1][1]


def fit_gains(
    model: Any,
    run: Run,
    schedule: Schedule,
    references: Mapping[int, tuple[Trajectory, Tensor]],
) -> Row:
    """The schedule's row with the gains under which the generations come nearest to others.

    Args:
        model: A pipeline or module with one denoiser.
        run: Runs generation number i with the schedule's number of steps, and returns its output.
        schedule: Of the whole denoiser: its only row is for the denoiser's output.
        references: By number, the trajectory to meet and all values of the output, flattened.
    """
    (row,) = schedule.rows.values()
    players = {i: _Player(model, schedule, row) for i in references}
    gains = [1.0] * schedule.num_steps
    for gap in _gaps(row.computed):
        pairs = []
        for i, (trajectory, output) in references.items():
            held, line = (
                _played(players[i], partial(run, i), gains, gap, gain) for gain in (0.0, 1.0)
            )
            wanted = output if held[1] is None else trajectory.at(held[1])
            if wanted is not None:
                pairs.append((line[0] - held[0], wanted - held[0]))
        gains = _with(gains, gap, _best_gain(pairs))
        for player in players.values():
            player.row = replace(row, gains=tuple(gains))
    return replace(row, gains=tuple(gains))


def _played(
    player: _Player, run: Callable[[], Any], gains: list[float], gap: range, gain: float
) -> tuple[Tensor, float | None]:
    player.row = replace(player.row, gains=tuple(_with(gains, gap, gain)))
    return player.play(run, gap.stop)


def _copied(latents: Tensor) -> Tensor:
    return latents.detach().to("cpu", torch.float32, copy=True)


def _gaps(computed: Sequence[bool]) -> list[range]:
    """The runs of reused steps."""
    at = [step for step, is_computed in enumerate(computed) if is_computed]
    ends = [*at[1:], len(computed)]
    return [range(a + 1, b) for a, b in zip(at, ends, strict=True) if b > a + 1]


def _with(gains: list[float], gap: range, gain: float) -> list[float]:
    return [gain if step in gap else old for step, old in enumerate(gains)]


def _best_gain(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The least-squares gain for changes and what they should have been; 1 if there are none."""
    products = sum(float((change.double() * wanted.double()).sum()) for change, wanted in pairs)
    squares = sum(float(change.double().square().sum()) for change, _ in pairs)
    is_known = squares > 0 and math.isfinite(products / squares)
    return min(max(products / squares, 0.0), LARGEST_GAIN) if is_known else 1.0
