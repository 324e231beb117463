"""The errors of the candidates that were tried, and what may still be spent on others."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..processes import decided_by_rank_zero
from .rollouts import Rollouts
from .space import Candidate


class Trials:
    """Tries candidates on the training samples and keeps their errors.

    Args:
        rollouts: Runs the candidates.
        reference: Name of the reference that errors are measured against.
        samples: Numbers of the generations that candidates are compared on.
        max_cost: What may be spent in all, in uncached generations.
        deadline: Value of ``time.monotonic()`` in seconds at which improvement ends; may be
            infinite.
        bar: Progress bar.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        reference: str,
        samples: range,
        max_cost: float,
        deadline: float,
        bar: Any,
    ) -> None:
        self.reference = reference
        self.samples = samples
        self._rollouts = rollouts
        self._max_cost = max_cost
        self._deadline = deadline
        self._bar = bar
        self._errors: dict[str, tuple[Candidate, list[float]]] = {}

    def screen(self, candidates: Sequence[Candidate]) -> None:
        """Tries candidates on the first sample, and the better half of them on the others."""
        if not candidates:
            return
        first, rest = self.samples[0], self.samples[1:]
        errors = self._rollouts.distances(self.reference, [(c, first) for c in candidates])
        order = sorted(range(len(candidates)), key=lambda i: (errors[i], i))
        kept = order[: _number_kept(len(order))]
        runs = [(candidates[i], j) for i in kept for j in rest]
        others = self._rollouts.distances(self.reference, runs)
        for position, i in enumerate(kept):
            own = others[position * len(rest) : (position + 1) * len(rest)]
            self.record(candidates[i], [errors[i], *own])

    def screen_the_promising(
        self, candidates: Sequence[Candidate], budget: float, *, never_negative: bool
    ) -> None:
        """Tries candidates on all samples but those that cannot come out best any more.

        Where errors are never negative, what a candidate has come to on some of the samples is a
        lower bound of its sum over all of them. It is dropped if that is no better than the best.

        Args:
            candidates: Of which the first round of a search has at least one.
            budget: Fraction of the uncached MACs, within which the best one counts.
            never_negative: Whether errors are known to be never negative.
        """
        first, rest = self.samples[0], self.samples[1:]
        errors = self._rollouts.distances(self.reference, [(c, first) for c in candidates])
        known = self.ranked(budget)
        best = self.error(known[0]) if known else math.inf
        for i in sorted(range(len(candidates)), key=lambda i: (errors[i], i)):
            own = [errors[i]]
            for j in rest:
                is_hopeless = math.isfinite(best) and sum(own) >= best * len(self.samples)
                if never_negative and is_hopeless:
                    break
                own += self._rollouts.distances(self.reference, [(candidates[i], j)])
            else:
                self.record(candidates[i], own)
                best = min(best, float(np.mean(own)))

    @property
    def left(self) -> float:
        """What may still be spent, in uncached generations; negative if it was exceeded."""
        return self._max_cost - self._rollouts.cost

    def screening_cost(self, candidates: Sequence[Candidate]) -> float:
        """The most that screening candidates can cost, in uncached generations."""
        rest = len(self.samples) - 1
        costs = sorted((c.compute for c in candidates), reverse=True)
        return sum(costs) + rest * sum(costs[: _number_kept(len(costs))])

    def record(self, candidate: Candidate, errors: list[float]) -> None:
        """Keeps the errors of a candidate; [samples]."""
        self._errors.setdefault(candidate.key, (candidate, errors))
        self._bar.update(self._rollouts.rollouts - self._bar.n)
        best = min(float(np.mean(e)) for _, e in self._errors.values())
        self._bar.set_postfix_str(f"best error {best:.4g}")

    def has(self, candidate: Candidate) -> bool:
        """Whether a candidate with the same effect was measured on all samples."""
        return candidate.key in self._errors

    def error(self, candidate: Candidate) -> float:
        """The mean error over the samples."""
        return float(np.mean(self._errors[candidate.key][1]))

    def first_error(self, candidate: Candidate) -> float:
        """The error on the first sample."""
        return self._errors[candidate.key][1][0]

    def ranked(self, budget: float = math.inf) -> list[Candidate]:
        """All measured candidates within a budget, those of the smallest error first."""
        affordable = [c for c, _ in self._errors.values() if c.fits(budget)]
        return sorted(affordable, key=lambda c: (self.error(c), c.key))

    def best(self, budget: float) -> Candidate:
        """The measured candidate of the smallest error within a budget."""
        return self.ranked(budget)[0]

    def least_error(self, budget: float) -> float:
        """The smallest mean error within a budget."""
        return self.error(self.best(budget))

    def front(self) -> list[tuple[Candidate, float]]:
        """The Pareto front: candidates and their mean errors, cheapest first.

        No other candidate is at once as cheap as one of the front and better.
        """
        measured = [
            (candidate, float(np.mean(errors))) for candidate, errors in self._errors.values()
        ]
        front: list[tuple[Candidate, float]] = []
        for candidate, error in sorted(measured, key=lambda x: (x[0].compute, x[1])):
            if not front or error < front[-1][1]:
                front.append((candidate, error))
        return front

    def can_pay(self, cost: float) -> bool:
        """Whether ``max_cost`` allows so many more uncached generations."""
        return self._rollouts.cost + cost <= self._max_cost

    def may_continue(self, cost: float) -> bool:
        """Whether there is time left, and ``max_cost`` allows so many more generations."""
        return decided_by_rank_zero(time.monotonic() < self._deadline) and self.can_pay(cost)


def _number_kept(count: int) -> int:
    """How many of the screened candidates are tried on the other samples."""
    return max(3, count // 2)
