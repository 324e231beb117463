"""Kernel distances: KID, and the maximum mean discrepancy of CMMD."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_count
from ..errors import InvalidArgumentError
from .features import check_pair
from .frechet import jackknife_error, spread_words
from .result import MetricResult

BLOCK = 2048  # rows of the kernel matrix per block


def kid(
    features: Tensor,
    reference: Tensor,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    weights: str | None = None,
) -> MetricResult:
    """Computes the kernel Inception distance, an unbiased alternative to FID for few samples.

    The squared maximum mean discrepancy with the kernel ``(x.y / features + 1)^3``, on random
    subsets of both sets.

    Args:
        features: Features of the samples; [samples, features].
        reference: Features of real data or uncached samples; [references, features].
        num_subsets: Number of pairs of subsets.
        subset_size: Number of samples per subset.
        seed: Seed of the subsets.
        weights: Digest of the network.

    Returns:
        The mean over subsets, with their standard deviation. It can be negative.

    Raises:
        InvalidArgumentError: If sizes of features differ, or a set is smaller than a subset.

    Source: Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401.

    Example:
        >>> import torch
        >>> reference = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> result = kid(reference + 1, reference, num_subsets=10, subset_size=50)
        >>> result.value > 2 * result.spread
        True
    """
    check_count("num_subsets", num_subsets, least=1)
    check_count("subset_size", subset_size, least=2)
    check_pair(features, reference)
    for name, values in (("features", features), ("reference", reference)):
        if len(values) < subset_size:
            raise InvalidArgumentError(
                f"kid takes subsets of {subset_size}, and {name} has {len(values)} samples; take "
                "more, or a smaller subset_size."
            )
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(
        [
            _unbiased(
                *(
                    x[torch.randperm(len(x), generator=generator)[:subset_size]].double()
                    for x in (features, reference)
                )
            )
            for _ in range(num_subsets)
        ],
        dtype=torch.float64,
    )
    several = num_subsets > 1
    return MetricResult(
        "kid",
        float(values.mean()),
        num_samples=len(features),
        unit="",
        protocol=f"cubic kernel, {num_subsets} subsets of {subset_size}, seed {seed}",
        spread=float(values.std(correction=0)) if several else None,
        spread_of=f"standard deviation of {num_subsets} subsets" if several else None,
        num_references=len(reference),
        weights=weights,
    )


def gaussian_mmd(
    features: Tensor, reference: Tensor, *, sigma: float, num_groups: int = 10
) -> tuple[float, float | None]:
    """Returns the squared MMD with a Gaussian kernel, and its jackknife standard error.

    The biased estimate is used, which includes the kernel of each sample with itself and is never
    negative.

    Args:
        features: Features of the samples; [samples, features].
        reference: [references, features].
        sigma: Width of the kernel.
        num_groups: Number of jackknife groups.

    Raises:
        InvalidArgumentError: If sizes of features differ.

    Source: Gretton et al., "A kernel two-sample test", 2012.
    """
    check_pair(features, reference)
    num_groups = min(num_groups, len(features))
    groups = torch.arange(len(features)) % num_groups
    counts = torch.bincount(groups, minlength=num_groups).double()
    # Sums of the kernel over pairs of groups, from which leave-one-out values follow.
    within = torch.zeros(num_groups, num_groups, dtype=torch.float64)
    across = torch.zeros(num_groups, dtype=torch.float64)
    samples, references = features.double(), reference.double()
    for rows, of in zip(torch.split(samples, BLOCK), torch.split(groups, BLOCK), strict=True):
        for columns, with_ in zip(
            torch.split(samples, BLOCK), torch.split(groups, BLOCK), strict=True
        ):
            by_column = torch.zeros(len(rows), num_groups, dtype=torch.float64)
            by_column.index_add_(1, with_, _gaussian(rows, columns, sigma).cpu())
            within.index_add_(0, of, by_column)
        for columns in torch.split(references, BLOCK):
            across.index_add_(0, of, _gaussian(rows, columns, sigma).sum(dim=1).cpu())
    alone = 0.0
    for rows in torch.split(references, BLOCK):
        for columns in torch.split(references, BLOCK):
            alone += float(_gaussian(rows, columns, sigma).sum()) / len(references) ** 2

    def value(kept: Tensor) -> float:
        count = float(counts[kept].sum())
        inner = float(within[kept][:, kept].sum()) / count**2
        return max(0.0, inner + alone - 2 * float(across[kept].sum()) / (count * len(references)))

    everything = torch.arange(num_groups)
    if num_groups < 2:
        return value(everything), None
    left_out = [value(everything[everything != group]) for group in range(num_groups)]
    return value(everything), jackknife_error(left_out)


def mmd_spread_words(num_samples: int, num_groups: int = 10) -> str:
    return spread_words(min(num_groups, num_samples))


def _unbiased(x: Tensor, y: Tensor) -> float:
    within = [_cubic(z, z) for z in (x, y)]
    count = len(x)
    total = sum(float(k.sum() - k.diagonal().sum()) for k in within) / (count * (count - 1))
    return total - 2 * float(_cubic(x, y).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    lengths = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return (-(lengths - 2 * x @ y.T).clamp(min=0) / (2 * sigma**2)).exp()
