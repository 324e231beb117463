"""Measures the winner on samples that the search has not used, beside baselines without a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from ..errors import CalibrationError
from ..schedule.schedule import Schedule
from .references import CONVERGED, UNCACHED
from .result import Measured, SearchedSchedule, SearchResult, deciding_error, verdict_on
from .rollouts import Rollouts
from .space import Candidate, SearchSpace


class Validation:
    """Measures candidates on the validation samples and makes the result of the search.

    Args:
        space: Forms the candidates.
        rollouts: Runs them.
        samples: Numbers of the generations to measure on.
        solvers: Noise schedulers by name for the baselines; empty if the sampler takes none.
        joint: Whether the distance to the converged sample decides.
        takes_num_steps: Whether the sampler can run with another number of steps.
        has_converged: Whether there are converged samples.
        max_cost: What baselines may cost that are measured on one sample at least, and on the
            others if they may still turn out better than the winner; None to measure all of them
            on all samples.
    """

    def __init__(
        self,
        space: SearchSpace,
        rollouts: Rollouts,
        samples: range,
        solvers: Mapping[str, Any],
        *,
        joint: bool,
        takes_num_steps: bool,
        has_converged: bool,
        max_cost: float | None = None,
    ) -> None:
        self._space = space
        self._rollouts = rollouts
        self._samples = samples
        self._solvers = solvers
        self._joint = joint
        self._takes_num_steps = takes_num_steps
        self._has_converged = has_converged
        self._max_cost = max_cost

    def cost(self, budget: float) -> float:
        """The most that measuring the winner and the baselines costs, in uncached generations."""
        if self._max_cost is not None:
            baselines = 1 + len(self._solvers) if self._takes_num_steps else 0
            return budget * (len(self._samples) + baselines)
        return budget * len(self._samples) * (2 + len(self._solvers))

    def error(self, candidate: Candidate) -> float:
        """The error that decides, as a mean over the samples."""
        return self._mean_error(CONVERGED if self._joint else UNCACHED, candidate)

    def result(
        self, best: Candidate, budget: float, front: Sequence[tuple[Candidate, float]]
    ) -> SearchedSchedule:
        """Measures the best candidate and the baselines, and reports on them.

        A joint search returns a baseline if that is better than the best candidate.

        Args:
            best: The best candidate on the training samples.
            budget: What the baselines may cost, as a fraction of the uncached MACs.
            front: The Pareto front of candidates and their errors on the training samples.
        """
        plain = self._without_cache(budget)
        winner = self._measured(best)
        baselines = [self._measured(x, against=winner) for x in plain]
        if self._joint:
            pairs = zip((best, *plain), (winner, *baselines), strict=True)
            best, winner = min(pairs, key=lambda pair: deciding_error(pair[1], joint=True))
        result = SearchResult(
            best=winner,
            baselines=tuple(baselines),
            front=tuple(Measured.of(candidate, error) for candidate, error in front),
            rollouts=self._rollouts.rollouts,
            cost=self._rollouts.cost,
            verdict=verdict_on(winner, baselines, joint=self._joint),
            scheduler=self._solvers.get(best.solver or ""),
            num_steps=best.num_steps or self._space.num_steps,
        )
        return _with_result(best.schedule or self._computing_all_steps(best), result)

    def _without_cache(self, budget: float) -> list[Candidate]:
        """The baselines: fewer steps of the sampler's own solver and of the others."""
        fewer = int(self._space.num_steps * budget + 1e-9)
        if not self._takes_num_steps or fewer < 1:
            return []
        return [self._space.plain(fewer, solver) for solver in (None, *self._solvers)]

    def _measured(self, candidate: Candidate, against: Measured | None = None) -> Measured:
        errors: list[float] = []
        for i in self._samples:
            if errors and against is not None and self._is_enough(candidate, errors, against):
                break
            errors += self._rollouts.distances(UNCACHED, [(candidate, i)])
        return Measured.of(
            candidate,
            float(np.mean(errors)),
            self._mean_error(CONVERGED, candidate) if self._has_converged else None,
        )

    def _is_enough(self, candidate: Candidate, errors: list[float], against: Measured) -> bool:
        """Whether a baseline has lost already, or another sample would cost too much."""
        if self._max_cost is None:
            return False
        has_lost = sum(errors) > against.error * len(self._samples)
        return has_lost or self._rollouts.cost + candidate.compute > self._max_cost

    def _mean_error(self, reference: str, candidate: Candidate) -> float:
        runs = [(candidate, i) for i in self._samples]
        return float(np.mean(self._rollouts.distances(reference, runs)))

    def _computing_all_steps(self, candidate: Candidate) -> Schedule:
        """The schedule of a candidate without a cache."""
        steps = candidate.num_steps or self._space.num_steps
        uncached = self._space.candidate(
            candidate.name, "layers", (True,) * steps, "hold", candidate.num_steps, candidate.solver
        )
        if uncached.schedule is None:
            raise CalibrationError("a schedule needs at least one layer, but none was calibrated")
        return uncached.schedule


def _with_result(schedule: Schedule, result: SearchResult) -> SearchedSchedule:
    """A schedule that knows the result; its file keeps the quality and a summary."""
    best = result.best
    quality = {"error": best.error}
    if best.converged_error is not None:
        quality["error to the converged sample"] = best.converged_error
    summary = {
        "rollouts": str(result.rollouts),
        "search cost": f"{result.cost:.1f} generations",
        "verdict": result.verdict,
    }
    values = {one.name: getattr(schedule, one.name) for one in fields(Schedule)}
    values["quality"] = quality
    values["provenance"] = {**schedule.provenance, **summary}
    return SearchedSchedule(**values, result=result)
