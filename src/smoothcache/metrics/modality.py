"""Modalities of samples (images, clips or sounds) and their comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import InvalidArgumentError
from ..optional import optional_module
from .audio import (
    WINDOW,
    log_spectral_distance,
    multi_resolution_stft_distance,
    signal_to_noise_ratio,
)
from .fidelity import SSIM_WINDOW, psnr, relative_error, ssim
from .video import motion_error, psnr_per_frame, ssim_per_frame, temporal_consistency

Measure = Callable[[Tensor, Tensor], Tensor]
MOST_SOUND_CHANNELS = 32  # more channels are an image without a batch dimension


@dataclass(frozen=True)
class Modality:
    """One kind of sample.

    Attributes:
        noun: Plural noun for messages.
        wanted: Required shape and values, for messages.
        fits: Whether a shape is a batch of this modality.
        bounds: Smallest and largest value; None for any finite number.
        closeness: Field of a row with the main measure of closeness to the reference.
        decibels: The main measure, in dB; larger is closer.
        title: Name of the main measure in a sentence.
        distances: Further measures by field of a row; they return None for too small samples.
    """

    noun: str
    wanted: str
    fits: Callable[[tuple[int, ...]], bool]
    bounds: tuple[float, float] | None
    closeness: str
    decibels: Measure
    title: str
    distances: Mapping[str, Callable[[Tensor, Tensor], Tensor | None]]

    def check_packages(self) -> None:
        """Refuses early if a package required by a measure is missing.

        Raises:
            MissingPackageError: If torchmetrics is needed for the SSIM, and is not installed.
        """
        if "ssim" in self.distances:
            optional_module("torchmetrics.functional.image", extra="metrics")

    def measured(self, results: Tensor, reference: Tensor) -> dict[str, float | None]:
        """Returns the means over the batch, by field of a row."""
        measures = {self.closeness: self.decibels, **self.distances}
        values = {name: measure(results, reference) for name, measure in measures.items()}
        return {name: None if x is None else float(x.mean()) for name, x in values.items()}


def modality_of(results: object, call: str) -> Modality:
    """Returns the modality of the results of ``call``.

    Raises:
        InvalidArgumentError: If the results have no known modality.
    """
    if isinstance(results, Tensor) and results.is_floating_point():
        for modality in MODALITIES:
            if modality.fits(tuple(results.shape)):
                return modality
    got = (
        f"{results.dtype} of shape {list(results.shape)}"
        if isinstance(results, Tensor)
        else type(results).__name__
    )
    wanted = ", or ".join(f"{modality.noun} {modality.wanted}" for modality in MODALITIES)
    raise InvalidArgumentError(f"{call} must return {wanted}; got {got}.")


def _ssim_if_large(images: Tensor, reference: Tensor) -> Tensor | None:
    return ssim(images, reference) if min(images.shape[-2:]) >= SSIM_WINDOW else None


def _frame_ssim_if_large(clips: Tensor, reference: Tensor) -> Tensor | None:
    return ssim_per_frame(clips, reference) if min(clips.shape[-2:]) >= SSIM_WINDOW else None


def _motion_error_if_moving(clips: Tensor, reference: Tensor) -> Tensor | None:
    return motion_error(clips, reference) if clips.shape[1] > 1 else None


def _consistency_if_moving(clips: Tensor, reference: Tensor) -> Tensor | None:
    return temporal_consistency(clips) if clips.shape[1] > 1 else None


IMAGES = Modality(
    noun="images",
    wanted="[batch, channels, height, width] with values in [0, 1]",
    fits=lambda shape: len(shape) == 4,
    bounds=(0.0, 1.0),
    closeness="psnr",
    decibels=psnr,
    title="PSNR",
    distances={"ssim": _ssim_if_large, "relative_error": relative_error},
)
CLIPS = Modality(
    noun="clips",
    wanted="[batch, frames, channels, height, width] with values in [0, 1]",
    fits=lambda shape: len(shape) == 5,
    bounds=(0.0, 1.0),
    closeness="psnr",
    decibels=lambda clips, reference: psnr_per_frame(clips, reference).mean(dim=1),
    title="PSNR",
    distances={
        "ssim": _frame_ssim_if_large,
        "relative_error": relative_error,
        "motion_error": _motion_error_if_moving,
        "temporal_consistency": _consistency_if_moving,
    },
)
SOUNDS = Modality(
    noun="sounds",
    wanted=f"[batch, channels, samples] of at least {WINDOW} samples",
    fits=lambda shape: len(shape) == 3 and shape[1] <= MOST_SOUND_CHANNELS and shape[2] >= WINDOW,
    bounds=None,
    closeness="snr",
    decibels=signal_to_noise_ratio,
    title="signal-to-noise ratio",
    distances={
        "log_spectral_distance": log_spectral_distance,
        "stft_distance": multi_resolution_stft_distance,
        "relative_error": relative_error,
    },
)
MODALITIES = (IMAGES, CLIPS, SOUNDS)
