"""Extraction of image features in batches, and files of features."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..checks import listed
from ..errors import FileFormatError, InvalidArgumentError
from ..files.document import write_atomically
from .statistics import Statistics

FORMAT = "smoothcache-features-1"


class FeatureExtractor(Protocol):
    """A network that computes feature vectors of images."""

    name: str
    digest: str

    @property
    def sizes(self) -> Mapping[str, int]:
        """Lengths of feature vectors, by name."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Returns features [images, size] by name, of uint8 images [images, 3, height, width]."""


def describe(extractor: FeatureExtractor) -> str:
    """Returns the name and digest of an extractor, as stored in statistics and feature files."""
    return f"{extractor.name} ({extractor.digest})"


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a set of samples.

    Args:
        values: Features [samples, size] by name.
        indices: Index of each sample, increasing; [samples].
        extractor: Name and digest of the network.
    """

    values: Mapping[str, Tensor]
    indices: Tensor
    extractor: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the features to a .safetensors file.

        Args:
            path: The file.
        """
        tensors = {f"value.{name}": x.contiguous() for name, x in self.values.items()}
        metadata = {"format": FORMAT, "extractor": self.extractor}
        write_atomically(path, save({**tensors, "indices": self.indices}, metadata))

    @classmethod
    def load(cls, *paths: str | os.PathLike[str]) -> Features:
        """Reads feature files and concatenates them, ordered by sample.

        Args:
            paths: The files, for example one per process.

        Returns:
            The features of all samples.

        Raises:
            InvalidArgumentError: If no file is given.
            FileFormatError: If a file is damaged, its network or features differ from the first
                file's, or a sample is repeated.
        """
        if not paths:
            raise InvalidArgumentError("at least one file of features is needed.")
        parts = [_load(path) for path in paths]
        for path, part in zip(paths, parts, strict=True):
            if part.extractor != parts[0].extractor:
                raise FileFormatError(
                    f"{path}: the features come from {part.extractor}, those of '{paths[0]}' from "
                    f"{parts[0].extractor}; they cannot be joined."
                )
            if _sizes(part) != _sizes(parts[0]):
                raise FileFormatError(
                    f"{path}: the features are {_sizes(part)}, those of '{paths[0]}' "
                    f"{_sizes(parts[0])}; they cannot be joined."
                )
        indices = torch.cat([part.indices for part in parts])
        order = indices.argsort()
        indices = indices[order]
        twice = sorted(set(indices[1:][indices[1:] == indices[:-1]].tolist()))
        if twice:
            raise FileFormatError(
                f"{listed(map(str, paths))}: the samples {listed(twice)} come twice. Give each "
                "file once, and only files of one run."
            )
        names = parts[0].values
        values = {name: torch.cat([x.values[name] for x in parts])[order] for name in names}
        return cls(values, indices, parts[0].extractor)


def extract(
    batches: Iterable[Tensor], extractor: FeatureExtractor, indices: Sequence[int] | None = None
) -> Features:
    """Extracts features of all images into memory: 410 MB for 50,000 images and 2048 features.

    Args:
        batches: uint8 images [images, 3, height, width], for example from ``read_images``.
        extractor: The network.
        indices: Index of each image; by default 0, 1, ...

    Returns:
        The features, on the CPU.

    Raises:
        InvalidArgumentError: If there is no image, or the indices are not one increasing integer
            per image.

    Example:
        >>> import torch
        >>> class Colours:  # a fake extractor
        ...     name, digest, sizes = "mean colour", "", {"colour": 3}
        ...
        ...     def __call__(self, images):
        ...         return {"colour": images.float().mean(dim=(2, 3))}
        >>> black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> extract([black, black], Colours()).values["colour"].shape
        torch.Size([4, 3])
    """
    parts = list(extract_batches(batches, extractor))
    if not parts:
        raise InvalidArgumentError("there are no images to extract features from.")
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    count = len(next(iter(values.values())))
    numbers = torch.arange(count) if indices is None else torch.tensor(list(indices))
    if len(numbers) != count or (numbers.diff() <= 0).any():
        raise InvalidArgumentError(f"indices must be {count} rising integers.")
    return Features(values, numbers, describe(extractor))


