"""Fidelity of samples to the uncached samples of the same seeds.

Functions take images in [0, 1] of shape [batch, channels, height, width], compare them pairwise
with a reference, and return one value per image. The frames of a video are a batch.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..optional import optional_module

SSIM_WINDOW = 11
NORMS = {"l1": 1, "l2": 2}


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio in dB; infinite for identical images.

    Args:
        images: [batch, channels, height, width] in [0, 1].
        reference: Uncached samples of the same shape.

    Returns:
        One value per image, [batch]. The mean is infinite if any value is.

    Raises:
        InvalidArgumentError: If the images have the wrong shape or values.

    Example:
        >>> black = torch.zeros(1, 3, 16, 16)
        >>> psnr(black + 0.1, black).round(decimals=2)
        tensor([20.])
    """
    images, reference = _check_pair(images, reference)
    return -10 * (images - reference).square().flatten(1).mean(dim=1).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the structural similarity, at most 1, with a Gaussian window of 11 x 11 pixels.

    Args:
        images: [batch, channels, height, width] in [0, 1], at least 11 pixels high and wide.
        reference: Uncached samples of the same shape.

    Returns:
        One value per image, [batch], averaged over channels and pixels.

    Raises:
        InvalidArgumentError: If the images have the wrong shape or values.
        MissingPackageError: If torchmetrics is not installed.

    Source: Wang et al., "Image quality assessment: from error visibility to structural
    similarity", 2004.

    Example:
        >>> image = torch.rand(1, 3, 16, 16)
        >>> ssim(image, image)
        tensor([1.])
    """
    images, reference = _check_pair(images, reference)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise InvalidArgumentError(
            f"SSIM needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, "
            f"got {images.shape[-2]} x {images.shape[-1]}."
        )
    functional = optional_module("torchmetrics.functional.image", extra="metrics")
    values = functional.structural_similarity_index_measure(
        images, reference, data_range=1.0, reduction="none"
    )
    return cast(Tensor, values)


def relative_error(
    samples: Tensor, reference: Tensor, *, norm: Literal["l1", "l2"] = "l1"
) -> Tensor:
    """Returns the norm of the difference over the norm of the reference; 0 if equal.

    Args:
        samples: [batch, ...] of any range: images, latents, waveforms.
        reference: Uncached samples of the same shape.
        norm: "l1", as the paper measures layers, or "l2".

    Returns:
        One value per sample, dimensionless, [batch]; infinite where the reference is all
        zeros and the sample is not.

    Raises:
        InvalidArgumentError: If shapes differ, a value is not finite, or the norm is unknown.

    Example:
        >>> relative_error(torch.tensor([[3.0, 5.0]]), torch.tensor([[4.0, 4.0]]))
        tensor([0.2500])
    """
    if norm not in NORMS:
        raise InvalidArgumentError(f"norm must be 'l1' or 'l2', got {norm!r}.")
    samples, reference = _check_same(samples, reference)
    size = torch.linalg.vector_norm(reference.flatten(1), ord=NORMS[norm], dim=1)
    difference = torch.linalg.vector_norm((samples - reference).flatten(1), ord=NORMS[norm], dim=1)
    return torch.where(difference == 0, torch.zeros_like(difference), difference / size)


def _check_pair(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both as float32, after checking that they are images of one shape in [0, 1]."""
    images, reference = _check_same(images, reference)
    if images.ndim != 4:
        raise InvalidArgumentError(
            f"images must be [batch, channels, height, width], got {_shape(images)}."
        )
    for name, values in (("images", images), ("reference", reference)):
        low, high = values.min().item(), values.max().item()
        if low < 0 or high > 1:
            raise InvalidArgumentError(
                f"{name} must be in [0, 1], got values from {low:.3g} to {high:.3g}. "
                "Images in [-1, 1] become so by (images + 1) / 2, followed by clamp(0, 1)."
            )
    return images, reference


def _check_same(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both as float32 on one device, after checking that they can be compared."""
    for name, values in (("samples", samples), ("reference", reference)):
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise InvalidArgumentError(f"{name} must be a tensor of floating point, got {got}.")
    if samples.shape != reference.shape:
        raise InvalidArgumentError(
            f"the samples are {_shape(samples)}, their reference is {_shape(reference)}; "
            "each sample is compared with the one at its place."
        )
    if samples.ndim < 2 or samples.numel() == 0:
        raise InvalidArgumentError(f"expected samples as [batch, ...], got {_shape(samples)}.")
    samples, reference = samples.detach().float(), reference.detach().to(samples.device).float()
    for name, values in (("samples", samples), ("reference", reference)):
        if not values.isfinite().all():
            raise InvalidArgumentError(f"{name} contain NaN or infinity.")
    return samples, reference


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
