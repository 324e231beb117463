"""How good samples are: beside the uncached ones, and as a set. One family a file."""

from .distribution import class_accuracy, frechet_distance
from .fidelity import psnr, relative_error, ssim

__all__ = ["class_accuracy", "frechet_distance", "psnr", "relative_error", "ssim"]
