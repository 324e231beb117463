"""What samples are measured against: published statistics, real data, or other samples."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..checks import listed
from ..errors import InvalidArgumentError
from ..metrics.frechet import check_comparable
from ..metrics.statistics import Gaussian, Statistics, load_reference
from .collected import Collector
from .registry import Metric
from .source import Source, open_source


class Reference:
    """A reference, and which metrics take what of it.

    Args:
        path: Statistics (.npz with ``mu`` and ``sigma``), images (.npz with ``arr_0``), or a
            folder of samples; None if no metric needs one.
        metrics: That will be measured against it.
        batch_size: Images that are measured together.

    Raises:
        InvalidArgumentError: If a metric needs what the reference does not have.
        FileFormatError: If it cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, metrics: Sequence[Metric], batch_size: int
    ) -> None:
        self.metrics = [x for x in metrics if x.against in ("statistics", "rows", "pairs")]
        self.source: Source | None = None
        self.gaussians: dict[str, Gaussian] = {}
        if not self.metrics:
            return
        if path is None:
            raise InvalidArgumentError(
                f"{listed(x.name for x in self.metrics)} need a reference: statistics, real "
                "samples, or those of the uncached model."
            )
        place = Path(path)
        has_statistics = place.is_file() and _has_statistics(place)
        for metric in self.metrics:
            if metric.against == "statistics" and has_statistics:
                self.gaussians[metric.name] = load_reference(place, metric.feature)
        if len(self.gaussians) < len(self.metrics):
            if place.is_file() and not _has_images(place):
                left = [x.name for x in self.metrics if x.name not in self.gaussians]
                raise InvalidArgumentError(
                    f"'{path}' holds statistics alone, and {listed(left)} need the reference "
                    "samples themselves: a folder, or a file with images in 'arr_0'."
                )
            self.source = open_source(place, batch_size)

    @property
    def to_measure(self) -> list[Metric]:
        """The metrics whose features must be made of the reference samples."""
        return [x for x in self.metrics if x.name not in self.gaussians and x.against != "pairs"]

    def check(self, collectors: dict[str, Collector]) -> None:
        """Refuses statistics of another network before an hour of features.

        Raises:
            InvalidArgumentError: If they do not fit.
        """
        for name, gaussian in self.gaussians.items():
            ours = collectors.get(name)
            if isinstance(ours, Statistics):
                size = ours.num_features
                empty = Gaussian(
                    gaussian.mean.new_zeros(size),
                    gaussian.covariance.new_zeros(size, size),
                    extractor=ours.extractor,
                )
                check_comparable(empty, gaussian)


def _names(path: Path) -> set[str]:
    if not zipfile.is_zipfile(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _has_statistics(path: Path) -> bool:
    return any(name.startswith("mu") for name in _names(path))


def _has_images(path: Path) -> bool:
    names = _names(path)
    return "arr_0" in names or not names
