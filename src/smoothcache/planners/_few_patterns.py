"""Few different steps: every set of layers that are computed together is a graph to compile."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..calibration.statistics import FloatArray

BoolArray = NDArray[np.bool_]


def with_few_patterns(
    computed: BoolArray,
    errors: Sequence[FloatArray],
    alpha: float,
    costs: Sequence[float],
    patterns: int,
) -> BoolArray:
    """Computes more, so that the steps follow few patterns and every reuse stays below alpha.

    The two patterns whose union adds the least cost become one, again and again. What is computed
    in addition shortens later gaps, whose errors are looked at again: one that is not below alpha
    is computed too, at all steps of its pattern. The result is good, not always the best.

    Args:
        computed: The plan so far; [units, steps], a unit being layers with one row.
        errors: Of each unit, errors[k - 1, t] as ``threshold_mask`` takes them.
        alpha: What every reuse's error must stay below.
        costs: Cost of each unit in a step.
        patterns: Most different columns of the result, at least 1.

    Returns:
        A plan that computes wherever the given one does. [units, steps]
    """
    columns = [tuple(column) for column in computed.T]
    groups = [[t for t, c in enumerate(columns) if c == own] for own in dict.fromkeys(columns)]
    computed = computed.copy()
    while True:
        while len(groups) > patterns:
            pairs = combinations(range(len(groups)), 2)
            i, j = min(pairs, key=lambda pair: _added(computed, groups, pair, costs))
            merged = groups[i] + groups[j]
            computed[:, merged] = computed[:, merged].any(axis=1, keepdims=True)
            groups = [g for k, g in enumerate(groups) if k not in (i, j)] + [merged]
        broken = [
            (u, t) for u in range(len(computed)) for t in _too_far(computed[u], errors[u], alpha)
        ]
        if not broken:
            return computed
        for unit, step in broken:
            computed[unit, next(group for group in groups if step in group)] = True


def _added(
    computed: BoolArray,
    groups: Sequence[Sequence[int]],
    pair: tuple[int, int],
    costs: Sequence[float],
) -> float:
    """The cost that making one pattern of two adds."""
    steps = [*groups[pair[0]], *groups[pair[1]]]
    both = computed[:, steps]
    return float(np.asarray(costs) @ (len(steps) * both.any(axis=1) - both.sum(axis=1)))


def _too_far(computed: BoolArray, errors: FloatArray, alpha: float) -> list[int]:
    """The steps at which the error of a reuse is not below alpha."""
    last, found = 0, []
    for step, is_computed in enumerate(computed):
        gap = step - last
        if is_computed:
            last = step
        elif gap > len(errors) or not errors[gap - 1, step] < alpha:
            found.append(step)
    return found