def extract_batches(
    batches: Iterable[Tensor], extractor: FeatureExtractor
) -> Iterator[dict[str, Tensor]]:
    """Extracts features batch by batch, and yields them on the CPU.

    Args:
        batches: uint8 images [images, 3, height, width], for example from ``read_images``.
        extractor: The network.

    Yields:
        Features [images, size] of a batch, by name.

    Raises:
        InvalidArgumentError: If images have the wrong shape or type, or a feature is not finite.

    Example:
        >>> import torch
        >>> class Colours:  # a fake extractor
        ...     name, digest, sizes = "mean colour", "", {"colour": 3}
        ...
        ...     def __call__(self, images):
        ...         return {"colour": images.float().mean(dim=(2, 3))}
        >>> black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> [len(features["colour"]) for features in extract_batches([black, black], Colours())]
        [2, 2]
    """
    done = 0
    for images in batches:
        check_images(images)
        features = {name: x.detach().float().cpu() for name, x in extractor(images).items()}
        for name, values in features.items():
            if not values.isfinite().all():
                raise InvalidArgumentError(
                    f"the feature '{name}' by {extractor.name} of images {done} to "
                    f"{done + len(images) - 1} contains NaN or infinity."
                )
        done += len(images)
        yield features


def image_statistics(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    names: Sequence[str],
    *,
    num_groups: int = 10,
) -> dict[str, Statistics]:
    """Computes statistics of all images, with memory independent of their number.

    Args:
        batches: uint8 images [images, 3, height, width], for example from ``read_images``.
        extractor: The network.
        names: Names of features.
        num_groups: As for ``Statistics``; 1 for no spread.

    Returns:
        Statistics by feature.

    Raises:
        InvalidArgumentError: If a feature is unknown, or images have the wrong shape or type.

    Example:
        >>> import torch
        >>> class Colours:  # a fake extractor
        ...     name, digest, sizes = "mean colour", "", {"colour": 3}
        ...
        ...     def __call__(self, images):
        ...         return {"colour": images.float().mean(dim=(2, 3))}
        >>> black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> statistics = image_statistics([black, black + 2], Colours(), ["colour"], num_groups=1)
        >>> statistics["colour"].gaussian().mean.tolist()
        [1.0, 1.0, 1.0]
    """
    unknown = [name for name in names if name not in extractor.sizes]
    if unknown:
        raise InvalidArgumentError(
            f"{extractor.name} has no feature {listed(unknown)}; it has {listed(extractor.sizes)}."
        )
    made = {
        name: Statistics(
            extractor.sizes[name], num_groups=num_groups, extractor=describe(extractor)
        )
        for name in names
    }
    for features in extract_batches(batches, extractor):
        for name, statistics in made.items():
            statistics.update(features[name])
    return made


def check_images(images: Tensor) -> None:
    """Refuses anything but uint8 images.

    Raises:
        InvalidArgumentError: If images have the wrong shape or type.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise InvalidArgumentError(
            f"images must be uint8 of shape [images, 3, height, width], got {images.dtype} of "
            f"shape {list(images.shape)}."
        )


def check_pair(features: Tensor, reference: Tensor) -> None:
    """Refuses sets of features that cannot be compared.

    Raises:
        InvalidArgumentError: If shapes or types are wrong, or sizes differ.
    """
    _check_features("features", features)
    _check_features("reference", reference)
    if features.shape[1] != reference.shape[1]:
        raise InvalidArgumentError(
            f"features have {features.shape[1]} columns, their reference {reference.shape[1]}; "
            "both must come from the same network."
        )


def _sizes(features: Features) -> str:
    return ", ".join(f"{name} of {x.shape[1]}" for name, x in sorted(features.values.items()))


def _load(path: str | os.PathLike[str]) -> Features:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path}: not a file of features ({error}).") from error
    indices = tensors.pop("indices", None)
    if metadata.get("format") != FORMAT or indices is None or not tensors:
        raise FileFormatError(f"{path}: not a file of features, as Features.save writes.")
    if indices.ndim != 1 or indices.is_floating_point():
        raise FileFormatError(f"{path}: the indices are not a row of integers.")
    for name, values in tensors.items():
        if values.ndim != 2 or len(values) != len(indices) or not values.isfinite().all():
            raise FileFormatError(
                f"{path}: '{name}' is not [{len(indices)}, features] of finite numbers."
            )
    values = {name.removeprefix("value."): x for name, x in tensors.items()}
    return Features(values, indices, metadata["extractor"])


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise InvalidArgumentError(
            f"{name} must be [samples, features] with at least 2 samples, "
            f"got {list(features.shape)}."
        )
    if not features.is_floating_point() or not features.isfinite().all():
        raise InvalidArgumentError(f"{name} must be finite numbers of floating point.")
