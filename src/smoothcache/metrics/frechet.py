"""Frechet distances: FID, sFID and FD-DINOv2, and extrapolation to infinitely many samples."""

from __future__ import annotations

import re
import warnings

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count
from ..errors import InvalidArgumentError, SmoothCacheWarning
from .result import MetricResult
from .statistics import Gaussian, Statistics

UNIT = "squared units of the features"


def gaussian_distance(samples: Gaussian, reference: Gaussian) -> float:
    """Returns the squared Frechet distance of two Gaussians.

    ``|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))``. The last trace is the sum of the
    square roots of the eigenvalues of ``C2^(1/2) C1 C2^(1/2)``. This matrix is symmetric, so no
    complex numbers occur and singular covariances need no special case.

    Args:
        samples: Gaussian of the samples.
        reference: Gaussian of real data or uncached samples.

    Returns:
        The distance; at least 0.

    Raises:
        InvalidArgumentError: If features or weights differ.

    Source: Dowson and Landau, 1982; Heusel et al., arXiv 1706.08500.

    Example:
        >>> import torch
        >>> narrow, wide = (Gaussian(torch.zeros(2), x * torch.eye(2)) for x in (1.0, 4.0))
        >>> gaussian_distance(narrow, wide)
        2.0
    """
    check_comparable(samples, reference)
    return _distance(samples, reference, _root(reference.covariance.double()))


def frechet_from_statistics(
    metric: str,
    samples: Statistics,
    reference: Gaussian,
    *,
    protocol: str,
    weights: str | None = None,
) -> MetricResult:
    """Computes a Frechet distance from streamed statistics, with its spread.

    The spread is the jackknife standard error, which leaves out each group of samples once. It
    covers the sampling error, but not the bias, which decreases with the number of samples.

    Args:
        metric: Name of the metric in the result.
        samples: Statistics of the samples.
        reference: Gaussian of real data or uncached samples.
        protocol: Description of the features.
        weights: Digest of the network; by default taken from the statistics.

    Returns:
        The distance and its spread. The spread is None if there is one group.

    Raises:
        InvalidArgumentError: If they are not comparable, or there are too few samples.

    Warns:
        SmoothCacheWarning: If there are no more samples than features.

    Example:
        >>> import torch
        >>> samples = Statistics(2)
        >>> samples.update(torch.randn(100, 2))
        >>> mean, covariance = samples.gaussian().mean, samples.gaussian().covariance
        >>> result = frechet_from_statistics(
        ...     "colour", samples, Gaussian(mean + 2, covariance), protocol="mean colours"
        ... )
        >>> round(result.value, 6)  # (2 - 0)^2 for each of 2 features
        8.0
    """
    whole = samples.gaussian()
    check_comparable(whole, reference)
    if samples.count <= samples.num_features:
        warnings.warn(
            f"{metric} of {samples.count} samples with {samples.num_features} features: the "
            "covariance is singular and the value far too high. Compare it with values of as many "
            "samples only, take more samples, or use kid or frechet_infinity.",
            SmoothCacheWarning,
            stacklevel=3,
        )
    root = _root(reference.covariance.double())
    spread = None
    counts = samples.group_counts
    groups = [group for group, count in enumerate(counts) if count]
    if len(groups) > 1 and samples.count - max(counts) >= 2:
        left = [_distance(samples.gaussian(without=group), reference, root) for group in groups]
        spread = jackknife_error(left)
    return MetricResult(
        metric,
        _distance(whole, reference, root),
        num_samples=samples.count,
        unit=UNIT,
        protocol=protocol,
        spread=spread,
        spread_of=spread_words(len(groups)) if spread is not None else None,
        num_references=reference.count,
        weights=weights or _digest(samples.extractor),
    )


