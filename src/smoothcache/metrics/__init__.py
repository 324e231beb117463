"""How good samples are: beside the uncached ones, and as a set. One family a file."""

from .audio import (
    label_divergence,
    log_mel,
    log_spectral_distance,
    multi_resolution_stft_distance,
    signal_to_noise_ratio,
)
from .distribution import class_accuracy, frechet_distance
from .fidelity import psnr, relative_error, ssim

__all__ = [
    "class_accuracy",
    "frechet_distance",
    "label_divergence",
    "log_mel",
    "log_spectral_distance",
    "multi_resolution_stft_distance",
    "psnr",
    "relative_error",
    "signal_to_noise_ratio",
    "ssim",
]
