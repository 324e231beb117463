"""Where samples to be measured come from: a folder of ours, or pictures, arrays and sounds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..checks import listed
from ..errors import FileFormatError, InvalidArgumentError
from ..files.media import decoded_sound, sampling_rate_of
from ..generation.manifest import FILE, SampleFile
from ..generation.reading import SampleSet
from ..metrics.images import read_images

Kind = Literal["image", "sound", "clip"]
KINDS: dict[str, Kind] = {"npz": "image", "png": "image", "wav": "sound"}


@dataclass(frozen=True)
class Chunk:
    """Samples that are measured together, the same ones whatever the number of ranks.

    Attributes:
        samples: Images uint8 [samples, 3, height, width]; or one sound [1, channels, samples].
        numbers: Of the samples; [samples].
        name: Of the file, if the chunk is one sound.
    """

    samples: Tensor
    numbers: Tensor
    name: str = ""


class Source(Protocol):
    """A set of samples."""

    @property
    def path(self) -> Path:
        """The folder or file."""

    @property
    def kind(self) -> Kind:
        """Of samples."""

    @property
    def count(self) -> int | None:
        """How many samples there are; None if that is not known before they are read."""

    @property
    def sampling_rate(self) -> int:
        """Of sounds, samples a second."""

    def chunks(self, rank: int, size: int) -> Iterator[Chunk]:
        """The chunks of one rank."""

    def prompts(self, numbers: Tensor) -> list[str]:
        """The prompts of samples."""

    def like(self, chunk: Chunk) -> Tensor:
        """The samples at the place of another set's chunk."""


def open_source(path: str | os.PathLike[str], batch_size: int) -> Source:
    """The samples in a folder or a file.

    Raises:
        FileFormatError: If there are none, or the folder is not complete.
        InvalidArgumentError: If there is nothing of that name.
    """
    place = Path(path)
    if (place / FILE).is_file():
        return Generated(SampleSet.open(place), batch_size)
    if place.is_dir() and any(place.glob("*.wav")):
        return Sounds(place, tuple(sorted(place.glob("*.wav"))))
    if not place.exists():
        raise InvalidArgumentError(f"'{path}' is neither a file nor a folder.")
    return Pictures(place, batch_size)


class Generated:
    """A folder that ``smoothcache sample`` wrote.

    Args:
        samples: The folder.
        batch_size: Images that are measured together, about.
    """

    def __init__(self, samples: SampleSet, batch_size: int) -> None:
        self.path = samples.path
        self.kind: Kind = KINDS.get(samples.manifest.layout, "clip")
        self._samples = samples
        self._chunks = _grouped(samples.files, batch_size if self.kind == "image" else 1)

    @property
    def count(self) -> int | None:
        return len(self._samples)

    @property
    def sampling_rate(self) -> int:
        return self._samples.manifest.sampling_rate or 0

    def chunks(self, rank: int, size: int) -> Iterator[Chunk]:
        for files in self._chunks[rank::size]:
            yield self._chunk(files)

    def _chunk(self, files: Sequence[SampleFile]) -> Chunk:
        parts = [self._samples.read(file) for file in files]
        if len({x.shape[1:] for x in parts}) > 1:
            raise FileFormatError(f"'{self.path}' holds samples of several sizes.")
        numbers = torch.tensor([i for file in files for i in file.samples])
        return Chunk(torch.cat(parts), numbers, files[0].file if self.kind == "sound" else "")

    def prompts(self, numbers: Tensor) -> list[str]:
        inputs = [self._samples.manifest.input_of(i) for i in numbers.tolist()]
        if not all(isinstance(x, str) for x in inputs):
            raise InvalidArgumentError(f"the samples in '{self.path}' were made without prompts.")
        return [str(x) for x in inputs]

    def like(self, chunk: Chunk) -> Tensor:
        wanted = set(chunk.numbers.tolist())
        files = [x for x in self._samples.files if wanted & set(x.samples)]
        found = self._chunk(files) if files else chunk
        if found.numbers.tolist() != chunk.numbers.tolist() or not files:
            raise InvalidArgumentError(
                f"'{self.path}' has no files with exactly the samples {min(wanted)} to "
                f"{max(wanted)}: make both folders with the same number of samples, batch size and "
                "shard size."
            )
        return found.samples


