"""How good samples are: beside the uncached ones, and as a set. One family a file."""

from .distribution import attribute_accuracy, class_accuracy, frechet_distance
from .fidelity import psnr, relative_error, ssim
from .video import motion_error, psnr_per_frame, ssim_per_frame, temporal_consistency

__all__ = [
    "attribute_accuracy",
    "class_accuracy",
    "frechet_distance",
    "motion_error",
    "psnr",
    "psnr_per_frame",
    "relative_error",
    "ssim",
    "ssim_per_frame",
    "temporal_consistency",
]
