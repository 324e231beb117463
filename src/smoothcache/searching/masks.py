"""Which steps to compute: the masks that a search starts from, and the ones next to them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Mask = tuple[bool, ...]
FloatArray = npt.NDArray[np.float64]


def spaced(num_steps: int, count: int, power: float = 1.0) -> Mask:
    """``count`` computed steps from step 0 on, with gaps that grow if the power is above 1.

    >>> "".join(".#"[x] for x in spaced(9, 3))
    '#...#...#'

    Args:
        num_steps: Steps in all.
        count: Computed ones, 1 to num_steps.
        power: Of the position along the steps: 1 is even, 2 quadratic.
    """
    positions = np.linspace(0, 1, count) ** power * (num_steps - 1)
    chosen: list[int] = []
    for i, position in enumerate(positions):
        least = chosen[-1] + 1 if chosen else 0
        most = num_steps - (count - i)  # leaves room for the rest
        chosen.append(min(max(round(float(position)), least), most))
    return tuple(step in set(chosen) for step in range(num_steps))


def every(num_steps: int, interval: int) -> Mask:
    """The steps 0, interval, 2 interval, ..."""
    return tuple(step % interval == 0 for step in range(num_steps))


def every_from_last(num_steps: int, interval: int, count: int) -> Mask:
    """Step 0 and the last step, and every interval-th step before that: ``count`` steps at most.

    >>> "".join(".#"[x] for x in every_from_last(10, 2, 5))
    '#..#.#.#.#'
    """
    ending = range(num_steps - 1, 0, -interval)[: count - 1]
    return tuple(step == 0 or step in ending for step in range(num_steps))


def least_error(errors: FloatArray, weights: FloatArray, count: int) -> Mask:
    """The ``count`` computed steps under which the weighted errors of the reuses sum to the least.

    Args:
        errors: errors[k - 1, t] of reusing at step t what was computed k steps earlier;
            [max_gap, steps]. Beyond max_gap they go on growing as they do on average.
        weights: What an error at each step counts; [steps].
        count: Computed steps, 1 to the number of steps; step 0 is one of them.

    Solved exactly by dynamic programming over (computed steps so far, the last of them).
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
    """[a, b]: the cost of reusing from a + 1 to b - 1 what a computed; [steps, steps + 1]."""
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
    """The masks with one computed step moved by up to two steps, in random order; step 0 stays."""
    computed = [step for step, is_computed in enumerate(mask) if is_computed and step]
    moves = [(step, step + by) for step in computed for by in (-2, -1, 1, 2)]
    rng.shuffle(moves)
    for old, new in moves:
        if 0 < new < len(mask) and not mask[new]:
            yield tuple((x or t == new) and t != old for t, x in enumerate(mask))


def affordable(num_steps: int, share: float, compute: float) -> int:
    """The most computed steps within a budget.

    >>> affordable(50, share=0.9, compute=0.5)
    22

    Args:
        num_steps: Steps in all.
        share: MACs of what is reused, over all MACs of a step.
        compute: The budget, as a fraction of the uncached MACs.
    """
    free = compute - (1 - share)
    return min(num_steps, int(num_steps * free / share + 1e-9)) if share > 0 else 0
