"""How close clips are to the uncached ones of the same seeds, and how steady they are.

All functions take clips in [0, 1] of shape [batch, frames, channels, height, width]. Fidelity is
that of images, frame by frame; what only a clip has is change from one frame to the next.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import InvalidArgumentError
from .fidelity import psnr, relative_error, ssim


def psnr_per_frame(clips: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB; infinite where it equals its reference.

    Args:
        clips: [batch, frames, channels, height, width] in [0, 1].
        reference: What they should be; the same shape.

    Returns:
        One value for each frame, [batch, frames].

    Raises:
        InvalidArgumentError: If the clips are not as described.

    Example:
        >>> import torch
        >>> black = torch.zeros(1, 2, 3, 16, 16)
        >>> psnr_per_frame(black + 0.1, black).round(decimals=2)
        tensor([[20., 20.]])
    """
    return _frame_by_frame(psnr, clips, reference)


def ssim_per_frame(clips: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each frame, at most 1.

    Args:
        clips: [batch, frames, channels, height, width] in [0, 1], at least 11 pixels high and wide.
        reference: What they should be; the same shape.

    Returns:
        One value for each frame, [batch, frames].

    Raises:
        InvalidArgumentError: If the clips are not as described.
        MissingPackageError: If torchmetrics is not installed.

    Example:
        >>> import torch
        >>> clip = torch.rand(1, 2, 3, 16, 16)
        >>> ssim_per_frame(clip, clip)
        tensor([[1., 1.]])
    """
    return _frame_by_frame(ssim, clips, reference)


def temporal_consistency(clips: Tensor) -> Tensor:
    """One minus the mean absolute change from a frame to the next: 1 if nothing ever changes.

    It needs no reference. Motion lowers it as flicker does, so that only clips of the same
    content can be compared: those of one prompt and seed.

    Args:
        clips: [batch, frames, channels, height, width] in [0, 1], at least 2 frames.

    Returns:
        One value for each clip, [batch], in [0, 1].

    Raises:
        InvalidArgumentError: If the clips are not as described.

    Source: "temporal flickering" in Huang et al., "VBench: Comprehensive Benchmark Suite for Video
    Generative Models", arXiv 2311.17982, without their choice of clips that should be still.

    Example:
        >>> import torch
        >>> frames = torch.tensor([0.0, 0.5, 0.75]).view(1, 3, 1, 1, 1)
        >>> temporal_consistency(frames)
        tensor([0.6250])
    """
    return 1 - _changes(clips).abs().flatten(1).mean(dim=1)


def motion_error(clips: Tensor, reference: Tensor) -> Tensor:
    """Relative L1 error of the changes between frames; 0 if everything moves as in the reference.

    What is wrong alike in all frames does not count, and flicker that the reference has not does.

    Args:
        clips: [batch, frames, channels, height, width] in [0, 1], at least 2 frames.
        reference: What they should be; the same shape.

    Returns:
        One value for each clip, dimensionless, [batch]; infinite where the reference stands still
        and the clip does not.

    Raises:
        InvalidArgumentError: If the clips are not as described.

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
    """Each frame but the first, minus the one before it."""
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
