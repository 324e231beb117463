"""Tells whether two tensors hold the same numbers, or have to do with each other."""

from __future__ import annotations

import torch
from torch import Tensor

Digest = Tensor | int
_REDUCED = 2**22  # elements of a tensor on an accelerator that are looked at, at most
_SKETCHED = 2**16  # elements of a sketch, at most
_ENOUGH = 2**10  # elements of which a correlation says something
_UNRELATED = 0.25


def version(tensor: Tensor | None) -> int | None:
    """Counts writes into a tensor; None in inference mode, where nothing does."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def digest(tensor: Tensor) -> Digest | None:
    """A number or a few over a tensor's content, where it lies; None where there is nothing."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return None
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = values.detach().reshape(-1).contiguous()
    if values.device.type == "cpu":
        if values.numel() == 1:  # its stride is 0 if it was expanded
            values = values.reshape(())[None]
        return hash(values.view(torch.uint8).numpy().tobytes())
    values = values[:: values.numel() // _REDUCED + 1]
    values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    values = values.nan_to_num()
    ramp = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype)
    return torch.stack([values.sum(), values.square().sum(), values @ ramp / max(1, len(values))])


def are_equal(a: Digest | None, b: Digest | None) -> bool:
    """Whether two digests are of the same content; on an accelerator, the host waits for it."""
    if a is None or b is None:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return bool((a == b).all())
    return bool(a == b)


def sketch(tensor: Tensor, least: int = _ENOUGH, most: int = _SKETCHED) -> Tensor | None:
    """Some of a tensor's elements, for ``correlation``; None if there are too few."""
    if tensor.device.type == "meta" or not tensor.is_floating_point() or tensor.numel() < least:
        return None
    values = tensor.detach().reshape(-1)
    return values[:: values.numel() // most + 1].to(torch.float32, copy=True)


def correlation(a: Tensor | None, b: Tensor | None) -> float | None:
    """Of two sketches of equal size; else None. On an accelerator, the host waits for it."""
    if a is None or b is None or a.shape != b.shape or a.device != b.device:
        return None
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def are_unrelated(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether sketches of equal size do not correlate; on an accelerator, the host waits for it."""
    value = correlation(a, b)
    return value is not None and abs(value) < _UNRELATED
