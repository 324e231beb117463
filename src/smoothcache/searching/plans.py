"""Plans from trajectories as candidates of a search, with weights fitted along their own runs.

The weights are fitted to samples on which no candidate is compared, so that fitted candidates are
judged as fairly as others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..calibration.curves import Calibration
from ..calibration.recording import TrajectoryRecorder
from ..calibration.trajectory import Trajectories
from ..errors import CalibrationError
from ..fitting.step_search import FittedSteps, StepSearch
from ..planners.trajectory import trajectories_of, whole_model_schedule
from ..processes import from_rank_zero
from .gains import Trajectory
from .rollouts import Rollouts
from .space import Candidate

FITTED_ON = 2  # samples
FINALISTS = 2  # plans that are tried in rollouts at a time
SAME = 1e-3  # relative, of latents that are those of the calibration


class TrajectoryPlans:
    """Plans computed steps for budgets, and fits their weights.

    Args:
        model: Pipeline or module.
        sample: Runs generation number i.
        calibration: With trajectories.
        rollouts: Counts what is spent.
        numbers: Of the generations that weights are fitted to.
        more: Numbers of further generations of the calibration, for a final fit to all of them.
        is_of_samples: Whether the calibration's trajectories are those of ``sample``. Otherwise,
            and where it has none of a sample, they are recorded.
    """

    def __init__(
        self,
        model: Any,
        sample: Callable[[int], Any],
        calibration: Calibration,
        rollouts: Rollouts,
        *,
        numbers: Sequence[int],
        more: Sequence[int] = (),
        is_of_samples: bool,
    ) -> None:
        self._model, self._sample = model, sample
        self._calibration = calibration
        self._rollouts = rollouts
        self._num_steps = calibration.num_steps
        self._least = len(trajectories_of(calibration).first_steps())
        known = trajectories_of(calibration)
        self._known = known if is_of_samples and known.has_latents else None
        self._numbers, self._more = tuple(numbers), tuple(more)
        self._searches: dict[tuple[int, ...], StepSearch] = {}
        self._proposed: set[tuple[int, ...]] = set()

    @property
    def samples(self) -> int:
        """One more than the largest number of a generation that weights are fitted to."""
        return max((*self._numbers, *self._more)) + 1

    def count(self, budget: float) -> int:
        """How many computed steps a budget allows; 0 if there is nothing to be planned."""
        count = int(self._num_steps * budget + 1e-9)
        return count if self._least <= count < self._num_steps else 0

    def prepare(self) -> None:
        """Records what is missing.

        Raises:
            CalibrationError: If trajectories of the samples cannot be recorded.
        """
        from_rank_zero(lambda: self._search(self._numbers) and None)
        missing = [i for i in self._numbers if not self._is_known(i)]
        self._rollouts.cost += len(missing)

    def propose(self, budget: float, max_cost: float) -> list[Candidate]:
        """The best plans so far that were not proposed before; goes on with the choice of steps.

        Args:
            budget: Fraction of the uncached MACs.
            max_cost: What may be spent on it, in uncached generations; a fit may exceed it.
        """
        count = self.count(budget)
        if not count:
            return []
        found, spent = from_rank_zero(lambda: self._chosen(count, max_cost))
        self._rollouts.cost += spent
        return self._candidates(count, found)

    def refit_cost(self, candidate: Candidate) -> float:
        """What ``refitted`` costs; infinite if there are no further samples to fit to."""
        return candidate.compute * len(self._more) if self._more else math.inf

    def refitted(self, candidate: Candidate) -> list[Candidate]:
        """A candidate of this class with weights fitted to all samples of the calibration."""
        (computed, *_) = {row.computed for row in candidate.rows.values()}
        steps = tuple(t for t, x in enumerate(computed) if x)
        if not self._more:
            return []
        found, spent = from_rank_zero(lambda: self._refitted(steps))
        self._rollouts.cost += spent
        return [self._candidate(found, len(self._numbers) + len(self._more))]

    # ------------------------------------------------------------------------ what one process does

    def _chosen(self, count: int, max_cost: float) -> tuple[list[FittedSteps], float]:
        search = self._search(self._numbers)
        before = search.spent
        search.run(count, max_cost)
        return search.tried(count)[: 4 * FINALISTS], search.spent - before

    def _refitted(self, steps: tuple[int, ...]) -> tuple[FittedSteps, float]:
        search = self._search((*self._numbers, *self._more))
        before = search.spent
        return search.fitted(steps), search.spent - before

    def _search(self, numbers: tuple[int, ...]) -> StepSearch:
        if numbers not in self._searches:
            self._searches[numbers] = StepSearch(
                self._model,
                self._sample,
                self._trajectories(numbers),
                self._calibration.timesteps,
                numbers=numbers,
            )
        return self._searches[numbers]

    def _trajectories(self, numbers: tuple[int, ...]) -> Trajectories:
        """The trajectories of generations, recorded where the calibration has none of them."""
        known = [i for i in numbers if self._is_known(i)]
        missing = [i for i in numbers if i not in known]
        kept = self._known.of_samples(known) if self._known is not None and known else None
        if kept is not None and not missing:
            return kept
        responses = None if self._known is None else self._known.responses
        recorder = TrajectoryRecorder(self._model, responses=responses)
        for i in missing:
            recorder.record(partial(self._sample, i))
        recorded = recorder.result()
        if recorded.num_steps != self._num_steps:
            raise CalibrationError(
                f"sample(i) runs {recorded.num_steps} steps, where the calibration has "
                f"{self._num_steps}; calibrate with the same number of steps"
            )
        return recorded if kept is None else kept.followed_by(recorded)

    def _is_known(self, i: int) -> bool:
        return self._known is not None and i < self._known.num_samples

    # ------------------------------------------------------------------------------- candidates

    def _candidates(self, count: int, found: Sequence[FittedSteps]) -> list[Candidate]:
        new = [x for x in found if x.steps not in self._proposed][:FINALISTS]
        self._proposed |= {x.steps for x in new}
        return [self._candidate(x, len(self._numbers)) for x in new]

    def _candidate(self, found: FittedSteps, num_samples: int) -> Candidate:
        count = len(found.steps)
        name = f"{count} steps from trajectories, fitted"
        settings = {
            "planner": "search",
            "family": name,
            "weights": "closed loop",
            "fit_samples": num_samples,
        }
        computed = tuple(t in found.steps for t in range(self._num_steps))
        schedule = whole_model_schedule(
            self._calibration, computed, found.tables[0], settings, found.tables[1:]
        )
        compute = count / self._num_steps if schedule.compute is None else schedule.compute
        return Candidate(name, compute, schedule=schedule)


def is_recorded(trajectory: Trajectory | None, calibration: Calibration, i: int) -> bool:
    """Whether a generation ran through the latents that the calibration has of its number."""
    known = calibration.trajectories
    if trajectory is None or known is None or not known.has_latents or i >= known.num_samples:
        return False
    guidance, recorded = known.responses.guidance, known.latents[i]
    if len(trajectory.latents) != len(recorded):
        return False
    for step in (0, len(recorded) - 1):
        given, wanted = guidance.latents(trajectory.latents[step]), recorded[step].float()
        if given.shape != wanted.shape:
            return False
        if float(torch.dist(given, wanted)) > SAME * float(wanted.norm()):
            return False
    return True
