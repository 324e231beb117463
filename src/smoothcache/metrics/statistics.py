"""Mean and covariance of features, accumulated in bounded memory and mergeable over ranks."""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..checks import check_count
from ..errors import FileFormatError, InvalidArgumentError
from ..files.document import write_atomically

FORMAT = "smoothcache-statistics-1"


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussian model of a set of features.

    Args:
        mean: Mean [features], float64.
        covariance: Covariance [features, features], float64; symmetric.
        count: Number of samples; None if unknown.
        extractor: Name and digest of the network; None if unknown.

    Raises:
        InvalidArgumentError: If shapes are wrong, or a value is not finite.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    extractor: str | None = None

    def __post_init__(self) -> None:
        size = self.mean.numel()
        if self.mean.ndim != 1 or self.covariance.shape != (size, size) or not size:
            raise InvalidArgumentError(
                "a Gaussian has a mean of [features] and a covariance of [features, features], "
                f"got {list(self.mean.shape)} and {list(self.covariance.shape)}."
            )
        for name in ("mean", "covariance"):
            if not getattr(self, name).isfinite().all():
                raise InvalidArgumentError(f"the {name} contains NaN or infinity.")
        scale = self.covariance.abs().max()
        if (self.covariance - self.covariance.T).abs().max() > 1e-6 * scale:
            raise InvalidArgumentError("the covariance is not symmetric.")

    @property
    def num_features(self) -> int:
        """Length of a feature vector."""
        return len(self.mean)


