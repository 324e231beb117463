"""The stages of a search: references, proposals, improvement, and validation of the winner."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import InvalidArgumentError
from .gains import Trajectory
from .improvement import Improvement
from .options import SearchOptions
from .plans import FINALISTS, FITTED_ON, TrajectoryPlans
from .proposals import Proposals
from .references import (
    CONVERGED,
    CONVERGED_FACTOR,
    UNCACHED,
    sample_training_references,
    sample_validation_references,
)
from .result import SearchedSchedule
from .rollouts import Rollouts
from .space import Candidate, SearchSpace
from .trials import Trials
from .validation import Validation

STEP_COUNTS = 12  # numbers of computed steps that are tried to find the cheapest schedule
MOST_AT_ONCE = 2.0  # uncached generations for further plans, before the best ones are tried
PLANS_OF_A_BUDGET = 2  # that are fitted at each budget that is tried to find the cheapest schedule


# A long class, because the stages of a search share its budget and what they found.
class SearchRun:
    """One run of a search, from the references to the result.

    Args:
        space: Forms the candidates.
        rollouts: Runs them.
        options: Settings of the search.
        solvers: Noise schedulers by name; empty if the sampler takes none.
        max_cost: What may be spent in all, in uncached generations.
        takes_num_steps: Whether the sampler can run with another number of steps.
        known: Outputs of training generations that ran before.
        plans: Makes the plans from trajectories, if there are any, once it is known whether those
            of the calibration are of these samples; may give None.
        is_recorded: Whether a trajectory is the calibration's of its number; None if that has none.
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
        max_cost: float,
        takes_num_steps: bool,
        known: Mapping[int, Any],
        plans: Callable[[bool], TrajectoryPlans | None],
        is_recorded: Callable[[Trajectory | None], bool] | None,
        deadline: float,
        bar: Any,
    ) -> None:
        training, joint = options.training_samples, options.joint
        self._space = space
        self._rollouts = rollouts
        self._max_cost = max_cost
        self._never_negative = isinstance(options.objective, str)
        self._proposals = Proposals(space, solvers, joint=joint, given=options.proposals)
        is_of_samples = sample_training_references(
            rollouts,
            space.num_steps,
            training,
            joint=joint,
            known=known,
            is_recorded=is_recorded,
        )
        self._plans = plans(is_of_samples)
        validation = options.validation_samples_from(self._plans.samples if self._plans else 0)
        converged = joint or (takes_num_steps and self._may_converge(len(validation)))
        self._trials = Trials(
            rollouts, CONVERGED if joint else UNCACHED, training, max_cost, deadline, bar
        )
        self._validation = Validation(
            space,
            rollouts,
            validation,
            solvers,
            joint=joint,
            takes_num_steps=takes_num_steps,
            has_converged=converged,
            max_cost=max_cost if self._plans and not converged and self._never_negative else None,
        )
        self._improvement = Improvement(
            space,
            self._proposals,
            rollouts,
            self._trials,
            self._validation,
            random.Random(options.seed),
            fits_weights=joint and space.calibration.trajectories is not None,
        )
        sample_validation_references(rollouts, space.num_steps, validation, converged=converged)

    def _may_converge(self, count: int) -> bool:
        """Whether converged samples leave enough for a search that knows how to do with little."""
        return self._plans is None or 2 * CONVERGED_FACTOR * count <= self._max_cost

    def best_within(self, budget: float) -> SearchedSchedule:
        """The schedule of the smallest error whose compute is at most the budget."""
        count = 0 if self._plans is None else self._plans.count(budget)
        proposals = self._first_round(budget)
        if not proposals and not count:
            raise InvalidArgumentError(
                f"no schedule is as cheap as {budget:.3f} of the uncached run; with one computed "
                f"step it costs {self._space.least_compute():.3f}. Ask for a smaller speedup, or "
                "sample with fewer steps"
            )
        if self._plans is None:
            self._trials.screen(proposals)
            self._improvement.run(budget)
        else:
            self._try_plans(self._plans, proposals, budget)
        return self._result(self._trials.best(budget), budget)

    def _first_round(self, budget: float) -> list[Candidate]:
        """What is tried first; little of it where there are plans from trajectories as well."""
        if self._plans is None:
            return self._proposals.within(budget)
        return self._proposals.baselines(budget)

    def _try_plans(self, plans: TrajectoryPlans, proposals: list[Candidate], budget: float) -> None:
        """Tries plans from trajectories beside the proposals, and improves the best of both."""
        trials = self._trials
        self._screen(proposals, budget)
        reserve = self._validation.cost(budget)
        rollout = len(trials.samples) * budget
        to_try = reserve + FINALISTS * rollout
        if not trials.ranked(budget) or trials.may_continue(to_try + FITTED_ON * budget):
            self._screen(plans.propose(budget, (trials.left - to_try) / 2), budget)
        while trials.best(budget).is_fitted and trials.may_continue(to_try):
            planned = plans.propose(budget, min(trials.left - to_try, MOST_AT_ONCE))
            if not planned:
                break
            self._screen(planned, budget)
        best = trials.best(budget)
        if best.is_fitted:
            if trials.may_continue(reserve + plans.refit_cost(best) + rollout):
                self._screen(plans.refitted(best), budget)
            return
        for variant in self._proposals.variants(budget):
            if not trials.has(variant) and trials.may_continue(reserve + rollout):
                self._screen([variant], budget)
        self._improvement.run(budget, moves_alone=True)

    def _screen(self, candidates: list[Candidate], budget: float) -> None:
        if candidates:
            self._trials.screen_the_promising(
                candidates, budget, never_negative=self._never_negative
            )

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
            self._improve(budget, max_error)
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
            self._improve(budget, max_error, reserve)
            if self._trials.least_error(budget) > max_error:
                break
            index -= 1
        return index

    def _try_proposals(self, budget: float) -> bool:
        """Screens the proposals for a budget if they may be paid.

        Returns:
            Whether any measured candidate is within the budget.
        """
        proposals = self._first_round(budget)
        cost = self._trials.screening_cost(proposals) + self._validation.cost(budget)
        if self._trials.can_pay(cost):
            self._trials.screen(proposals)
        return bool(self._trials.ranked(budget))

    def _improve(self, budget: float, until: float, reserve: float = 0.0) -> None:
        """Improves the candidates within a budget until one keeps an error."""
        plans, trials = self._plans, self._trials
        if plans is None:
            self._improvement.run(budget, until=until, reserve=reserve)
            return
        reserve = max(reserve, self._validation.cost(budget))
        needed = budget * (FITTED_ON + FINALISTS * len(trials.samples))
        if trials.least_error(budget) > until and trials.may_continue(reserve + needed):
            self._screen(plans.propose(budget, PLANS_OF_A_BUDGET * FITTED_ON * budget), budget)
        self._improvement.run(budget, until=until, reserve=reserve, moves_alone=True)

    def _keeping(self, max_error: float, budget: float) -> list[Candidate]:
        """Candidates that keep the error on the training samples, cheapest first."""
        trials = self._trials
        found = [c for c in trials.ranked(budget) if trials.error(c) <= max_error]
        return sorted(found, key=lambda c: (c.compute, trials.error(c), c.key))

    def _result(self, best: Candidate, budget: float) -> SearchedSchedule:
        return self._validation.result(best, budget, self._trials.front())