class Pictures:
    """A folder of pictures or arrays, or an .npz file.

    Args:
        path: What ``read_images`` reads.
        batch_size: Images that are measured together, at most.
    """

    kind: Kind = "image"
    count = None
    sampling_rate = 0

    def __init__(self, path: Path, batch_size: int) -> None:
        self.path = path
        self._batch_size = batch_size

    def chunks(self, rank: int, size: int) -> Iterator[Chunk]:
        start = 0
        for number, images in enumerate(read_images(self.path, batch_size=self._batch_size)):
            if number % size == rank:
                yield Chunk(images, torch.arange(start, start + len(images)))
            start += len(images)

    def prompts(self, numbers: Tensor) -> list[str]:
        raise InvalidArgumentError(
            f"the prompts of the images in '{self.path}' are not known; give a folder that "
            "`smoothcache sample` wrote."
        )

    def like(self, chunk: Chunk) -> Tensor:
        raise InvalidArgumentError(
            f"which image in '{self.path}' belongs to which sample is not known; give a reference "
            "folder that `smoothcache sample` wrote."
        )


@dataclass(frozen=True)
class Sounds:
    """A folder of sounds, which are told by the names of their files.

    Attributes:
        path: The folder.
        files: In the order of their names.
    """

    path: Path
    files: tuple[Path, ...]
    kind: Kind = "sound"

    @property
    def count(self) -> int | None:
        return len(self.files)

    @property
    def sampling_rate(self) -> int:
        rates = {sampling_rate_of(file.read_bytes()) for file in islice(self.files, 1)}
        return rates.pop()

    def chunks(self, rank: int, size: int) -> Iterator[Chunk]:
        for number, file in list(enumerate(self.files))[rank::size]:
            yield Chunk(self._read(file), torch.tensor([number]), file.name)

    def _read(self, file: Path) -> Tensor:
        data = file.read_bytes()
        if sampling_rate_of(data) != self.sampling_rate:
            raise FileFormatError(f"{file}: not of the sampling rate of the other sounds.")
        return decoded_sound(data)[None]

    def prompts(self, numbers: Tensor) -> list[str]:
        raise InvalidArgumentError(
            f"the prompts of the sounds in '{self.path}' are not known; give a folder that "
            "`smoothcache sample` wrote."
        )

    def like(self, chunk: Chunk) -> Tensor:
        file = self.path / chunk.name
        if file not in self.files:
            raise InvalidArgumentError(
                f"'{self.path}' has no {chunk.name!r}, the reference of a sample; it has "
                f"{listed(x.name for x in self.files)}. Give prompts names, as an object of names "
                "and prompts, that are those of the real sounds."
            )
        return self._read(file)


def first_samples(path: str | os.PathLike[str], count: int) -> Tensor:
    """The first samples of a folder or a file, to be looked at.

    Args:
        path: What ``open_source`` reads.
        count: How many; fewer if there are fewer, or if they differ in size.

    Returns:
        Images [samples, 3, height, width] or clips [samples, frames, 3, height, width] in [0, 1];
        or sounds [samples, channels, samples].

    Raises:
        FileFormatError: If there are none, or the folder is not complete.
        InvalidArgumentError: If there is nothing of that name.
    """
    found: list[Tensor] = []
    for chunk in open_source(path, count).chunks(0, 1):
        for sample in chunk.samples:
            if len(found) == count or (found and sample.shape != found[0].shape):
                return _scaled(torch.stack(found))
            found.append(sample)
    return _scaled(torch.stack(found))


def _scaled(samples: Tensor) -> Tensor:
    return samples.float() / 255 if samples.dtype == torch.uint8 else samples


def _grouped(files: Sequence[SampleFile], batch_size: int) -> list[list[SampleFile]]:
    """Files in groups of at least so many samples, the last one perhaps fewer."""
    groups: list[list[SampleFile]] = []
    for file in files:
        if not groups or sum(x.count for x in groups[-1]) >= batch_size:
            groups.append([])
        groups[-1].append(file)
    return groups
