"""ADM's evaluation: five metrics for class-conditional ImageNet models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..checks import listed
from ..errors import InvalidArgumentError
from .features import FeatureExtractor, describe, extract, extract_batches
from .frechet import fid, sfid
from .images import read_images
from .inception_score import InceptionScore
from .precision_recall import precision_recall
from .result import MetricResult
from .statistics import Statistics, load_reference

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")


def adm_evaluation(
    batches: Iterable[Tensor],
    reference: str | os.PathLike[str],
    inception: FeatureExtractor,
    *,
    metrics: Sequence[str] = METRICS,
    split_size: int = 5000,
    num_groups: int = 10,
) -> dict[str, MetricResult]:
    """Computes FID, sFID, Inception Score, precision and recall of images in one pass.

    Args:
        batches: uint8 images [images, 3, height, width], for example from ``read_images``.
        reference: ADM's reference file, for example ``VIRTUAL_imagenet256_labeled.npz``: statistics
            for FID and sFID, images for precision and recall.
        inception: ``InceptionFeatures``.
        metrics: Metrics to compute. Precision and recall keep the features of all samples, 410 MB
            for 50,000; the memory of the others is independent of the number of samples.
        split_size: Number of samples per split of the Inception Score.
        num_groups: As of ``Statistics``; 1 if no spread of FID and sFID is wanted.

    Returns:
        Results by metric.

    Raises:
        FileFormatError: If the reference file lacks data for a metric.
        InvalidArgumentError: If a metric is unknown, or there are too few images for a metric.

    Source: Dhariwal and Nichol, "Diffusion models beat GANs on image synthesis", arXiv 2105.05233.

    Example:
        Fake features replace Inception's, whose weights must be downloaded.

        >>> import tempfile
        >>> import numpy as np
        >>> import torch
        >>> class Colours:
        ...     name, digest, sizes = "mean colour", "", {"pool": 3, "spatial": 3, "logits": 3}
        ...
        ...     def __call__(self, images):
        ...         return dict.fromkeys(self.sizes, images.float().mean(dim=(2, 3)))
        >>> images = torch.randint(256, (8, 3, 4, 4)).to(torch.uint8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     reference = f"{folder}/reference.npz"
        ...     np.savez(reference, arr_0=images.permute(0, 2, 3, 1).numpy())
        ...     results = adm_evaluation([images], reference, Colours(), metrics=["precision"])
        >>> print(results["precision"])
        precision 1 ± 0 (n = 8)
    """
    unknown = [x for x in metrics if x not in METRICS]
    if unknown or not metrics:
        raise InvalidArgumentError(
            f"ADM's evaluation has no {listed(unknown)}; it has {listed(METRICS)}."
        )
    features = {"fid": "pool", "sfid": "spatial"}
    wanted = {x: name for x, name in features.items() if x in metrics}
    # Refuse an incomplete reference file before the long extraction of features.
    references = {x: load_reference(reference, name) for x, name in wanted.items()}
    neighbours = "precision" in metrics or "recall" in metrics
    pool_of_reference = (
        extract(read_images(reference), inception).values["pool"] if neighbours else None
    )
    statistics = {
        x: Statistics(inception.sizes[name], num_groups=num_groups, extractor=describe(inception))
        for x, name in wanted.items()
    }
    score = InceptionScore(inception.sizes["logits"], split_size=split_size)
    pool: list[Tensor] = []
    for made in extract_batches(batches, inception):
        for x, name in wanted.items():
            statistics[x].update(made[name])
        if "inception_score" in metrics:
            score.update(made["logits"])
        if neighbours:
            pool.append(made["pool"])
    digest = inception.digest
    results: dict[str, MetricResult] = {}
    for x, measure in (("fid", fid), ("sfid", sfid)):
        if x in metrics:
            results[x] = measure(statistics[x], references[x], weights=digest)
    if "inception_score" in metrics:
        results["inception_score"] = score.result(weights=digest)
    if pool_of_reference is not None:
        if not pool:
            raise InvalidArgumentError("there are no images to evaluate.")
        both = precision_recall(torch.cat(pool), pool_of_reference, weights=digest)
        results |= {x.metric: x for x in both if x.metric in metrics}
    return results
