"""Improves the best candidates: uneven spacings, fitted gains, and moves of computed steps."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

from .masks import neighbours
from .proposals import PROBES, Proposals
from .references import UNCACHED
from .rollouts import Rollouts
from .space import Candidate, SearchSpace
from .trials import Trials
from .validation import Validation

BATCH = 4  # moves that are tried at once; independent of the number of processes
FITTED = 3  # candidates whose gains are fitted at first
WITH_WEIGHTS = 2  # candidates whose weights are fitted at first
DAMPING = (0.97, 0.94)  # gains below 1 that are tried on predicted changes of layers


class Improvement:
    """Improves what was tried, for as long as the search may continue.

    Args:
        space: Forms the candidates.
        proposals: Proposes uneven spacings.
        rollouts: Runs the candidates.
        trials: Keeps the errors of the candidates.
        validation: Tells what must be left for measuring the winner.
        rng: Orders the moves.
        fits_weights: Whether weights are fitted to candidates for the whole denoiser, and not only
            gains.
    """

    def __init__(
        self,
        space: SearchSpace,
        proposals: Proposals,
        rollouts: Rollouts,
        trials: Trials,
        validation: Validation,
        rng: random.Random,
        *,
        fits_weights: bool = False,
    ) -> None:
        self._space = space
        self._proposals = proposals
        self._rollouts = rollouts
        self._trials = trials
        self._validation = validation
        self._rng = rng
        self._fits_weights = fits_weights
        self._with_weights: set[str] = set()

    def run(
        self,
        budget: float,
        until: float = -math.inf,
        reserve: float = 0.0,
        *,
        moves_alone: bool = False,
    ) -> None:
        """Improves the candidates within a budget.

        Moves are tried on the best two candidates. A candidate that no move makes better is set
        aside; once both are, the gains of whole-denoiser candidates are fitted anew, and the
        improvement ends if that does not help.

        Args:
            budget: Fraction of the uncached MACs.
            until: An error at which to stop.
            reserve: Uncached generations to leave unspent, at least.
            moves_alone: Whether to try no uneven spacings and fit no gains, because better ones
                were planned from trajectories.
        """
        trials = self._trials
        reserve = max(reserve, self._validation.cost(budget))
        if trials.least_error(budget) <= until:
            return
        if not moves_alone:
            self._try_uneven(budget, reserve)
            whole = [c for c in trials.ranked(budget) if c.reuses_whole_denoiser]
            self._fit_gains(whole[:FITTED], reserve)
            self._fit_weights(whole[:WITH_WEIGHTS], reserve)
        self._damp([c for c in trials.ranked(budget) if c.reuses_layers][:1], reserve)
        without_better_move: set[str] = set()
        batch_cost = BATCH * len(trials.samples) * budget
        while trials.may_continue(batch_cost + reserve):
            best = [c for c in trials.ranked(budget) if _may_be_moved(c)][:2]
            candidate = next((c for c in best if c.key not in without_better_move), None)
            if trials.least_error(budget) <= until:
                return
            if candidate is None:
                if moves_alone or not self._fit_gains(
                    [c for c in best if c.reuses_whole_denoiser], reserve
                ):
                    return
            elif not self._try_moves(candidate, budget, reserve):
                without_better_move.add(candidate.key)

    def _try_uneven(self, budget: float, reserve: float) -> None:
        """Tries uneven spacings, as many as may be paid."""
        trials = self._trials
        if not trials.may_continue(PROBES + reserve):
            return
        runs = [(probe, trials.samples[0]) for probe in self._proposals.probes()]
        weights = self._proposals.step_weights(self._rollouts.distances(UNCACHED, runs))
        uneven = self._proposals.uneven(trials.ranked(budget), budget, weights)
        while uneven and not trials.may_continue(trials.screening_cost(uneven) + reserve):
            uneven.pop()
        trials.screen(uneven)

    def _fit_gains(self, candidates: Sequence[Candidate], reserve: float) -> bool:
        """Tries candidates with fitted gains; returns whether that made one of them better."""
        trials = self._trials
        is_better = False
        for candidate in candidates:
            if not trials.may_continue(2 * len(trials.samples) * candidate.compute + reserve):
                break
            row = self._rollouts.fit(trials.reference, candidate, trials.samples)
            fitted = self._space.with_row(candidate, row, "fitted")
            if not trials.has(fitted):
                runs = [(fitted, i) for i in trials.samples]
                trials.record(fitted, self._rollouts.distances(trials.reference, runs))
                is_better |= trials.error(fitted) < trials.error(candidate)
        return is_better

    def _fit_weights(self, candidates: Sequence[Candidate], reserve: float) -> None:
        """Tries candidates with fitted weights, once each."""
        trials = self._trials
        for candidate in candidates:
            if not self._fits_weights or candidate.key in self._with_weights:
                continue
            steps = (candidate.num_steps or self._space.num_steps) / self._space.num_steps
            cost = len(trials.samples) * (steps + 2 * candidate.compute)
            if not trials.may_continue(cost + reserve):
                return
            self._with_weights.add(candidate.key)
            row = self._rollouts.fit_weights(trials.reference, candidate, trials.samples)
            if row is not None:
                trials.screen([self._space.with_row(candidate, row, "with weights")])

    def _damp(self, candidates: Sequence[Candidate], reserve: float) -> None:
        """Tries candidates with gains slightly below 1."""
        trials = self._trials
        for candidate, gain in itertools.product(candidates, DAMPING):
            row = candidate.common_row
            cost = len(trials.samples) * candidate.compute
            if row is None or not trials.may_continue(cost + reserve):
                return
            damped = replace(row, gains=tuple(1.0 if x else gain for x in row.computed))
            trials.screen([self._space.with_row(candidate, damped, f"damped {gain:g}")])

    def _try_moves(self, candidate: Candidate, budget: float, reserve: float) -> bool:
        """Tries moves of single computed steps in batches, until a batch has a better candidate.

        Returns:
            Whether there was one.
        """
        row = candidate.common_row
        if row is None:
            return False
        trials = self._trials
        masks = neighbours(row.computed, self._rng)
        moved = (self._space.with_row(candidate, row.moved(mask), "moved") for mask in masks)
        untried = (c for c in moved if not trials.has(c) and c.fits(budget))
        first, others = trials.samples[0], trials.samples[1:]
        while batch := list(itertools.islice(untried, BATCH)):
            if not trials.may_continue(len(batch) * len(trials.samples) * budget + reserve):
                return False
            errors = self._rollouts.distances(trials.reference, [(c, first) for c in batch])
            is_better = False
            for trial, error in zip(batch, errors, strict=True):
                if error >= trials.first_error(candidate):
                    continue  # worse on the first sample; the others are not run
                runs = [(trial, i) for i in others]
                rest = self._rollouts.distances(trials.reference, runs)
                trials.record(trial, [error, *rest])
                is_better |= trials.error(trial) < trials.error(candidate)
            if is_better:
                return True
        return False


def _may_be_moved(candidate: Candidate) -> bool:
    """Whether its computed steps may be moved: of weights, others would have to be fitted."""
    row = candidate.common_row
    return row is not None and row.weights is None
