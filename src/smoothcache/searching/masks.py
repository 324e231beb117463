"""Masks of computed steps: evenly and unevenly spaced ones, and the neighbours of a mask."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Mask = tuple[bool, ...]
FloatArray = npt.NDArray[np.float64]


def spaced(num_steps: int, count: int, power: float = 1.0) -> Mask:
    """``count`` computed steps, spaced evenly or by a power law, with step 0 among them.

    >>> "".join(".#"[x] for x in spaced(9, 3))
    '#...#...#'

    Args:
        num_steps: Number of steps.
        count: Number of computed steps, 1 to num_steps.
        power: Exponent of the positions; 1 is even, and above 1 the gaps grow along the steps.
    """
    positions = np.linspace(0, 1, count) ** power * (num_steps - 1)
    chosen: list[int] = []
    for i, position in enumerate(positions):
        least = chosen[-1] + 1 if chosen else 0
        most = num_steps - (count - i)  # leaves room for the remaining ones
        chosen.append(min(max(round(float(position)), least), most))
    return tuple(step in set(chosen) for step in range(num_steps))


def every(num_steps: int, interval: int) -> Mask:
    """The steps 0, interval, 2 interval, ..."""
    return tuple(step % interval == 0 for step in range(num_steps))


def every_from_last(num_steps: int, interval: int, count: int) -> Mask:
    """Step 0, the last step, and every interval-th step before it; at most ``count`` steps.

    >>> "".join(".#"[x] for x in every_from_last(10, 2, 5))
    '#..#.#.#.#'
    """
    ending = range(num_steps - 1, 0, -interval)[: count - 1]
    return tuple(step == 0 or step in ending for step in range(num_steps))


def least_error(errors: FloatArray, weights: FloatArray, count: int) -> Mask:
    """The mask of ``count`` computed steps with the smallest sum of weighted reuse errors.

    It is found exactly, by dynamic programming over the number of computed steps so far and the
    last of them.

    Args:
        errors: errors[k - 1, t] is the error of reusing at step t what was computed k steps
            earlier; [max_gap, steps]. Beyond max_gap the error grows in proportion to the gap.
        weights: Weight of an error at each step; [steps].
        count: Number of computed steps, 1 to the number of steps; step 0 is one of them.
    """
    num_steps = errors.shape[1]
    segments = _segment_costs(errors, weights)
    best = np.full((count + 1, num_steps), np.inf)
    came_from = np.zeros((count + 1, num_steps), dtype=int)
    best[1, 0] = 0.0
    for used, last in itertools.product(range(2, count + 1), range(1, num_steps)):
        totals = best[used - 1, :last] + segments[:last, last]
        came_from[used, last] = int(np.argmin(totals))
        best[used, last] = totals[came_from[used, last]]
    last = int(np.argmin(best[count] + segments[:, num_steps]))
    chosen = [last]
    for used in range(count, 1, -1):
        last = int(came_from[used, last])
        chosen.append(last)
    return tuple(step in set(chosen) for step in range(num_steps))


def _segment_costs(errors: FloatArray, weights: FloatArray) -> FloatArray:
    """Costs of gaps; [steps, steps + 1].

    Entry [a, b] is the weighted error of reusing the output of step a at the steps a + 1 to b - 1.
    """
    max_gap, num_steps = errors.shape
    segments = np.full((num_steps, num_steps + 1), np.inf)
    for start in range(num_steps):
        segments[start, start + 1] = total = 0.0
        for step in range(start + 1, num_steps):
            gap = step - start
            known = errors[min(gap, max_gap) - 1, step]
            known = 0.0 if np.isnan(known) else known
            total += weights[step] * known * max(1.0, gap / max_gap)
            segments[start, step + 1] = total
    return segments


def neighbours(mask: Mask, rng: random.Random) -> Iterator[Mask]:
    """The masks with one computed step moved by one or two steps, in random order.

    Step 0 is never moved.
    """
    computed = [step for step, is_computed in enumerate(mask) if is_computed and step]
    moves = [(step, step + by) for step in computed for by in (-2, -1, 1, 2)]
    rng.shuffle(moves)
    for old, new in moves:
        if 0 < new < len(mask) and not mask[new]:
            yield tuple((x or t == new) and t != old for t, x in enumerate(mask))


def affordable(num_steps: int, share: float, compute: float) -> int:
    """The largest number of computed steps within a budget.

    >>> affordable(50, share=0.9, compute=0.5)
    22

    Args:
        num_steps: Number of steps.
        share: MACs of the layers that can be reused, as a fraction of all MACs of a step.
        compute: The budget, as a fraction of the uncached MACs.
    """
    free = compute - (1 - share)
    return min(num_steps, int(num_steps * free / share + 1e-9)) if share > 0 else 0
