"""The stages of a search: references, proposals, improvement, and validation of the winner."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InvalidArgumentError
from .improvement import Improvement
from .options import SearchOptions
from .proposals import Proposals
from .references import CONVERGED, UNCACHED, sample_references
from .result import SearchedSchedule
from .rollouts import Rollouts
from .space import Candidate, SearchSpace
from .trials import Trials
from .validation import Validation

STEP_COUNTS = 12  # numbers of computed steps that are tried to find the cheapest schedule


class SearchRun:
    """One run of a search, from the references to the result.

    Args:
        space: Forms the candidates.
        rollouts: Runs them.
        options: Settings of the search.
        solvers: Noise schedulers by name; empty if the sampler takes none.
        takes_num_steps: Whether the sampler can run with another number of steps.
        deadline: Value of ``time.monotonic()`` at which improvement ends; may be infinite.
        bar: Progress bar.
    """

    def __init__(
        self,
        space: SearchSpace,
        rollouts: Rollouts,
        options: SearchOptions,
        *,
        solvers: Mapping[str, Any],
        takes_num_steps: bool,
        deadline: float,
        bar: Any,
    ) -> None:
        training, validation = options.training_samples, options.validation_samples
        joint = options.joint
        self._space = space
        self._rollouts = rollouts
        self._max_cost = options.max_cost
        self._proposals = Proposals(space, solvers, joint=joint, given=options.proposals)
        self._trials = Trials(
            rollouts,
            CONVERGED if joint else UNCACHED,
            training,
            options.max_cost,
            deadline,
            bar,
        )
        self._validation = Validation(
            space, rollouts, validation, solvers, joint=joint, takes_num_steps=takes_num_steps
        )
        self._improvement = Improvement(
            space,
            self._proposals,
            rollouts,
            self._trials,
            self._validation,
            random.Random(options.seed),
        )
        sample_references(
            rollouts,
            space.num_steps,
            training,
            validation,
            joint=joint,
            takes_num_steps=takes_num_steps,
        )

    def best_within(self, budget: float) -> SearchedSchedule:
        """The schedule of the smallest error whose compute is at most the budget."""
        proposals = self._proposals.within(budget)
        if not proposals:
            raise InvalidArgumentError(
                f"no schedule is as cheap as {budget:.3f} of the uncached run; with one computed "
                f"step it costs {self._space.least_compute():.3f}. Ask for a smaller speedup, or "
                "sample with fewer steps"
            )
        self._trials.screen(proposals)
        self._improvement.run(budget)
        return self._result(self._trials.best(budget), budget)

    def cheapest(self, max_error: float) -> SearchedSchedule:
        """The cheapest schedule whose error on the validation samples is at most ``max_error``.

        The proposals alone give a number of computed steps that is enough. Improvement then
        lowers it as far as it can. From there on the candidates are validated, the cheapest
        first, until one keeps the error on the validation samples as well.
        """
        steps = self._space.num_steps
        fractions = np.geomspace(2 / steps, 1, STEP_COUNTS)
        counts = sorted({1, *(max(2, round(steps * x)) for x in fractions)})
        enough = self._enough_without_improvement(counts, max_error)
        enough = self._enough_with_improvement(counts, enough, max_error)
        for count in counts[enough:]:
            budget = count / steps
            if not self._try_proposals(budget):
                continue
            self._improvement.run(budget, until=max_error)
            for candidate in self._keeping(max_error, budget):
                if not self._trials.can_pay(self._validation.cost(candidate.compute)):
                    break
                if self._validation.error(candidate) <= max_error:
                    return self._result(candidate, candidate.compute)
        raise InvalidArgumentError(
            f"no schedule was found that keeps an error of {max_error:g} on the validation "
            f"samples; {self._rollouts.cost:.1f} of the {self._max_cost:g} generations that "
            "max_cost allows were spent. Raise max_error or max_cost, or sample without a cache"
        )

    def _enough_without_improvement(self, counts: list[int], max_error: float) -> int:
        """The first index of ``counts`` at which a proposal keeps the error, by bisection."""
        low, high = 0, len(counts) - 1  # the last count computes every step
        while low < high:
            middle = (low + high) // 2
            budget = counts[middle] / self._space.num_steps
            if self._try_proposals(budget) and self._trials.least_error(budget) <= max_error:
                high = middle
            else:
                low = middle + 1
        return high

    def _enough_with_improvement(self, counts: list[int], index: int, max_error: float) -> int:
        """The first index of ``counts`` at which an improved candidate keeps the error."""
        steps = self._space.num_steps
        reserve = 2 * self._validation.cost(counts[index] / steps)
        while index and self._try_proposals(budget := counts[index - 1] / steps):
            self._improvement.run(budget, until=max_error, reserve=reserve)
            if self._trials.least_error(budget) > max_error:
                break
            index -= 1
        return index

    def _try_proposals(self, budget: float) -> bool:
        """Screens the proposals for a budget if they may be paid.

        Returns:
            Whether any measured candidate is within the budget.
        """
        proposals = self._proposals.within(budget)
        cost = self._trials.screening_cost(proposals) + self._validation.cost(budget)
        if self._trials.can_pay(cost):
            self._trials.screen(proposals)
        return bool(self._trials.ranked(budget))

    def _keeping(self, max_error: float, budget: float) -> list[Candidate]:
        """Candidates that keep the error on the training samples, cheapest first."""
        trials = self._trials
        found = [c for c in trials.ranked(budget) if trials.error(c) <= max_error]
        return sorted(found, key=lambda c: (c.compute, trials.error(c), c.key))

    def _result(self, best: Candidate, budget: float) -> SearchedSchedule:
        return self._validation.result(best, budget, self._trials.front())
