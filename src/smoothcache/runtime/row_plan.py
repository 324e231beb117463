"""One row of a schedule, prepared for running."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from ..errors import ScheduleMismatchError
from ..steps.predictors import PREDICTORS, extrapolation_weights, last_uses, planned_sources
from .combine import combined, combined_by_part, one_of


class RowPlan:
    """When a layer is computed, how long its values are kept, and how they are combined.

    Args:
        path: The layer's path, for messages.
        computed: Whether the layer is computed at each step.
        predictor: Name of the predictor.
        positions: Position of each step on the predictor's axis; None for the step index.
        gains: Fraction of the predicted change that is applied at each step; None for 1.
        weights: Fitted weights of the last computed values at each step, the newest first, which
            replace the polynomial's; one table for all guidance branches, or one per branch.
        batch_parts: Number of guidance branches in the batch of one call.

    Attributes:
        order: Degree of the predictor's polynomial; ``order + 1`` values are kept.
        last_uses: For each step, the last step that reuses its value; None if none does.
        due: For each step, the newest computed step up to it.
        reusable_from: For each step, the oldest step whose value may be reused: ``due``, or the
            number of steps if the layer is computed.
        is_fitted: Whether values are combined with fitted weights.
        never_reused: Whether no value is ever reused.
        weights: ``weights(steps, at)`` returns the weights of the values computed at ``steps``,
            the newest last, for a reuse at step ``at``.
        fitted_weights: ``fitted_weights(branch, steps, at)`` returns such a list for each part of
            the batch.
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
        """Returns the reused value of a leaf.

        Args:
            values: Kept values of the leaf, the newest last.
            steps: Steps at which they were computed.
            branch: Number of the guidance branch.
            at: Step of the reuse.
            consume: Whether the newest value may be returned without a copy, after its last use.
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
                f"guidance branches, {self.batch_parts} per call, but this call belongs to another "
                "branch; sample with the guidance used for fitting, or fit again"
            )
        sources = planned_sources(self.computed, at, len(chosen[0][at]))
        if not sources or not set(sources) <= set(steps):
            return [self._polynomial_weights(steps, at)] * len(chosen)
        weight_of = [dict(zip(sources, reversed(table[at]), strict=True)) for table in chosen]
        return [[weights.get(step, 0.0) for step in steps] for weights in weight_of]


def _order_of(weights: Sequence[Sequence[float]]) -> int:
    """Returns the degree of a polynomial through as many values, at least 1.

    With degree 0, a single value would be reused without its weight.
    """
    return max(2, *map(len, weights)) - 1
