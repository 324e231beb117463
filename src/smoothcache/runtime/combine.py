"""Weighted sums of kept values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .buffers import refuse_indivisible

_ROUNDING = 1e-9  # within which weights sum to 1


def combined(values: Sequence[Any], weights: list[float], *, consume: bool) -> Any:
    """The weighted sum of a leaf's kept values, which the caller may write into.

    Args:
        values: The leaf at each kept step, the newest last; only tensors of floats are summed.
        weights: One for each value.
        consume: Whether the newest value may be returned itself, because it is not used again.
    """
    newest = values[-1]
    if not isinstance(newest, Tensor) or not newest.is_floating_point():
        return one_of(newest, consume=consume)
    if len(values) == 1:
        return one_of(newest, consume=consume) if weights[0] == 1 else newest * weights[0]
    # Where weights sum to 1, only differences need them: equal values give that value exactly.
    total: Tensor = torch.lerp(newest, values[0], weights[0])
    for value, weight in zip(values[1:-1], weights[1:-1], strict=True):
        total.add_(value - newest, alpha=weight)
    excess = sum(weights) - 1
    return total.add_(newest, alpha=excess) if abs(excess) > _ROUNDING else total


def combined_by_part(
    values: Sequence[Any], weights: Sequence[list[float]], *, consume: bool
) -> Any:
    """The same with weights of its own for each of equal parts of the batch."""
    newest = values[-1]
    is_whole = not isinstance(newest, Tensor) or not newest.is_floating_point() or not newest.ndim
    if len(weights) == 1 or is_whole:
        return combined(values, weights[0], consume=consume)
    refuse_indivisible(len(newest), len(weights))
    parts = zip(*[value.chunk(len(weights)) for value in values], strict=True)
    pairs = zip(parts, weights, strict=True)
    return torch.cat([combined(part, given, consume=False) for part, given in pairs])


def one_of(value: Any, *, consume: bool) -> Any:
    """A kept leaf that the caller may write into: a copy, unless it is not used again."""
    if not isinstance(value, Tensor):
        return value
    if consume and (not value.is_inference() or torch.is_inference_mode_enabled()):
        return value
    return value.clone()
