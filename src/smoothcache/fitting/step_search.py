"""Chooses computed steps by what their fitted runs really leave.

Plans of dynamic programming and even spacing are fitted in closed loop on a few samples and judged
by their final states; then single steps of the best one are moved. Fits that begin with the same
steps share the model calls of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..calibration.trajectory import Trajectories
from ..errors import InvalidArgumentError
from ..planners.segments import Segments
from ..planners.step_choice import choose_steps
from ..planners.trajectory import MAX_LAG
from .closed_loop import ClosedLoopFit, ComputedOutputs

PLANS = ((1e-4, 3.0), (1e-5, 3.0), (1e-5, 1.0), (1e-4, 1.0))


"""Noise and early weight of the plans that are tried, beside even spacing."""


JUDGED_ON = 2
_GOLDEN = 0.618
_WORTH = 0.005  # of the logarithm of the error, by which a move must be better

Steps = tuple[int, ...]
Tables = list[list[tuple[float, ...]]]


@dataclass(frozen=True)
class FittedSteps:
    """Computed steps with the weights that were fitted to them.

    Attributes:
        steps: The computed steps.
        tables: Weights by branch that has its own, by step and by lag.
        error: Mean logarithm of the final state errors over the samples.
    """

    steps: Steps
    tables: Tables
    error: float


@dataclass
class _Progress:
    """How far the choice of so many steps has come."""

    plans: Iterator[Steps]
    best: FittedSteps | None = None
    tried: dict[Steps, FittedSteps] = field(default_factory=dict)
    moves: int = 0
    put_off: Steps | None = None

    def next(self, num_steps: int, fixed: Sequence[int]) -> Steps | None:
        """What is to be tried next: a plan, or the best one with a step moved."""
        planned, self.put_off = self.put_off, None
        if planned is not None:
            return planned
        planned = next((steps for steps in self.plans if steps not in self.tried), None)
        if planned is not None or self.best is None:
            return planned
        every = _neighbours(self.best.steps, num_steps, fixed)
        left = [steps for steps in every if steps not in self.tried]
        self.moves += 1  # by a ratio that soon has been everywhere
        return left[int(len(left) * (self.moves * _GOLDEN % 1))] if left else None


class StepSearch:
    """Tries plans for numbers of computed steps, and may be told to go on later.

    Args:
        model: Pipeline or module.
        sample: Runs generation number i.
        trajectories: Of the samples to fit to, with latents.
        timesteps: Of the recorded generations.
        numbers: Of the generations that the trajectories are of; None for 0, 1, ...
        max_lag: How many of the last computed outputs are combined.
        per_branch: Whether each branch of guidance gets weights of its own.
    """

    def __init__(
        self,
        model: Any,
        sample: Callable[[int], Any],
        trajectories: Trajectories,
        timesteps: Sequence[float],
        *,
        numbers: Sequence[int] | None = None,
        max_lag: int = MAX_LAG,
        per_branch: bool = False,
    ) -> None:
        self._model, self._sample = model, sample
        self._trajectories = trajectories
        self._timesteps = timesteps
        self._numbers = numbers
        self._max_lag, self._per_branch = max_lag, per_branch
        self._outputs = ComputedOutputs()
        self._progress: dict[int, _Progress] = {}

    @property
    def spent(self) -> float:
        """What was spent, in uncached generations."""
        return self._outputs.calls / self._trajectories.num_steps

    def tried(self, count: int) -> list[FittedSteps]:
        """All that was tried for a number of computed steps, the best first."""
        progress = self._progress.get(count)
        found = [] if progress is None else list(progress.tried.values())
        return sorted(found, key=lambda x: (x.error, x.steps))

    def run(
        self, count: int, max_cost: float, told: Callable[[float], object] = lambda spent: None
    ) -> FittedSteps | None:
        """Tries plans and moves, or goes on with it, until so much was spent in this call.

        Args:
            count: Number of computed steps.
            max_cost: In uncached generations. The first fit runs in any case.
            told: Is told what was spent in all, after every fit.

        Returns:
            The best so far; None if nothing was tried.
        """
        steps, fixed = self._trajectories.num_steps, self._trajectories.first_steps()
        if count not in self._progress:
            self._progress[count] = _Progress(self._plans(count))
        progress = self._progress[count]
        limit = self.spent + max_cost
        while planned := progress.next(steps, fixed):
            if progress.best is not None and self.spent + self._cost(planned) > limit:
                progress.put_off = planned
                break
            found = self.fitted(planned)
            progress.tried[planned] = found
            worth = _WORTH if progress.best is not None and math.isfinite(found.error) else 0
            if progress.best is None or found.error < progress.best.error - worth:
                progress.best = found
            self._outputs.keep(progress.best.steps)
            told(self.spent)
        return progress.best

    def fitted(self, steps: Steps) -> FittedSteps:
        """Computed steps with weights fitted to the samples."""
        trajectories = self._trajectories
        computed = tuple(t in steps for t in range(trajectories.num_steps))
        run = ClosedLoopFit(
            self._model,
            self._sample,
            trajectories,
            self._timesteps,
            computed,
            max_lag=self._max_lag,
            per_branch=self._per_branch,
            outputs=self._outputs,
            numbers=self._numbers,
        )
        tables, errors = run.fitted(trajectories.num_samples, 0, progress=False)
        return FittedSteps(steps, tables, float(np.mean(np.log(np.maximum(errors, 1e-12)))))

    def _cost(self, steps: Steps) -> float:
        """What a fit would cost, in uncached generations."""
        trajectories = self._trajectories
        calls = self._outputs.missing(trajectories.num_samples, steps, trajectories.num_steps)
        return calls / trajectories.num_steps

    def _plans(self, count: int) -> Iterator[Steps]:
        for noise, early_weight in PLANS:
            segments = Segments.of(self._trajectories, early_weight)
            try:
                yield tuple(choose_steps(segments, count, noise=noise)[0])
            except InvalidArgumentError:  # the costs do not reach as far as so few steps do
                continue
        yield _even(self._trajectories.num_steps, count, self._trajectories.first_steps())


def _even(num_steps: int, count: int, fixed: Sequence[int]) -> Steps:
    """Steps as far apart as can be; those at which a denoiser begins are among them."""
    spaced = [round(x) for x in np.linspace(0, num_steps, count, endpoint=False)]
    for first in fixed:
        if first not in spaced:
            spaced[min(range(count), key=lambda i: abs(spaced[i] - first))] = first
    return tuple(sorted(spaced))


def _neighbours(best: Steps, num_steps: int, fixed: Sequence[int]) -> Iterator[Steps]:
    """The same with one computed step moved by one."""
    for index in range(len(best) - 1, 0, -1):
        for by in (-1, 1):
            moved = best[index] + by
            if best[index] in fixed or moved in best or moved >= num_steps:
                continue
            yield tuple(sorted({*best[:index], moved, *best[index + 1 :]}))