def fid(samples: Statistics, reference: Gaussian, *, weights: str | None = None) -> MetricResult:
    """Computes FID, the Frechet distance of Inception's 2048 pooled features.

    Args:
        samples: Statistics of the feature ``"pool"`` of ``InceptionFeatures``.
        reference: For example ``load_reference("VIRTUAL_imagenet256_labeled.npz")``.
        weights: Digest of the network.

    Returns:
        The distance, with the standard error of the jackknife over groups of samples.

    Raises:
        InvalidArgumentError: If the features are others, or too few.

    Example:
        It needs Inception's published weights, so this example is not run as a test.

        >>> from smoothcache.metrics import (
        ...     InceptionFeatures,
        ...     image_statistics,
        ...     load_reference,
        ...     read_images,
        ... )
        >>> made = image_statistics(  # doctest: +SKIP
        ...     read_images("samples"), InceptionFeatures(), ["pool"]
        ... )
        >>> reference = load_reference("VIRTUAL_imagenet256_labeled.npz")  # doctest: +SKIP
        >>> result = fid(made["pool"], reference)  # doctest: +SKIP
    """
    _check_size("fid", samples, 2048, "pool")
    protocol = "Inception v3 (TensorFlow 2015), pool_3, 2048 features"
    return frechet_from_statistics("fid", samples, reference, protocol=protocol, weights=weights)


def sfid(samples: Statistics, reference: Gaussian, *, weights: str | None = None) -> MetricResult:
    """Computes sFID, the Frechet distance of 7 channels of Inception's spatial features.

    Args:
        samples: Statistics of the feature ``"spatial"`` of ``InceptionFeatures``.
        reference: For example ``load_reference("VIRTUAL_imagenet256_labeled.npz", "spatial")``.
        weights: Digest of the network.

    Returns:
        The distance, with the standard error of the jackknife over groups of samples.

    Raises:
        InvalidArgumentError: If the features are others, or too few.

    Source: Nash et al., "Generating images with sparse representations", arXiv 2103.03841.

    Example:
        It needs Inception's published weights, so this example is not run as a test.

        >>> from smoothcache.metrics import (
        ...     InceptionFeatures,
        ...     image_statistics,
        ...     load_reference,
        ...     read_images,
        ... )
        >>> made = image_statistics(  # doctest: +SKIP
        ...     read_images("samples"), InceptionFeatures(), ["spatial"]
        ... )
        >>> file = "VIRTUAL_imagenet256_labeled.npz"
        >>> reference = load_reference(file, "spatial")  # doctest: +SKIP
        >>> result = sfid(made["spatial"], reference)  # doctest: +SKIP
    """
    _check_size("sfid", samples, 2023, "spatial")
    protocol = "Inception v3 (TensorFlow 2015), mixed_6/conv, first 7 channels, 17 x 17 x 7 values"
    return frechet_from_statistics("sfid", samples, reference, protocol=protocol, weights=weights)


def fd_dinov2(
    samples: Statistics, reference: Gaussian, *, weights: str | None = None
) -> MetricResult:
    """Computes FD-DINOv2, the Frechet distance of DINOv2's class token.

    Args:
        samples: Statistics of the feature ``"class_token"`` of ``DinoFeatures``.
        reference: Gaussian by the same network; there are no published statistics.
        weights: Digest of the network.

    Returns:
        The distance, with the standard error of the jackknife over groups of samples.

    Raises:
        InvalidArgumentError: If they are not comparable, or there are too few samples.

    Source: Stein et al., arXiv 2306.04675.

    Example:
        Random features replace DINOv2's, whose weights must be downloaded.

        >>> import torch
        >>> samples = Statistics(2)
        >>> samples.update(torch.randn(100, 2))
        >>> mean, covariance = samples.gaussian().mean, samples.gaussian().covariance
        >>> result = fd_dinov2(samples, Gaussian(mean + 2, covariance))
        >>> round(result.value, 6)  # (2 - 0)^2 for each of 2 features
        8.0
    """
    protocol = "DINOv2, class token, bicubic to 224 x 224, ImageNet mean and deviation"
    return frechet_from_statistics(
        "fd_dinov2", samples, reference, protocol=protocol, weights=weights
    )


