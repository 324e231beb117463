"""Fits gains, with which a run under a schedule ends closer to a reference.

Extrapolating the outputs of a denoiser makes similar errors in every sample: where the outputs
bend over the steps, and because earlier predictions have moved the latents. A *gain* is a factor
on the predicted change, one for each gap, and corrects most of the error. It is fitted to the
latents with which the next computed step begins, in a run that contains all earlier predictions.
Gains that are fitted to the outputs of the denoiser instead come out too small, and the run falls
ever further behind its reference.

The fit runs the user's sampler many times from the start, but the denoiser only once at each
computed step: its outputs are replayed after that. This works with any solver and any guidance.
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
from ..model.outputs import taken_apart
from ..model.target import Target
from ..runtime.combine import combined
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from ..steps.predictors import PREDICTORS, axis_positions, extrapolation_weights
from ..tracking.attachment import Attachment
from ..tracking.listener import CallListener, CallMode, DenoiserCall
from ..tracking.timesteps import timestep_value

LARGEST_GAIN = 3.0
Run = Callable[[int], Any]


class _StopGeneration(BaseException):
    """Ends a generation at the step whose latents are wanted."""


@dataclass
class Trajectory:
    """The inputs of the denoiser in one generation.

    Attributes:
        times: The timestep of every step.
        latents: The latents at every step, float32 on the CPU.
    """

    times: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)

    def at(self, time: float) -> Tensor | None:
        """The latents at a timestep, interpolated linearly; None outside the trajectory."""
        for i in range(len(self.times) - 1):
            begin, end = self.times[i], self.times[i + 1]
            if min(begin, end) <= time <= max(begin, end) and begin != end:
                share = (time - begin) / (end - begin)
                return torch.lerp(self.latents[i], self.latents[i + 1], share)
        return None


class _Listener(CallListener):
    """Receives the calls of the denoiser from an attachment."""

    def __init__(self, model: Any) -> None:
        (self._denoiser,) = Target.of(model).denoisers.values()
        self._signature = Signature(self._denoiser)

    def before(self, call: DenoiserCall) -> CallMode:
        """Handles a call before it runs."""
        latents = self._signature.sort(call.args, call.kwargs).latents
        if call.tick.call == 0 and latents is not None:
            self._on_step(call.tick.step, latents)
        self._on_call(call.tick.step, call.branch)
        return CallMode.UNCOMPILED

    def _on_step(self, step: int, latents: Tensor) -> None:
        """Handles the first call of a step."""

    def _on_call(self, step: int, branch: int | None) -> None:
        """Handles every call."""


class Recorder(_Listener):
    """Records the trajectory of a generation."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._latents: list[Tensor] = []

    def _on_step(self, step: int, latents: Tensor) -> None:
        self._latents.append(_copied(latents))

    def run(self, model: Any, run: Callable[[], Any]) -> tuple[Any, Trajectory]:
        """Runs a generation; returns its output and its trajectory."""
        attachment = Attachment(model, {}, {}, self)
        try:
            output = run()
            times = attachment.clock.timesteps
        finally:
            attachment.remove()
        return output, Trajectory(times, self._latents)


