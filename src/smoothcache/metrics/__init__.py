"""How good samples are: beside the uncached ones, and as a set. One family a file."""

from .audio import (
    label_divergence,
    log_mel,
    log_spectral_distance,
    multi_resolution_stft_distance,
    signal_to_noise_ratio,
)
from .distribution import attribute_accuracy, class_accuracy, frechet_distance
from .fidelity import psnr, relative_error, ssim
from .video import motion_error, psnr_per_frame, ssim_per_frame, temporal_consistency

__all__ = [
    "attribute_accuracy",
    "class_accuracy",
    "frechet_distance",
    "label_divergence",
    "log_mel",
    "log_spectral_distance",
    "motion_error",
    "multi_resolution_stft_distance",
    "psnr",
    "psnr_per_frame",
    "relative_error",
    "signal_to_noise_ratio",
    "ssim",
    "ssim_per_frame",
    "temporal_consistency",
]
