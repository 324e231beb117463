"""What one row of a schedule says of a layer at every step, prepared for running."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from ..errors import ScheduleMismatchError
from ..steps.predictors import PREDICTORS, extrapolation_weights, last_uses, planned_sources
from .combine import combined, combined_by_part, one_of


class RowPlan:
    """When a layer is computed, how long its values are of use, and how they are combined.

    Args:
        path: The layer's path, for messages.
        computed: Whether the layer is computed, for every step.
        predictor: Name of the predictor.
        positions: Where each step lies on the predictor's axis; None for its index.
        gains: How much of a predicted change is taken at every step; None for all of it.
        weights: Of the last computed values at every step, the newest first, in place of a
            polynomial's; one table for all branches of guidance, or one for each.
        batch_parts: In how many parts the batch of a call holds branches that have their own.

    Attributes:
        order: Degree of the predictor's polynomial; one value more is kept.
        last_uses: For every step, the last step that reuses its value; None if none does.
        due: For every step, the newest computed step up to it.
        reusable_from: The same; the number of steps where the layer is computed, so that no kept
            value is new enough.
        is_fitted: Whether values are combined with fitted weights.
        never_reused: Whether no value is ever reused.
        weights: ``weights(steps, at)`` gives the weights of the values of some steps, the newest
            last, in a reuse at another step.
        fitted_weights: ``fitted_weights(branch, steps, at)`` gives a list of those for each part
            of the batch.
    """

    def __init__(
        self,
        path: str,
        computed: Sequence[bool],
        predictor: str = "hold",
        *,
        positions: Sequence[float] | None = None,
        gains: Sequence[float] | None = None,
        weights: Sequence[Sequence[Sequence[float]]] = (),
        batch_parts: int = 1,
    ) -> None:
        self.path = path
        self.computed = computed
        self.batch_parts = batch_parts
        self.order = _order_of(weights[0]) if weights else PREDICTORS[predictor].order
        self.last_uses = last_uses(computed, self.order)
        steps = range(len(computed))
        self.due = [max((s for s in steps[: t + 1] if computed[s]), default=0) for t in steps]
        self.reusable_from = [len(computed) if computed[t] else self.due[t] for t in steps]
        self.never_reused = all(last is None for last in self.last_uses)
        self.is_fitted = bool(weights)
        self._tables = weights
        self._positions = range(len(computed)) if positions is None else positions
        self._gains = (1.0,) * len(computed) if gains is None else gains
        self.weights = cache(self._polynomial_weights)
        self.fitted_weights = cache(self._fitted_weights)

    def combined(
        self,
        values: Sequence[Any],
        steps: tuple[int, ...],
        branch: int | None,
        at: int,
        *,
        consume: bool,
    ) -> Any:
        """What a reuse makes of the values of a leaf.

        Args:
            values: At each of some steps, the newest last.
            steps: Those steps.
            branch: Number of the guidance branch.
            at: The step of the reuse.
            consume: Whether the newest value may be returned itself, because it is not used again.
        """
        if self.is_fitted:
            weights = self.fitted_weights(branch, steps, at)
            return combined_by_part(values, weights, consume=consume)
        if len(values) == 1:
            return one_of(values[0], consume=consume)
        return combined(values, self.weights(steps, at), consume=consume)

    def _polynomial_weights(self, steps: tuple[int, ...], at: int) -> list[float]:
        known = [self._positions[step] for step in steps]
        return extrapolation_weights(known, self._positions[at], self._gains[at])

    def _fitted_weights(
        self, branch: int | None, steps: tuple[int, ...], at: int
    ) -> list[list[float]]:
        tables = self._tables
        if len(tables) == 1:
            chosen = tables
        else:
            first = (branch or 0) * self.batch_parts
            chosen = tables[first : first + self.batch_parts]
        if len(chosen) < self.batch_parts and len(tables) > 1:
            raise ScheduleMismatchError(
                f"the weights of {self.path or 'the model'!r} were fitted to {len(tables)} "
                f"branches of guidance, {self.batch_parts} in each call, and this is a call of "
                "another one; sample with the guidance that they were fitted to, or fit them anew"
            )
        sources = planned_sources(self.computed, at, len(chosen[0][at]))
        if not sources or not set(sources) <= set(steps):
            return [self._polynomial_weights(steps, at)] * len(chosen)
        weight_of = [dict(zip(sources, reversed(table[at]), strict=True)) for table in chosen]
        return [[weights.get(step, 0.0) for step in steps] for weights in weight_of]


def _order_of(weights: Sequence[Sequence[float]]) -> int:
    """Of a polynomial that combines as many values; at least 1, so that a lone one is weighed."""
    return max(2, *map(len, weights)) - 1