class _Replay(_Listener):
    """Runs one generation again and again under rows for the whole denoiser.

    The first run computes the outputs of the computed steps; later runs replay them.

    Attributes:
        row: The row to run under.
    """

    def __init__(self, model: Any, schedule: Schedule, row: Row) -> None:
        super().__init__(model)
        self._model = model
        self._schedule = schedule
        self.row = row
        predictor = PREDICTORS[row.predictor]
        self._order = predictor.order
        self._axis = axis_positions(predictor.axis, schedule.num_steps, schedule.noise_levels)
        self._outputs: dict[
            tuple[int, int | None], tuple[list[Any], Callable[[list[Any]], Any]]
        ] = {}

    def run(self, run: Callable[[], Any], until: int) -> tuple[Tensor, float | None]:
        """Runs the generation up to a step.

        Args:
            run: Runs the generation.
            until: The step to stop at; the number of steps for the whole generation.

        Returns:
            The latents at that step and its timestep; or all values of the output and None.
        """
        self._until = until
        schedule = self._schedule
        attachment = Attachment(
            self._model, {}, {"": self}, self, schedule.timesteps, schedule.num_steps
        )
        try:
            output = run()
        except _StopGeneration:
            return self._latents, self._time
        finally:
            attachment.remove()
        tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
        return torch.cat([x.detach().cpu().float().flatten() for x in tensors]), None

    def before(self, call: DenoiserCall) -> CallMode:
        """Handles a call before it runs, and keeps its timestep."""
        given = self._signature.sort(call.args, call.kwargs)
        self._time = timestep_value(given.timestep, batch=0)
        return super().before(call)

    def _on_step(self, step: int, latents: Tensor) -> None:
        if step == self._until:
            self._latents = _copied(latents)
            raise _StopGeneration

    def _on_call(self, step: int, branch: int | None) -> None:
        self._step, self._branch = step, branch

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        key = (self._step, self._branch)
        steps = self._steps_to_predict_from()
        if steps and not self.row.computed[self._step]:
            leaves, rebuild = self._predicted(steps)
        else:  # also at the first call of a branch that begins in mid-generation
            if key not in self._outputs:
                self._outputs[key] = taken_apart(forward(*args, **kwargs))
            leaves, rebuild = self._outputs[key]
        return rebuild([x.clone() if isinstance(x, Tensor) else x for x in leaves])

    def _steps_to_predict_from(self) -> list[int]:
        """The last steps before this one at which the branch was computed."""
        branch = self._branch
        known = (s for s, of in self._outputs if of == branch and s < self._step)
        return sorted(known)[-self._order - 1 :]

    def _predicted(self, steps: list[int]) -> tuple[list[Any], Callable[[list[Any]], Any]]:
        kept = [self._outputs[step, self._branch] for step in steps]
        gain = 1.0 if self.row.gains is None else self.row.gains[self._step]
        positions = [self._axis[step] for step in steps]
        weights = extrapolation_weights(positions, self._axis[self._step], gain)
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
    """Fits the gains of a schedule, gap by gap, so that generations end close to references.

    To first order, the latents after a gap depend linearly on its gain. Two runs, with the gains 0
    and 1, give the change that the gain scales. Least squares over all generations gives the gain.

    Args:
        model: A pipeline or module with one denoiser.
        run: Runs generation number i with the schedule's number of steps, and returns its output.
        schedule: A schedule for the output of the whole denoiser, with a single row.
        references: Number of a generation -> trajectory of the reference and all values of its
            output; [values].

    Returns:
        The schedule's row with the fitted gains, each in [0, ``LARGEST_GAIN``].
    """
    (row,) = schedule.rows.values()
    replays = {i: _Replay(model, schedule, row) for i in references}
    gains = [1.0] * schedule.num_steps
    for gap in _gaps(row.computed):
        pairs = []
        for i, (trajectory, output) in references.items():
            (without, time), (with_change, _) = (
                _replayed(replays[i], partial(run, i), gains, gap, gain) for gain in (0.0, 1.0)
            )
            target = output if time is None else trajectory.at(time)
            if target is not None:
                pairs.append((with_change - without, target - without))
        gains = _with(gains, gap, _best_gain(pairs))
        for replay in replays.values():
            replay.row = replace(row, gains=tuple(gains))
    return replace(row, gains=tuple(gains))


def _replayed(
    replay: _Replay, run: Callable[[], Any], gains: list[float], gap: range, gain: float
) -> tuple[Tensor, float | None]:
    replay.row = replace(replay.row, gains=tuple(_with(gains, gap, gain)))
    return replay.run(run, gap.stop)


def _copied(latents: Tensor) -> Tensor:
    return latents.detach().to("cpu", torch.float32, copy=True)


def _gaps(computed: Sequence[bool]) -> list[range]:
    """The ranges of reused steps between computed ones."""
    starts = [step for step, is_computed in enumerate(computed) if is_computed]
    ends = [*starts[1:], len(computed)]
    return [range(a + 1, b) for a, b in zip(starts, ends, strict=True) if b > a + 1]


def _with(gains: list[float], gap: range, gain: float) -> list[float]:
    return [gain if step in gap else old for step, old in enumerate(gains)]


def _best_gain(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The least-squares gain for pairs of a predicted and a wanted change; 1 without any."""
    products = sum(float((change.double() * wanted.double()).sum()) for change, wanted in pairs)
    squares = sum(float(change.double().square().sum()) for change, _ in pairs)
    is_known = squares > 0 and math.isfinite(products / squares)
    return min(max(products / squares, 0.0), LARGEST_GAIN) if is_known else 1.0
