"""How far a layer's output has moved: tensors in, zero-dimensional tensors out, nothing read."""

from __future__ import annotations

import torch
from torch import Tensor


def l1_norm(value: Tensor) -> Tensor:
    """Sum of absolute values, accumulated in float32 or better; shape []."""
    if not value.is_floating_point():
        return torch.zeros((), device=value.device)
    dtype = torch.promote_types(value.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(value, 1, dtype=dtype)
    return norm


def l1_distance(a: Tensor, b: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Sum of absolute differences of two tensors of one shape; shape [].

    ``scratch``, of the same form, is overwritten and saves fresh memory for the difference.
    """
    return l1_norm(torch.sub(a, b, out=scratch)) if a.is_floating_point() else l1_norm(a)


def relative_l1(value: Tensor, reference: Tensor) -> Tensor:
    """``||value - reference||_1 / ||reference||_1``, dimensionless; shape [].

    Source: arXiv 2411.10510, the error of a reuse.

    Example:
        >>> relative_l1(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0]))
        tensor(0.2000)
    """
    return l1_distance(value, reference) / l1_norm(reference)
