"""What a folder of samples says of itself: how they were made, and the digest of every file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import check_count, listed
from ..errors import FileFormatError, InvalidArgumentError
from ..files.document import Value, check_version, format_json, parse_json, write_atomically
from .layouts import has_prompts_as_names, layout_named
from .shards import Shard, divide

FORMAT, VERSION = "smoothcache.samples", 1
FILE, SAMPLES = "manifest.json", "samples"

Setting = str | int | float | bool | None


@dataclass(frozen=True)
class SampleFile:
    """One file of a folder of samples.

    Attributes:
        file: Its name.
        first: Number of its first sample.
        count: How many samples it holds.
        nbytes: Its size.
        sha256: Digest of its bytes, hexadecimal.
    """

    file: str
    first: int
    count: int
    nbytes: int
    sha256: str

    @property
    def samples(self) -> range:
        """Numbers of its samples."""
        return range(self.first, self.first + self.count)

    @classmethod
    def of(cls, name: str, samples: range, data: bytes) -> SampleFile:
        """The entry of a file with these bytes.

        Args:
            name: Of the file.
            samples: Numbers of its samples.
            data: What is in it.

        Returns:
            The entry.
        """
        digest = hashlib.sha256(data).hexdigest()
        return cls(name, samples.start, len(samples), len(data), digest)


@dataclass(frozen=True)
class Manifest:
    """How a folder of samples was made, and which files it consists of.

    Two runs with equal manifests are the same run, whatever the number of ranks.

    Attributes:
        num_samples: Of the whole run.
        batch_size: Samples that were generated together. It can change their last bits.
        shard_size: Samples that were written together.
        layout: A name in ``LAYOUTS``.
        seed: Sample i was generated with seed + i.
        inputs: Prompts or class labels; sample i has number i modulo their count.
        names: Of the inputs, for the names of files; empty if they have none.
        sampling_rate: Of sounds, samples a second.
        frames_per_second: Of clips.
        settings: What else the samples depend on: model, schedule, steps, versions.
        files: In the order of their samples; None as long as the run is not complete.

    Raises:
        InvalidArgumentError: If one of these contradicts another.
    """

    num_samples: int
    batch_size: int
    shard_size: int
    layout: str
    seed: int = 0
    inputs: tuple[str | int, ...] = ()
    names: tuple[str, ...] = ()
    sampling_rate: int | None = None
    frames_per_second: float | None = None
    settings: Mapping[str, Setting] | None = None
    files: tuple[SampleFile, ...] | None = None

    def __post_init__(self) -> None:
        layout_named(self.layout)
        check_count("seed", self.seed, least=0)
        self.shards()
        if self.layout == "wav" and self.sampling_rate is None:
            raise InvalidArgumentError("sounds need a sampling_rate, in samples a second.")
        if self.names and len(self.names) != len(self.inputs):
            raise InvalidArgumentError(
                f"there are {len(self.names)} names of {len(self.inputs)} inputs."
            )
        by_prompt = has_prompts_as_names(layout_named(self.layout), self.inputs)
        named = self.names or (self.inputs if by_prompt else ())
        twice = sorted(str(name) for name, count in Counter(named).items() if count > 1)
        if twice:
            raise InvalidArgumentError(
                f"{listed(twice)} would be the name of two files; give each name and prompt once."
            )

    def shards(self) -> list[Shard]:
        """What is written together.

        Returns:
            The shards in the order of their samples.
        """
        return divide(self.num_samples, self.batch_size, self.shard_size)

    def input_of(self, i: int) -> str | int | None:
        """The prompt or the class label of a sample.

        Args:
            i: Number of the sample.

        Returns:
            None if the run has no inputs.
        """
        return self.inputs[i % len(self.inputs)] if self.inputs else None

    @property
    def is_complete(self) -> bool:
        """Whether all samples are there."""
        return self.files is not None

    def without_files(self) -> Manifest:
        """The same run before it was complete.

        Returns:
            A manifest without files.
        """
        return replace(self, files=None)

    def document(self) -> dict[str, Any]:
        """What the file holds.

        Returns:
            Name of a field -> value.
        """
        fields = {**asdict(self), "inputs": list(self.inputs), "names": list(self.names)}
        fields["settings"] = dict(self.settings or {})
        if self.files is not None:
            fields["files"] = [asdict(file) for file in self.files]
        return {"format": FORMAT, "version": VERSION, **fields}

    def save(self, folder: Path) -> None:
        """Writes the file into a folder.

        Args:
            folder: Of the run.
        """
        write_atomically(folder / FILE, format_json(self.document()))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads the file of a folder.

        Args:
            folder: Of the run.

        Returns:
            The manifest.

        Raises:
            FileFormatError: If there is none, or it is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            raise FileFormatError(
                f"'{folder}' has no {FILE}, so it is no folder that `smoothcache sample` wrote."
            )
        return _read(parse_json(path.read_bytes(), str(path)))


def differences(ours: Manifest, theirs: Manifest) -> list[str]:
    """What differs between two runs, as "steps (here 50, there 30)"; empty if they are the same."""
    a, b = (_flat(x.without_files()) for x in (ours, theirs))
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return [f"{name} (here {_short(a.get(name))}, there {_short(b.get(name))})" for name in names]


def _flat(manifest: Manifest) -> dict[str, Any]:
    document = manifest.document()
    settings: Mapping[str, Any] = document.pop("settings")
    return {**document, **settings}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def file_entries(value: Value) -> tuple[SampleFile, ...]:
    """The files that a JSON list names.

    Raises:
        FileFormatError: If it does not.
    """
    return tuple(value.list_of(_file))


def _read(document: Value) -> Manifest:
    check_version(document, FORMAT, VERSION)
    names = ("num_samples", "batch_size", "shard_size", "layout", "seed", "inputs", "names")
    others = ("sampling_rate", "frames_per_second", "settings", "files", "format", "version")
    fields = document.fields(*names, *others)
    try:
        manifest = Manifest(
            num_samples=fields["num_samples"].integer(least=1),
            batch_size=fields["batch_size"].integer(least=1),
            shard_size=fields["shard_size"].integer(least=1),
            layout=fields["layout"].text(),
            seed=fields["seed"].integer(),
            inputs=tuple(fields["inputs"].list_of(_input)),
            names=tuple(fields["names"].list_of(Value.text)),
            sampling_rate=fields["sampling_rate"].or_none(Value.integer),
            frames_per_second=fields["frames_per_second"].or_none(Value.number),
            settings=fields["settings"].dict_of(_setting),
            files=fields["files"].or_none(file_entries),
        )
    except InvalidArgumentError as error:
        raise document.error(str(error)) from error
    if manifest.files is not None:
        _check_files(manifest, fields["files"])
    return manifest


def _check_files(manifest: Manifest, value: Value) -> None:
    """Every sample in exactly one file."""
    expected = 0
    for file in manifest.files or ():
        if file.first != expected:
            raise value.error(f"'{file.file}' begins with sample {file.first}, not {expected}")
        expected += file.count
    if expected != manifest.num_samples:
        raise value.error(f"the files hold {expected} samples, not {manifest.num_samples}")
    names = [file.file for file in manifest.files or ()]
    if len(set(names)) < len(names):
        raise value.error("a file is named twice")


def _file(value: Value) -> SampleFile:
    fields = value.fields("file", "first", "count", "nbytes", "sha256")
    name = fields["file"].text()
    if Path(name).name != name or name in ("", ".", ".."):
        raise fields["file"].error("expected the name of a file, without a folder")
    return SampleFile(
        name,
        fields["first"].integer(),
        fields["count"].integer(least=1),
        fields["nbytes"].integer(),
        fields["sha256"].text(),
    )


def _input(value: Value) -> str | int:
    return value.integer() if isinstance(value.raw, int) else value.text()


def _setting(value: Value) -> Setting:
    if value.raw is None or isinstance(value.raw, bool | str | int):
        return value.raw
    return value.number()
