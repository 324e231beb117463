"""Parametrisation over several axes without their full product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(names: str, *axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test so that every two values of two axes meet in some case.

    A fault that depends on one value, or on two of different axes, is met as surely as in the full
    product, in as few cases as the two longest axes need.

    Args:
        names: Of the arguments, separated by commas.
        axes: The values of each argument.
    """
    return pytest.mark.parametrize(names, covering(*axes), ids=_name_of)


def covering(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases in which every value of an axis meets every value of every other axis.

    >>> axes = ["abcd", [1, 2, 3], "xyz", [True, False]]
    >>> cases = covering(*axes)
    >>> len(cases), len(list(product(*axes)))
    (13, 72)
    >>> for i, j in combinations(range(4), 2):
    ...     assert {(case[i], case[j]) for case in cases} == set(product(axes[i], axes[j]))
    """
    values = [list(axis) for axis in axes]
    if len(values) == 1:
        return [(value,) for value in values[0]]
    missing = {
        (i, a, j, b)
        for i, j in combinations(range(len(values)), 2)
        for a, b in product(range(len(values[i])), range(len(values[j])))
    }
    used: Counter[tuple[int, int]] = Counter()
    cases = []
    while missing:
        i, a, j, b = min(missing)
        case = {i: a, j: b}
        for axis in (axis for axis in range(len(values)) if axis not in case):
            case[axis] = max(
                range(len(values[axis])),
                key=lambda at: (
                    sum(_pair(axis, at, *other) in missing for other in case.items()),
                    -used[axis, at],
                    -at,
                ),
            )
        used.update(case.items())
        missing -= {_pair(*x, *y) for x, y in combinations(case.items(), 2)}
        cases.append(tuple(values[axis][case[axis]] for axis in range(len(values))))
    return cases


def _pair(i: int, a: int, j: int, b: int) -> tuple[int, int, int, int]:
    return (i, a, j, b) if i < j else (j, b, i, a)


def _name_of(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)