class Statistics:
    """Accumulates mean and covariance of features in batches, in bounded memory.

    Samples are assigned to groups by their index, and each group has separate statistics. The
    spread of a Frechet distance is computed by leaving out one group at a time. Memory is
    ``8 * num_groups * num_features ** 2`` bytes, 336 MB for 10 groups of 2048 features,
    independent of the number of samples.

    Args:
        num_features: Length of a feature vector.
        num_groups: Number of groups; 1 for no spread.
        extractor: Name and digest of the network, if known; see ``describe`` of ``features``.

    Raises:
        InvalidArgumentError: If a count is not at least 1.

    Example:
        >>> import torch
        >>> statistics = Statistics(2, num_groups=1)
        >>> statistics.update(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> statistics.gaussian().mean.tolist()
        [1.0, 3.0]
    """

    def __init__(
        self, num_features: int, *, num_groups: int = 10, extractor: str | None = None
    ) -> None:
        self.num_features = check_count("num_features", num_features, least=1)
        self.num_groups = check_count("num_groups", num_groups, least=1)
        self.extractor = extractor
        self._counts = [0] * num_groups
        self._means = torch.zeros(num_groups, num_features, dtype=torch.float64)
        self._scatters = torch.zeros(num_groups, num_features, num_features, dtype=torch.float64)
        self._pending: list[tuple[Tensor, Tensor]] = []

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return sum(self._counts) + sum(len(features) for features, _ in self._pending)

    @property
    def group_counts(self) -> tuple[int, ...]:
        """Number of samples in each group."""
        self._flush()
        return tuple(self._counts)

    def update(self, features: Tensor, indices: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            features: [samples, features]; finite.
            indices: Index of each sample; by default 0, 1, ... in order. Ranks that
                give them get the same groups as one process.

        Raises:
            InvalidArgumentError: If shapes do not fit, or a value is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise InvalidArgumentError(
                f"features must be [samples, {self.num_features}], got {list(features.shape)}."
            )
        if not features.is_floating_point() or not features.isfinite().all():
            raise InvalidArgumentError("features must be finite numbers of floating point.")
        if indices is None:
            indices = torch.arange(self.count, self.count + len(features))
        if indices.shape != features.shape[:1] or indices.is_floating_point():
            raise InvalidArgumentError(
                f"indices must be {len(features)} integers, got {indices.dtype} of shape "
                f"{list(indices.shape)}."
            )
        self._pending.append((features.detach().cpu(), indices.cpu() % self.num_groups))
        # Each flush updates all matrices, so it is deferred until there are enough rows.
        if sum(len(features) for features, _ in self._pending) >= max(1024, self.num_features):
            self._flush()

    def merge(self, other: Statistics) -> None:
        """Merges statistics that another process has collected.

        Args:
            other: Of the same features, groups and weights.

        Raises:
            InvalidArgumentError: If the other has other features, groups or weights.
        """
        for name in ("num_features", "num_groups", "extractor"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise InvalidArgumentError(
                    f"statistics differ in {name} ({ours} and {theirs}) and cannot be merged."
                )
        other._flush()
        self._flush()
        for group, count in enumerate(other._counts):
            self._merge(group, count, other._means[group], other._scatters[group])

    def gaussian(self, *, without: int | None = None) -> Gaussian:
        """Returns the mean and unbiased covariance of all samples, or of all but one group.

        Args:
            without: The group to leave out; None for all samples.

        Returns:
            The Gaussian, in double precision.

        Raises:
            InvalidArgumentError: If fewer than two samples are left.
        """
        self._flush()
        groups = [g for g in range(self.num_groups) if g != without and self._counts[g]]
        count = sum(self._counts[g] for g in groups)
        if count < 2:
            raise InvalidArgumentError(f"a covariance needs at least 2 samples, got {count}.")
        shares = torch.tensor([self._counts[g] / count for g in groups], dtype=torch.float64)
        mean = shares @ self._means[groups]
        apart = self._means[groups] - mean
        scatter = torch.zeros_like(self._scatters[0])
        for group in groups:
            scatter += self._scatters[group]
        scatter += (apart * (count * shares)[:, None]).T @ apart
        covariance = scatter / (count - 1)
        return Gaussian(mean, (covariance + covariance.T) / 2, count, self.extractor)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics to a .safetensors file, for merging in another process.

        Args:
            path: The file.
        """
        self._flush()
        tensors = {
            "counts": torch.tensor(self._counts),
            "means": self._means,
            "scatters": self._scatters,
        }
        metadata = {"format": FORMAT, "extractor": self.extractor or ""}
        write_atomically(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads a file written by ``save``.

        Args:
            path: The file.

        Returns:
            The statistics, to which further batches can be added.

        Raises:
            FileFormatError: If the file is damaged, or of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise FileFormatError(f"{path}: not a file of statistics ({error}).") from error
        if metadata.get("format") != FORMAT or set(tensors) != {"counts", "means", "scatters"}:
            raise FileFormatError(f"{path}: not a file of statistics, as Statistics.save writes.")
        counts, means, scatters = (tensors[x] for x in ("counts", "means", "scatters"))
        fits = means.ndim == 2 and scatters.shape == (*means.shape, means.shape[-1])
        if not fits or counts.shape != means.shape[:1] or counts.min() < 0:
            raise FileFormatError(f"{path}: counts, means and scatters do not fit each other.")
        if not means.isfinite().all() or not scatters.isfinite().all():
            raise FileFormatError(f"{path}: the statistics contain NaN or infinity.")
        groups, num_features = means.shape
        read = cls(num_features, num_groups=groups, extractor=metadata.get("extractor") or None)
        read._counts, read._means, read._scatters = counts.tolist(), means, scatters
        return read

    def _flush(self) -> None:
        if not self._pending:
            return
        features = torch.cat([x for x, _ in self._pending]).double()
        groups = torch.cat([x for _, x in self._pending])
        self._pending.clear()
        for group in range(self.num_groups):
            rows = features[groups == group]
            if len(rows):
                mean = rows.mean(dim=0)
                apart = rows - mean
                self._merge(group, len(rows), mean, apart.T @ apart)

    def _merge(self, group: int, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Merges a group by Chan's update, which is numerically stable."""
        if not count:
            return
        total = self._counts[group] + count
        apart = mean - self._means[group]
        self._scatters[group] += scatter
        self._scatters[group].addr_(apart, apart, alpha=self._counts[group] * count / total)
        self._means[group] += apart * (count / total)
        self._counts[group] = total


def save_reference(path: str | os.PathLike[str], **gaussians: Gaussian) -> None:
    """Writes reference statistics to an .npz file, under the names that ADM's evaluator reads.

    Args:
        path: The file.
        gaussians: ``pool`` is written as ``mu`` and ``sigma``, ``spatial`` as ``mu_s`` and
            ``sigma_s``; any other name as ``mu_NAME`` and ``sigma_NAME``.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> import torch
        >>> gaussian = Gaussian(torch.ones(2).double(), torch.eye(2).double(), count=100)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_reference(f"{folder}/real.npz", pool=gaussian)
        ...     with np.load(f"{folder}/real.npz") as file:
        ...         sorted(file.files)
        ['count', 'mu', 'sigma']
    """
    arrays: dict[str, np.ndarray] = {}
    for name, gaussian in gaussians.items():
        suffix = SUFFIXES.get(name, f"_{name}")
        arrays[f"mu{suffix}"] = gaussian.mean.numpy()
        arrays[f"sigma{suffix}"] = gaussian.covariance.numpy()
        if gaussian.count is not None:
            arrays[f"count{suffix}"] = np.array(gaussian.count)
        if gaussian.extractor is not None:
            arrays[f"extractor{suffix}"] = np.array(gaussian.extractor)
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    write_atomically(path, data.getvalue())


SUFFIXES = {"pool": "", "spatial": "_s"}


def load_reference(path: str | os.PathLike[str], name: str = "pool") -> Gaussian:
    """Reads reference statistics from an .npz file of ADM or ``save_reference``.

    Args:
        path: File such as ``VIRTUAL_imagenet256_labeled.npz``. Nothing is unpickled.
        name: ``"pool"`` for FID (``mu``, ``sigma``), ``"spatial"`` for sFID (``mu_s``,
            ``sigma_s``), or a name passed to ``save_reference``.

    Returns:
        The statistics, with count and extractor if the file has them.

    Raises:
        FileFormatError: If the file is damaged, lacks the arrays, or their shapes are wrong.

    Example:
        >>> import tempfile
        >>> import torch
        >>> gaussian = Gaussian(torch.ones(2).double(), torch.eye(2).double(), count=100)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_reference(f"{folder}/real.npz", colour=gaussian)
        ...     load_reference(f"{folder}/real.npz", "colour").count
        100
    """
    suffix = SUFFIXES.get(name, f"_{name}")
    mean, covariance = f"mu{suffix}", f"sigma{suffix}"
    try:
        with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = set(file.files)
            missing = {mean, covariance} - names
            if missing:
                remedy = " It holds images: extract their features." if "arr_0" in names else ""
                raise FileFormatError(
                    f"{path}: no array {' and '.join(sorted(missing))}, which the '{name}' "
                    f"statistics are; there are {', '.join(sorted(names))}.{remedy}"
                )
            arrays = [np.asarray(file[x], dtype=np.float64) for x in (mean, covariance)]
            count = int(file[f"count{suffix}"]) if f"count{suffix}" in names else None
            known = f"extractor{suffix}" in names
            extractor = str(file[f"extractor{suffix}"]) if known else None
    except FileFormatError:
        raise
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: there is no such file of reference statistics.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise FileFormatError(f"{path}: not an .npz file of plain arrays ({error}).") from error
    try:
        return Gaussian(torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]), count, extractor)
    except InvalidArgumentError as error:
        raise FileFormatError(f"{path}: {mean} and {covariance}: {error}") from error
