"""Masks: spacings, dynamic programming against brute force, and neighbours."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import support.made_up  # noqa: F401  hypothesis without deadlines
from hypothesis import given
from hypothesis import strategies as st

import smoothcache as sc
from smoothcache.searching.masks import (
    affordable,
    every,
    every_from_last,
    least_error,
    neighbours,
    spaced,
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Any, Any, int]:
    """Errors [max_gap, steps] with NaN where nothing is known, weights, and a count."""
    num_steps, max_gap = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    errors = rng.integers(0, 6, (max_gap, num_steps)) / 4
    for gap in range(1, max_gap + 1):
        errors[gap - 1, :gap] = np.nan
    return errors, rng.integers(0, 4, num_steps) / 2, draw(st.integers(1, num_steps))


def weighted_error(mask: tuple[bool, ...], errors: Any, weights: Any) -> float:
    total, last = 0.0, 0
    for step, is_computed in enumerate(mask):
        if is_computed:
            last = step
            continue
        gap = step - last
        known = errors[min(gap, len(errors)) - 1, step]
        total += weights[step] * known * max(1.0, gap / len(errors))
    return total


@given(tables())
def test_least_error_is_the_least(table: tuple[Any, Any, int]) -> None:
    errors, weights, count = table
    num_steps = len(weights)
    masks = [
        tuple(step in {0, *others} for step in range(num_steps))
        for others in combinations(range(1, num_steps), count - 1)
    ]
    mask = least_error(errors, weights, count)
    assert mask in masks
    least = min(weighted_error(x, errors, weights) for x in masks)
    assert weighted_error(mask, errors, weights) == pytest.approx(least)


@given(num_steps=st.integers(1, 60), power=st.floats(0.1, 6), data=st.data())
def test_spaced_computes_as_many_steps_as_told(
    num_steps: int, power: float, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_steps))
    mask = spaced(num_steps, count, power)
    assert len(mask) == num_steps and sum(mask) == count and mask[0]
    assert count == 1 or mask[-1]


@given(num_steps=st.integers(2, 60), data=st.data())
def test_spaced_is_even(num_steps: int, data: st.DataObject) -> None:
    mask = spaced(num_steps, data.draw(st.integers(2, num_steps)))
    gaps = np.diff([step for step, is_computed in enumerate(mask) if is_computed])
    assert max(gaps) - min(gaps) <= 1


@given(st.integers(1, 40), st.integers(1, 50))
def test_every_so_many_steps(num_steps: int, interval: int) -> None:
    assert every(num_steps, interval) == sc.Row.uniform(num_steps, interval).computed


@given(st.integers(2, 60), st.integers(1, 9), st.data())
def test_from_the_last_the_gaps_are_even_but_the_first(
    num_steps: int, interval: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_steps))
    computed = np.flatnonzero(every_from_last(num_steps, interval, count))
    assert computed[0] == 0 and len(computed) <= count
    assert set(np.diff(computed)[1:]) <= {interval}
    assert count == 1 or computed[-1] == num_steps - 1


@given(st.lists(st.booleans(), max_size=14), st.integers(0, 2**32))
def test_neighbours_are_one_move_away(later: list[bool], seed: int) -> None:
    mask = (True, *later)
    found = list(neighbours(mask, random.Random(seed)))
    expected = set()
    for old, new in ((old, old + by) for old in range(1, len(mask)) for by in (-2, -1, 1, 2)):
        if mask[old] and 0 < new < len(mask) and not mask[new]:
            moved = list(mask)
            moved[old], moved[new] = False, True
            expected.add(tuple(moved))
    assert len(found) == len(set(found)) and set(found) == expected
    assert found == list(neighbours(mask, random.Random(seed)))


@given(st.integers(1, 60), st.floats(0.01, 1), st.floats(0.01, 1))
def test_as_many_steps_as_a_budget_allows(num_steps: int, share: float, compute: float) -> None:
    count = affordable(num_steps, share, compute)

    def cost(computed: int) -> float:
        return 1 - share + share * computed / num_steps

    assert count == num_steps or cost(count + 1) > compute - 1e-6
    assert count < 1 or cost(count) <= compute + 1e-6
    assert count <= num_steps
