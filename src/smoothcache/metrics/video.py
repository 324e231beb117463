"""Fidelity of clips to the uncached clips of the same seeds, and temporal consistency.

Functions take clips in [0, 1] of shape [batch, frames, channels, height, width]. Image metrics
apply to each frame; motion metrics compare changes between frames.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import InvalidArgumentError
from .fidelity import psnr, relative_error, ssim


def psnr_per_frame(clips: Tensor, reference: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each frame in dB; infinite for identical frames.

    Args:
        clips: [batch, frames, channels, height, width] in [0, 1].
        reference: Uncached samples of the same shape.

    Returns:
        One value per frame, [batch, frames].

    Raises:
        InvalidArgumentError: If the clips have the wrong shape or values.

    Example:
        >>> import torch
        >>> black = torch.zeros(1, 2, 3, 16, 16)
        >>> psnr_per_frame(black + 0.1, black).round(decimals=2)
        tensor([[20., 20.]])
    """
    return _frame_by_frame(psnr, clips, reference)


def ssim_per_frame(clips: Tensor, reference: Tensor) -> Tensor:
    """Returns the structural similarity of each frame, at most 1.

    Args:
        clips: [batch, frames, channels, height, width] in [0, 1], at least 11 pixels high and wide.
        reference: Uncached samples of the same shape.

    Returns:
        One value per frame, [batch, frames].

    Raises:
        InvalidArgumentError: If the clips have the wrong shape or values.
        MissingPackageError: If torchmetrics is not installed.

    Example:
        >>> import torch
        >>> clip = torch.rand(1, 2, 3, 16, 16)
        >>> ssim_per_frame(clip, clip)
        tensor([[1., 1.]])
    """
    return _frame_by_frame(ssim, clips, reference)


def temporal_consistency(clips: Tensor) -> Tensor:
    """Returns one minus the mean absolute change between frames: 1 for a still clip.

    It needs no reference. Both motion and flicker lower it, so compare only clips of the same
    prompt and seed.

    Args:
        clips: [batch, frames, channels, height, width] in [0, 1], at least 2 frames.

    Returns:
        One value per clip, [batch], in [0, 1].

    Raises:
        InvalidArgumentError: If the clips have the wrong shape or values.

    Source: "temporal flickering" in Huang et al., "VBench: Comprehensive Benchmark Suite for Video
    Generative Models", arXiv 2311.17982, without their selection of still clips.

    Example:
        >>> import torch
        >>> frames = torch.tensor([0.0, 0.5, 0.75]).view(1, 3, 1, 1, 1)
        >>> temporal_consistency(frames)
        tensor([0.6250])
    """
    return 1 - _changes(clips).abs().flatten(1).mean(dim=1)


def motion_error(clips: Tensor, reference: Tensor) -> Tensor:
    """Returns the relative L1 error of the changes between frames; 0 for equal motion.

    Errors that are equal in all frames do not count; flicker that is not in the reference does.

    Args:
        clips: [batch, frames, channels, height, width] in [0, 1], at least 2 frames.
        reference: Uncached samples of the same shape.

    Returns:
        One value per clip, dimensionless, [batch]; infinite if the reference is still and the
        clip is not.

    Raises:
        InvalidArgumentError: If the clips have the wrong shape or values.

    Source: ours; like the temporal terms of Chu et al., "Learning Temporal Coherence via
    Self-Supervision", arXiv 1811.09393, it compares change with change, here of pixels and in the
    norm in which the paper measures layers.

    Example:
        >>> import torch
        >>> reference = torch.tensor([0.0, 0.5, 0.5]).view(1, 3, 1, 1, 1)
        >>> motion_error(reference + 0.25, reference), motion_error(0.5 * reference, reference)
        (tensor([0.]), tensor([0.5000]))
    """
    return relative_error(_changes(clips), _changes(reference))


def _frame_by_frame(
    measure: Callable[[Tensor, Tensor], Tensor], clips: Tensor, reference: Tensor
) -> Tensor:
    for name, values in (("clips", clips), ("reference", reference)):
        _check_clips(name, values)
    if clips.shape != reference.shape:
        raise InvalidArgumentError(
            f"the clips are {list(clips.shape)}, their reference is {list(reference.shape)}; "
            "each clip is compared with the one at its place."
        )
    return measure(clips.flatten(0, 1), reference.flatten(0, 1)).view(clips.shape[:2])


def _changes(clips: Tensor) -> Tensor:
    """Returns the differences between consecutive frames."""
    _check_clips("clips", clips)
    if clips.shape[1] < 2:
        raise InvalidArgumentError("change needs clips of at least 2 frames, got 1.")
    return clips.detach().float().diff(dim=1)


def _check_clips(name: str, clips: object) -> None:
    if not isinstance(clips, Tensor) or not clips.is_floating_point() or clips.ndim != 5:
        got = list(clips.shape) if isinstance(clips, Tensor) else type(clips).__name__
        raise InvalidArgumentError(
            f"{name} must be [batch, frames, channels, height, width] of floating point, got {got}."
        )
    if not clips.numel() or not clips.isfinite().all():
        raise InvalidArgumentError(f"{name} are empty, or contain NaN or infinity.")
