"""Results of metrics: values with their spread, protocol and weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import listed
from ..errors import InvalidArgumentError


@dataclass(frozen=True)
class MetricResult:
    """One measured value with everything needed to compare it with others.

    Args:
        metric: Name of the metric, for example ``"fid"``.
        value: The measured value; finite.
        spread: Uncertainty of the value; None if unknown.
        spread_of: Kind of spread, for example ``"standard error of the mean"``.
        num_samples: Number of samples.
        num_references: Number of references; None if there are none, or if unknown.
        weights: Digest of the network's weights; None if no network was used.
        unit: Unit, for example ``"nats"``; empty if dimensionless.
        protocol: Description of the measurement.

    Raises:
        InvalidArgumentError: If the value or the spread is not finite.
    """

    metric: str
    value: float
    num_samples: int
    unit: str
    protocol: str
    spread: float | None = None
    spread_of: str | None = None
    num_references: int | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        for name in ("value", "spread"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise InvalidArgumentError(f"the {name} of {self.metric} is {number}, not finite.")

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2g}"
        unit = self.unit and f" {self.unit}"
        return f"{self.metric} {self.value:.6g}{spread}{unit} (n = {self.num_samples})"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields for JSON.

        Returns:
            Values by field name.
        """
        return asdict(self)


def mean_result(
    metric: str, values: Tensor, *, unit: str, protocol: str, weights: str | None = None
) -> MetricResult:
    """Returns the mean over samples with its standard error.

    Raises:
        InvalidArgumentError: If there is no value, or one is not finite.
    """
    values = values.detach().cpu().double()
    if values.ndim != 1 or not len(values):
        raise InvalidArgumentError(
            f"{metric} needs one value per sample and at least 1 sample, got {list(values.shape)}."
        )
    if not values.isfinite().all():
        sample = int((~values.isfinite()).nonzero()[0])
        raise InvalidArgumentError(f"{metric} of sample {sample} is {values[sample].item()}.")
    several = len(values) > 1
    return MetricResult(
        metric,
        float(values.mean()),
        num_samples=len(values),
        unit=unit,
        protocol=protocol,
        spread=float(values.std() / math.sqrt(len(values))) if several else None,
        spread_of="standard error of the mean over samples" if several else None,
        weights=weights,
    )


def over_runs(results: Sequence[MetricResult]) -> MetricResult:
    """Combines runs with different seeds: the mean and the standard deviation over runs.

    Args:
        results: Results of the same metric and protocol.

    Returns:
        The first result, with the mean and standard deviation of all.

    Raises:
        InvalidArgumentError: If there are fewer than two results, or they are not comparable.

    Example:
        >>> runs = [
        ...     MetricResult("fid", value, num_samples=50000, unit="", protocol="one seed")
        ...     for value in (2.0, 3.0, 4.0)
        ... ]
        >>> print(over_runs(runs))
        fid 3 ± 1 (n = 50000)
    """
    if len(results) < 2:
        raise InvalidArgumentError(f"a spread over runs needs at least 2 runs, got {len(results)}.")
    for name in ("metric", "unit", "num_samples", "num_references", "weights"):
        kinds = {getattr(result, name) for result in results}
        if len(kinds) > 1:
            raise InvalidArgumentError(
                f"the runs differ in {name} ({listed(sorted(map(str, kinds)))}); their mean would "
                "mean nothing."
            )
    values = torch.tensor([result.value for result in results], dtype=torch.float64)
    return replace(
        results[0],
        value=float(values.mean()),
        spread=float(values.std()),
        spread_of=f"standard deviation over {len(results)} runs",
    )
