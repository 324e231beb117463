"""Weights of reused outputs, fitted to uncached outputs without running the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .segments import FloatArray, Segments

RIDGE = 1e-6  # ridge of the weight fit, relative to the mean square of the outputs
LARGEST_NORM = 12.0  # limit of the L1 norm of the weights of one reuse


def open_loop_weights(
    segments: Segments, computed: Sequence[int], max_lag: int
) -> tuple[tuple[float, ...], ...]:
    """Returns the weights of uncached outputs at every step, the newest first.

    The weights of each step are fitted to its own output; computed steps have none. As least
    squares is linear, their sum also minimises the error of the state at the end of the segment.
    """
    steps = segments.num_steps
    weights: list[tuple[float, ...]] = [()] * steps
    for number, (j, end) in enumerate(zip(computed, [*computed[1:], steps], strict=True)):
        if end > j + 1:
            known = segments.regressors(computed[: number + 1], max_lag)
            found = guarded_weights(segments, known, range(j + 1, end))
            found = _corrected(segments, known, j, end, found)
            weights[j + 1 : end] = [tuple(x) for x in found.tolist()]
    return tuple(weights)


def _corrected(
    segments: Segments, known: Sequence[int], begin: int, end: int, weights: FloatArray
) -> FloatArray:
    """Returns weights that also bring a segment from one converged state to the next."""
    if segments.corrections is None:
        return weights
    used = list(known[: weights.shape[1]])
    responses = segments.table[begin + 1 : end, end]
    size = float(responses @ responses)
    if size == 0:
        return weights
    matrix = segments.gram[np.ix_(used, used)]
    ridge = RIDGE * np.trace(matrix) / len(used) * np.eye(len(used))
    added = np.linalg.lstsq(matrix + ridge, segments.corrections[begin, end, used], rcond=None)[0]
    corrected: FloatArray = weights + (responses / size)[:, None] * added
    return corrected if np.abs(corrected).sum(axis=1).max() <= LARGEST_NORM else weights


def guarded_weights(segments: Segments, known: Sequence[int], reused: range) -> FloatArray:
    """Returns least-squares weights [reused, lags], with fewer lags if they would be too large."""
    for lags in range(len(known), 0, -1):
        used = list(known[:lags])
        matrix = segments.gram[np.ix_(used, used)]
        ridge = RIDGE * np.trace(matrix) / lags
        right = segments.gram[np.ix_(used, list(reused))]
        found: FloatArray = np.linalg.lstsq(matrix + ridge * np.eye(lags), right, rcond=None)[0].T
        if np.abs(found).sum(axis=1).max() <= LARGEST_NORM:
            return found
    return np.ones((len(reused), 1))  # the predictor "hold"
