"""Quality metrics: fidelity to uncached samples, and quality of sets. One family per file."""

from .adm import adm_evaluation
from .audio import (
    label_divergence,
    log_mel,
    log_spectral_distance,
    multi_resolution_stft_distance,
    signal_to_noise_ratio,
)
from .clap import ClapEncoder, clap_score
from .clip import ClipEncoder, clip_score, cmmd, pick_score
from .dinov2 import DinoFeatures
from .distribution import attribute_accuracy, class_accuracy, frechet_distance
from .external import (
    ExternalToolError,
    preference_score,
    vbench,
    vbench_name,
    vbench_total,
)
from .features import (
    FeatureExtractor,
    Features,
    extract,
    extract_batches,
    image_statistics,
)
from .fidelity import psnr, relative_error, ssim
from .frechet import (
    fd_dinov2,
    fid,
    frechet_from_statistics,
    frechet_infinity,
    gaussian_distance,
    sfid,
)
from .images import read_images
from .inception import InceptionFeatures
from .inception_score import InceptionScore, inception_score
from .kid import kid
from .lpips import Lpips, lpips
from .openl3 import OpenL3Embeddings, fd_openl3, openl3_statistics
from .passt import PasstLabels, kl_passt
from .perceptual import EfficientNetFeatures, perceptual_distance
from .precision_recall import precision_recall
from .result import MetricResult, over_runs
from .statistics import Gaussian, Statistics, load_reference, save_reference
from .video import motion_error, psnr_per_frame, ssim_per_frame, temporal_consistency
from .weights import MissingWeightsError

__all__ = [
    "ClapEncoder",
    "ClipEncoder",
    "DinoFeatures",
    "EfficientNetFeatures",
    "ExternalToolError",
    "FeatureExtractor",
    "Features",
    "Gaussian",
    "InceptionFeatures",
    "InceptionScore",
    "Lpips",
    "MetricResult",
    "MissingWeightsError",
    "OpenL3Embeddings",
    "PasstLabels",
    "Statistics",
    "adm_evaluation",
    "attribute_accuracy",
    "clap_score",
    "class_accuracy",
    "clip_score",
    "cmmd",
    "extract",
    "extract_batches",
    "fd_dinov2",
    "fd_openl3",
    "fid",
    "frechet_distance",
    "frechet_from_statistics",
    "frechet_infinity",
    "gaussian_distance",
    "image_statistics",
    "inception_score",
    "kid",
    "kl_passt",
    "label_divergence",
    "load_reference",
    "log_mel",
    "log_spectral_distance",
    "lpips",
    "motion_error",
    "multi_resolution_stft_distance",
    "openl3_statistics",
    "over_runs",
    "perceptual_distance",
    "pick_score",
    "precision_recall",
    "preference_score",
    "psnr",
    "psnr_per_frame",
    "read_images",
    "relative_error",
    "save_reference",
    "sfid",
    "signal_to_noise_ratio",
    "ssim",
    "ssim_per_frame",
    "temporal_consistency",
    "vbench",
    "vbench_name",
    "vbench_total",
]
