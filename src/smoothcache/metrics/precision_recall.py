"""Precision and recall of samples with respect to real data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_count
from ..errors import InvalidArgumentError
from .features import check_pair
from .result import MetricResult

BLOCK = 2048  # rows and columns of the distance matrix per block


def precision_recall(
    features: Tensor, reference: Tensor, *, neighbours: int = 3, weights: str | None = None
) -> tuple[MetricResult, MetricResult]:
    """Computes precision and recall with k-nearest-neighbour manifolds.

    The ball around a sample reaches its k-th nearest neighbour in the same set. Precision is the
    fraction of samples inside a ball of the reference, recall the fraction of references inside a
    ball of the samples. ADM's protocol: k = 3, pooled Inception features, 10,000 references (the
    images in ``VIRTUAL_imagenet256_labeled.npz``), 50,000 samples. Both depend on the numbers of
    samples and references, so compare only values with equal numbers.

    Args:
        features: Features of the samples; [samples, features].
        reference: Features of real data; [references, features].
        neighbours: Number of neighbours k.
        weights: Digest of the network.

    Returns:
        Precision and recall. Their spread is the standard error of the fraction for fixed
        manifolds.

    Raises:
        InvalidArgumentError: If sizes of features differ, or a set has at most k samples.

    Source: Kynkaanniemi et al., arXiv 1904.06991.

    Example:
        >>> import torch
        >>> line = torch.arange(8.0)[:, None]
        >>> [x.value for x in precision_recall(line + 4, line, neighbours=1)]
        [0.625, 0.625]
    """
    neighbours = check_count("neighbours", neighbours, least=1)
    check_pair(features, reference)
    for name, values in (("features", features), ("reference", reference)):
        if len(values) <= neighbours:
            raise InvalidArgumentError(
                f"{neighbours} neighbours need more than {neighbours} samples on both sides; "
                f"{name} has {len(values)}."
            )
    origin = reference.double().mean(dim=0)  # distances are exact near the origin
    samples, references = features.double() - origin, reference.double() - origin
    inside_reference = _inside(samples, references, _radii(references, neighbours))
    inside_samples = _inside(references, samples, _radii(samples, neighbours))
    protocol = f"k = {neighbours}, {len(samples)} samples, {len(references)} references"

    def result(metric: str, inside: Tensor) -> MetricResult:
        share = float(inside.double().mean())
        return MetricResult(
            metric,
            share,
            num_samples=len(samples),
            unit="",
            protocol=protocol,
            spread=math.sqrt(share * (1 - share) / len(inside)),
            spread_of=f"standard error of a share of {len(inside)}",
            num_references=len(references),
            weights=weights,
        )

    return result("precision", inside_reference), result("recall", inside_samples)


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Returns the squared distance of each point to its k-th nearest neighbour."""
    radii = []
    for start in range(0, len(points), BLOCK):
        rows = points[start : start + BLOCK]
        nearest = rows.new_full((len(rows), 0), math.inf)
        for first in range(0, len(points), BLOCK):
            distances = _squared_distances(rows, points[first : first + BLOCK])
            if first == start:
                distances.fill_diagonal_(math.inf)
            nearest = torch.cat([nearest, distances], dim=1)
            nearest = nearest.topk(min(neighbours, nearest.shape[1]), largest=False).values
        radii.append(nearest.amax(dim=1))
    return torch.cat(radii)


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Returns whether each point is inside a ball."""
    inside = []
    for rows in torch.split(points, BLOCK):
        found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, limits in zip(
            torch.split(centres, BLOCK), torch.split(radii, BLOCK), strict=True
        ):
            found |= (_squared_distances(rows, columns) <= limits).any(dim=1)
        inside.append(found)
    return torch.cat(inside)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    lengths = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return (lengths - 2 * a @ b.T).clamp(min=0)
