"""Collected features, and the reference, become results."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidArgumentError
from ..metrics.clip import cmmd
from ..metrics.frechet import fd_dinov2, fid, frechet_from_statistics, sfid
from ..metrics.inception_score import InceptionScore
from ..metrics.kid import kid
from ..metrics.openl3 import fd_openl3
from ..metrics.precision_recall import precision_recall
from ..metrics.result import MetricResult, mean_result
from ..metrics.statistics import Gaussian, Statistics
from .collected import Collector, Rows
from .registry import Metric

FRECHET = {
    "fid": fid,
    "sfid": sfid,
    "fd_dinov2": fd_dinov2,
    "fd_openl3_music": fd_openl3,
    "fd_openl3_env": fd_openl3,
}
UNITS = {"psnr": "dB", "kl_passt": "nats"}


def result_of(
    metric: Metric,
    collected: Collector,
    reference: Gaussian | Collector | None,
    network: Any,
    *,
    subset_size: int,
) -> MetricResult:
    """The result of one metric.

    Raises:
        InvalidArgumentError: If there are too few samples, or the reference does not fit.
    """
    digest = getattr(network, "digest", None)
    if isinstance(collected, InceptionScore):
        return collected.result(weights=digest)
    if isinstance(collected, Statistics):
        gaussian = reference.gaussian() if isinstance(reference, Statistics) else reference
        if not isinstance(gaussian, Gaussian):
            raise InvalidArgumentError(f"{metric.name} needs a reference.")
        return _frechet(metric, collected, gaussian, digest)
    if not isinstance(collected, Rows):
        raise InvalidArgumentError(f"{metric.name} has nothing to be measured from.")
    rows = collected.joined()
    if metric.collects == "values":
        return mean_result(
            metric.name,
            rows,
            unit=UNITS.get(metric.name, ""),
            protocol=_protocol(metric, network),
            weights=digest,
        )
    if not isinstance(reference, Rows):
        raise InvalidArgumentError(f"{metric.name} needs reference images.")
    others = reference.joined()
    if metric.name == "kid":
        return kid(rows, others, subset_size=subset_size, weights=digest)
    if metric.name == "cmmd":
        return cmmd(rows, others, weights=digest)
    precision, recall = precision_recall(rows, others, weights=digest)
    return precision if metric.name == "precision" else recall


def _frechet(
    metric: Metric, samples: Statistics, reference: Gaussian, digest: str | None
) -> MetricResult:
    if metric.name in FRECHET:
        return FRECHET[metric.name](samples, reference, weights=digest)
    return frechet_from_statistics(
        metric.name,
        samples,
        reference,
        protocol="EfficientNet-Lite0, pooled features, bicubic to 224 x 224; no FID",
        weights=digest,
    )


def _protocol(metric: Metric, network: Any) -> str:
    name = getattr(network, "name", "")
    return f"{metric.what}, {name}" if name else metric.what