def frechet_infinity(
    features: Tensor,
    reference: Gaussian,
    *,
    least: int | None = None,
    num_points: int = 15,
    seed: int = 0,
    weights: str | None = None,
) -> MetricResult:
    """Extrapolates the Frechet distance to infinitely many samples, linearly in 1 / n.

    Args:
        features: Features of the samples; [samples, features].
        reference: Gaussian of real data or uncached samples.
        least: Smallest subset size; by default a tenth of all samples.
        num_points: Number of subset sizes.
        seed: Seed of the random subsets.
        weights: Digest of the network.

    Returns:
        The distance at 1 / n = 0, with the standard error of the line's intercept. It can be
        negative.

    Raises:
        InvalidArgumentError: If there are too few samples for this number of points.

    Source: Chong and Forsyth, "Effectively unbiased FID", arXiv 1911.07023, without their
        quasi-random noise for the samples.

    Example:
        >>> import torch
        >>> features = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) + 3
        >>> reference = Gaussian(torch.zeros(2).double(), torch.eye(2).double())
        >>> round(frechet_infinity(features, reference).value)  # 3^2 for each of 2 features
        18
    """
    check_count("num_points", num_points, least=3)
    count, num_features = features.shape
    least = max(2, count // 10) if least is None else check_count("least", least, least=2)
    sizes = np.unique(np.linspace(least, count, num_points).astype(int))
    if len(sizes) < num_points:
        raise InvalidArgumentError(
            f"{num_points} numbers of samples from {least} to {count} are not all different; "
            "take more samples, or fewer points."
        )
    generator = torch.Generator().manual_seed(seed)
    root = _root(reference.covariance.double())
    values = []
    for size in sizes:
        chosen = torch.randperm(count, generator=generator)[: int(size)]
        statistics = Statistics(num_features, num_groups=1, extractor=reference.extractor)
        statistics.update(features[chosen])
        gaussian = statistics.gaussian()
        check_comparable(gaussian, reference)
        values.append(_distance(gaussian, reference, root))
    design = np.stack([np.ones(num_points), 1 / sizes], axis=1)
    solution, residuals, _, _ = np.linalg.lstsq(design, np.array(values), rcond=None)
    variance = float(residuals[0]) / (num_points - 2) if len(residuals) else 0.0
    error = np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    return MetricResult(
        "frechet_infinity",
        float(solution[0]),
        num_samples=count,
        unit=UNIT,
        protocol=f"line over 1/n through {num_points} points, n = {least} to {count}, at 1/n = 0",
        spread=float(error),
        spread_of="standard error of the line's intercept",
        num_references=reference.count,
        weights=weights,
    )


def jackknife_error(left_out: list[float]) -> float:
    """Returns the jackknife standard error from values with one group left out at a time.

    >>> jackknife_error([1.0, 3.0])  # of the mean of 3 and 1: half of their difference
    1.0
    """
    values = torch.tensor(left_out, dtype=torch.float64)
    count = len(values)
    return float(((count - 1) / count * (values - values.mean()).square().sum()).sqrt())


def spread_words(num_groups: int) -> str:
    return f"standard error, jackknife over {num_groups} groups of samples"


def check_comparable(samples: Gaussian, reference: Gaussian) -> None:
    """Refuses statistics with different features, or different weights if both are known.

    Raises:
        InvalidArgumentError: If features or weights differ.
    """
    if samples.num_features != reference.num_features:
        raise InvalidArgumentError(
            f"the samples have {samples.num_features} features, the reference statistics "
            f"{reference.num_features}; both must come from the same layer of the same network."
        )
    known = samples.extractor and reference.extractor
    if known and samples.extractor != reference.extractor:
        raise InvalidArgumentError(
            f"the samples' features come from {samples.extractor}, the reference statistics from "
            f"{reference.extractor}. Extract both with the same weights."
        )


def _distance(samples: Gaussian, reference: Gaussian, root: Tensor) -> float:
    apart = samples.mean.double() - reference.mean.double()
    covariance = samples.covariance.double()
    product = root @ covariance @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    crossed = eigenvalues.clamp(min=0).sqrt().sum()
    value = apart @ apart + covariance.trace() + reference.covariance.double().trace() - 2 * crossed
    return max(0.0, float(value))


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _digest(extractor: str | None) -> str | None:
    """Returns the digest in the description of an extractor.

    >>> _digest("net (sha256:12)")
    'sha256:12'
    """
    found = re.search(r"\((sha256:\w+)\)$", extractor or "")
    return found and found[1]


def _check_size(metric: str, samples: Statistics, size: int, feature: str) -> None:
    if samples.num_features != size:
        raise InvalidArgumentError(
            f"{metric} is measured on {size} features, got {samples.num_features}: give statistics "
            f"of the feature '{feature}' of InceptionFeatures."
        )
