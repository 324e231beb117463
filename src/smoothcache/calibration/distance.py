"""L1 distances between outputs, returned as zero-dimensional tensors without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor


def l1_norm(value: Tensor) -> Tensor:
    """Returns the sum of absolute values, accumulated in at least float32; shape []."""
    if not value.is_floating_point():
        return torch.zeros((), device=value.device)
    dtype = torch.promote_types(value.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(value, 1, dtype=dtype)
    return norm


def l1_distance(a: Tensor, b: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Returns the sum of absolute differences of two tensors of equal shape; shape [].

    ``scratch``, a tensor of the same shape and dtype, is overwritten with the difference to save
    an allocation.
    """
    return l1_norm(torch.sub(a, b, out=scratch)) if a.is_floating_point() else l1_norm(a)


def relative_l1(value: Tensor, reference: Tensor) -> Tensor:
    """Returns ``||value - reference||_1 / ||reference||_1``, dimensionless; shape [].

    Source: arXiv 2411.10510, the error of a reuse.

    Example:
        >>> relative_l1(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0]))
        tensor(0.2000)
    """
    return l1_distance(value, reference) / l1_norm(reference)
