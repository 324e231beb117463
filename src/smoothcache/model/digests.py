"""Fingerprints of tensors, to compare contents and correlations without keeping tensors."""

from __future__ import annotations

import torch
from torch import Tensor

Digest = Tensor | int
_MAX_DIGEST_ELEMENTS = 2**22  # per tensor on an accelerator
_MAX_SKETCH_ELEMENTS = 2**16
_MIN_SKETCH_ELEMENTS = 2**10  # for a meaningful correlation
_MIN_CORRELATION = 0.25  # of related sketches


def version(tensor: Tensor | None) -> int | None:
    """Returns a tensor's version counter of in-place writes; None in inference mode."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def digest(tensor: Tensor) -> Digest | None:
    """Returns a digest of a tensor's content, on its device; None if it has no content."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return None
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = values.detach().reshape(-1).contiguous()
    if values.device.type == "cpu":
        if values.numel() == 1:  # an expanded tensor has stride 0
            values = values.reshape(())[None]
        return hash(values.view(torch.uint8).numpy().tobytes())
    values = values[:: values.numel() // _MAX_DIGEST_ELEMENTS + 1]
    values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    values = values.nan_to_num()
    ramp = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype)
    return torch.stack([values.sum(), values.square().sum(), values @ ramp / max(1, len(values))])


def are_equal(a: Digest | None, b: Digest | None) -> bool:
    """Whether two digests are of equal content; costs a host sync on an accelerator."""
    if a is None or b is None:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return bool((a == b).all())
    return bool(a == b)


def sketch(
    tensor: Tensor, least: int = _MIN_SKETCH_ELEMENTS, most: int = _MAX_SKETCH_ELEMENTS
) -> Tensor | None:
    """Returns some of a tensor's elements, for ``correlation``; None if there are too few."""
    if tensor.device.type == "meta" or not tensor.is_floating_point() or tensor.numel() < least:
        return None
    values = tensor.detach().reshape(-1)
    return values[:: values.numel() // most + 1].to(torch.float32, copy=True)


def correlation(a: Tensor | None, b: Tensor | None) -> float | None:
    """Returns the correlation of two sketches of equal size, otherwise None; costs a host sync."""
    if a is None or b is None or a.shape != b.shape or a.device != b.device:
        return None
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def are_unrelated(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether sketches of equal size are uncorrelated; costs a host sync."""
    value = correlation(a, b)
    return value is not None and abs(value) < _MIN_CORRELATION
