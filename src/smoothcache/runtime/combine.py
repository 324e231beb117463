"""Weighted sums of kept values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .buffers import refuse_indivisible

_ROUNDING = 1e-9  # tolerance of weights that sum to 1


def combined(values: Sequence[Any], weights: list[float], *, consume: bool) -> Any:
    """Returns the weighted sum of a leaf's kept values, which the caller may write into.

    Args:
        values: The leaf at each kept step, the newest last; only floating-point tensors are summed.
        weights: One weight per value.
        consume: Whether the newest value may be returned without a copy, after its last use.
    """
    newest = values[-1]
    if not isinstance(newest, Tensor) or not newest.is_floating_point():
        return one_of(newest, consume=consume)
    if len(values) == 1:
        return one_of(newest, consume=consume) if weights[0] == 1 else newest * weights[0]
    # Differences are weighted, so that equal values with weights summing to 1 give them exactly.
    total: Tensor = torch.lerp(newest, values[0], weights[0])
    for value, weight in zip(values[1:-1], weights[1:-1], strict=True):
        total.add_(value - newest, alpha=weight)
    excess = sum(weights) - 1
    return total.add_(newest, alpha=excess) if abs(excess) > _ROUNDING else total


def combined_by_part(
    values: Sequence[Any], weights: Sequence[list[float]], *, consume: bool
) -> Any:
    """Returns the weighted sum with separate weights for each of the equal parts of the batch."""
    newest = values[-1]
    is_whole = not isinstance(newest, Tensor) or not newest.is_floating_point() or not newest.ndim
    if len(weights) == 1 or is_whole:
        return combined(values, weights[0], consume=consume)
    refuse_indivisible(len(newest), len(weights))
    parts = zip(*[value.chunk(len(weights)) for value in values], strict=True)
    pairs = zip(parts, weights, strict=True)
    return torch.cat([combined(part, given, consume=False) for part, given in pairs])


def one_of(value: Any, *, consume: bool) -> Any:
    """Returns a kept leaf that the caller may write into: a copy, unless this is its last use."""
    if not isinstance(value, Tensor):
        return value
    if consume and (not value.is_inference() or torch.is_inference_mode_enabled()):
        return value
    return value.clone()
