"""Limits the number of distinct steps, each of which ``torch.compile`` turns into a graph."""

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
    """Computes more layers, so that steps have few patterns and all errors stay below alpha.

    The two patterns whose union adds the least cost are merged repeatedly. Additional computations
    change later gaps, whose errors are checked again: a reuse whose error is not below alpha is
    computed too, at all steps of its pattern. The result is a heuristic, not always optimal.

    Args:
        computed: The plan so far; [units, steps], where a unit is a set of layers with one row.
        errors: errors[k - 1, t] of each unit, as for ``threshold_mask``.
        alpha: Upper bound of the error of every reuse.
        costs: Cost of each unit in a step.
        patterns: Largest number of distinct columns of the result, at least 1.

    Returns:
        A plan that computes at least what the given plan computes; [units, steps].
    """
    columns = [tuple(column) for column in computed.T]
    groups = [[t for t, c in enumerate(columns) if c == one] for one in dict.fromkeys(columns)]
    computed = computed.copy()
    while True:
        while len(groups) > patterns:
            pairs = combinations(range(len(groups)), 2)
            i, j = min(pairs, key=lambda pair: _added(computed, groups, pair, costs))
            merged = groups[i] + groups[j]
            computed[:, merged] = computed[:, merged].any(axis=1, keepdims=True)
            groups = [g for k, g in enumerate(groups) if k not in (i, j)] + [merged]
        exceeding = [
            (u, t) for u in range(len(computed)) for t in _exceeding(computed[u], errors[u], alpha)
        ]
        if not exceeding:
            return computed
        for unit, step in exceeding:
            computed[unit, next(group for group in groups if step in group)] = True


def _added(
    computed: BoolArray,
    groups: Sequence[Sequence[int]],
    pair: tuple[int, int],
    costs: Sequence[float],
) -> float:
    """Returns the cost added by merging two patterns."""
    steps = [*groups[pair[0]], *groups[pair[1]]]
    both = computed[:, steps]
    return float(np.asarray(costs) @ (len(steps) * both.any(axis=1) - both.sum(axis=1)))


def _exceeding(computed: BoolArray, errors: FloatArray, alpha: float) -> list[int]:
    """Returns the steps at which the error of a reuse is not below alpha."""
    last, found = 0, []
    for step, is_computed in enumerate(computed):
        gap = step - last
        if is_computed:
            last = step
        elif gap > len(errors) or not errors[gap - 1, step] < alpha:
            found.append(step)
    return found
