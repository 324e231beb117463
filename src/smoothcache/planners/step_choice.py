"""Chooses the computed steps with the smallest sum of costs by dynamic programming."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError
from .segments import FloatArray, Segments

_RIDGE = 1e-6  # relative to the mean square of the outputs
_MAX_COSTS = 3_000_000  # size of the table of costs, which limits the length of segments


def choose_steps(
    segments: Segments, count: int, *, memory: int = 2, noise: float = _RIDGE
) -> tuple[list[int], float]:
    """Returns the computed steps with the smallest sum of costs, and that sum.

    Args:
        segments: Segments of the trajectories.
        count: Number of computed steps.
        memory: Number of last computed steps that the cost of a segment depends on, 2 or 3.
        noise: Relative noise of computed outputs; larger values keep weights small.

    Raises:
        InvalidArgumentError: If no such choice exists.
    """
    steps = segments.num_steps
    reach = _reach(steps, count, memory)
    costs = _costs(segments, reach, memory, noise)  # [steps, older..., gap - 1]
    states = (steps, *(reach + 1 for _ in range(memory - 1)))
    value = np.full(states, np.inf)
    value[(0,) * memory] = 0.0
    choices = []
    for _ in range(count - 1):
        following, choice = np.full(states, np.inf), np.zeros(states, dtype=np.int16)
        for j in range(steps - 1):
            if not np.isfinite(value[j]).any():
                continue
            total = value[j][..., None] + costs[j]  # the oldest step is the second-to-last axis
            best = total.argmin(axis=-2)
            least = np.take_along_axis(total, best[..., None, :], axis=-2)[..., 0, :]
            gaps = np.arange(1, min(reach, steps - 1 - j) + 1)
            # The new gap comes first in the new state; the previously newest gap comes second.
            following[j + gaps, gaps] = np.moveaxis(least, -1, 0)[gaps - 1]
            choice[j + gaps, gaps] = np.moveaxis(best, -1, 0)[gaps - 1]
        choices.append(choice)
        value = following
    last = np.full(states, np.inf)
    for j in range(max(0, steps - reach), steps):
        last[j] = value[j] + costs[j][..., steps - j - 1]
    at = np.unravel_index(int(last.argmin()), states)
    if not np.isfinite(last[at]):
        raise InvalidArgumentError(f"there is no choice of {count} out of {steps} steps.")
    return _traced(tuple(int(x) for x in at), choices), float(last[at])


def _traced(state: tuple[int, ...], choices: list[npt.NDArray[np.int16]]) -> list[int]:
    """Returns the computed steps that lead to a state (step, gap before it, ...)."""
    chosen = [state[0]]
    for choice in reversed(choices):
        step, gap, *older = state
        state = (step - gap, *older, int(choice[state]))
        chosen.append(state[0])
    return chosen[::-1]


def _reach(steps: int, count: int, memory: int) -> int:
    """Returns the largest gap between computed steps that is considered."""
    most = int((_MAX_COSTS / steps) ** (1 / memory))
    return min(steps, max(most, -(-steps // count)))


def _costs(segments: Segments, reach: int, memory: int, noise: float) -> FloatArray:
    """Returns costs by newest computed step, gaps to older steps (0 for none), and next gap."""
    steps = segments.num_steps
    costs = np.full((steps, *(reach + 1 for _ in range(memory - 1)), reach), np.inf)
    for j in range(steps):
        longest = min(reach, int(segments.ends[j]) - j)
        nexts = np.arange(j + 1, j + longest + 1)
        older, is_usable, is_valid = _older(segments, j, reach, memory)
        at = np.stack([np.full(is_valid.shape, j), *older], axis=-1)  # the newest first
        usable = np.stack([np.ones(is_valid.shape, dtype=bool), *is_usable], axis=-1)
        both = usable[..., :, None] & usable[..., None, :]
        matrix = np.where(both, segments.gram[at[..., :, None], at[..., None, :]], 0.0)
        matrix = matrix + _ridge(matrix, usable, noise) + np.eye(memory) * ~usable[..., None]
        right = segments.products[j][nexts[:, None], at[..., None, :]] * usable[..., None, :]
        solved = np.linalg.solve(matrix[..., None, :, :], right[..., None])[..., 0]
        explained = (right * solved).sum(axis=-1)
        cost = np.maximum(segments.squares[j, nexts] - explained, 0.0)
        costs[j][..., :longest] = np.where(is_valid[..., None], cost, np.inf)
    return costs


def _older(
    segments: Segments, j: int, reach: int, memory: int
) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.bool_]], npt.NDArray[np.bool_]]:
    """Returns the steps before j for all gaps, whether each is usable, and which gaps are valid."""
    gaps = np.arange(reach + 1)
    shape = (reach + 1,) * (memory - 1)
    position, exists = np.full(shape, j), np.ones(shape, dtype=bool)
    older, is_usable = [], []
    for axis in range(memory - 1):
        gap = np.broadcast_to(
            gaps.reshape([-1 if a == axis else 1 for a in range(memory - 1)]), shape
        )
        is_first = position == 0  # nothing is computed before step 0
        exists = exists & ((gap == 0) == is_first) & (position - gap >= 0)
        position = np.maximum(position - gap, 0)
        older.append(position)
        is_usable.append((gap > 0) & (segments.ends[position] == segments.ends[j]))
    return older, is_usable, exists


def _ridge(matrix: FloatArray, usable: npt.NDArray[np.bool_], noise: float) -> FloatArray:
    mean = np.trace(matrix, axis1=-2, axis2=-1) / usable.sum(axis=-1)
    ridge: FloatArray = max(noise, 1e-12) * mean[..., None, None] * np.eye(matrix.shape[-1])
    return ridge
