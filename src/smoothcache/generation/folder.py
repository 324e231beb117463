"""A folder that samples are written into: whole shards, each with a record, then a manifest.

A shard is done when its record exists, and the record is written after its files. All are written
under another name and renamed, so that a kill at any moment leaves only whole ones behind.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from ..errors import FileFormatError, InvalidArgumentError, SmoothCacheError
from ..files.document import format_json, parse_json, write_atomically
from .layouts import file_names, layout_named
from .manifest import FILE, SAMPLES, Manifest, SampleFile, differences, file_entries
from .shards import Shard

RECORDS = "records"
FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(SmoothCacheError, OSError):
    """The disk is full; what was written before is kept, and the run can go on from it."""


class SampleFolder:
    """The folder of one run.

    Args:
        path: The folder.
        manifest: Of the run, without files.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = manifest.shards()

    def begin(self) -> list[Shard]:
        """Makes the folder, or takes one up that was broken off.

        Returns:
            The shards that are not written yet; none if the run is complete.

        Raises:
            InvalidArgumentError: If the folder holds another run, or something else.
            FileFormatError: If its manifest is damaged.
        """
        self._claim()
        for folder in (self.path, self.path / SAMPLES, self.path / RECORDS):
            for unfinished in folder.glob(".*.tmp"):
                unfinished.unlink(missing_ok=True)
        complete = Manifest.load(self.path).files
        if complete is not None and self._are_there(complete):
            self._remove_records()
            return []
        (self.path / SAMPLES).mkdir(exist_ok=True)
        (self.path / RECORDS).mkdir(exist_ok=True)
        if complete is not None:
            self._reopen(complete)
        return [shard for shard in self._shards if self._record(shard) is None]

    def _reopen(self, files: Sequence[SampleFile]) -> None:
        """Takes up a complete run again of which a file has gone since."""
        for shard in self._shards:
            entries = [x for x in files if x.first in shard.samples]
            self._write_record(shard, entries)
        with self.guarded():
            self.manifest.save(self.path)

    def _claim(self) -> None:
        if not (self.path / FILE).is_file():
            others = [x.name for x in self.path.iterdir() if not x.name.startswith(".")]
            if others:
                raise InvalidArgumentError(
                    f"'{self.path}' holds {sorted(others)[0]!r}, but no {FILE}: name a new folder, "
                    "or the one of a run to go on with."
                )
            with self.guarded():
                self.manifest.save(self.path)
        self.check_same()

    def check_same(self) -> None:
        """Refuses the folder if it is not that of this run.

        Raises:
            InvalidArgumentError: If its manifest is missing, or of another run.
        """
        if not (self.path / FILE).is_file():
            raise InvalidArgumentError(
                f"this process does not see the {FILE} that rank 0 wrote to '{self.path}'; name a "
                "folder that all machines share."
            )
        found = differences(self.manifest, Manifest.load(self.path))
        if found:
            raise InvalidArgumentError(
                f"'{self.path}' holds another run, which differs in {'; '.join(found)}. Give the "
                "same arguments to go on with it, or name another folder."
            )

    def write(self, shard: Shard, files: Sequence[bytes]) -> None:
        """Writes the files of a shard, then its record.

        Raises:
            DiskFullError: If there is no space.
        """
        entries = self._entries(shard, files)
        with self.guarded():
            for entry, data in zip(entries, files, strict=True):
                write_atomically(self.path / SAMPLES / entry.file, data)
        self._write_record(shard, entries)

    def count_done(self) -> int:
        """How many samples are written, by all ranks."""
        try:
            names = {x.name for x in (self.path / RECORDS).iterdir()}
        except FileNotFoundError:
            return self.manifest.num_samples
        return sum(len(x.samples) for x in self._shards if self._record_path(x).name in names)

    def finish(self) -> Manifest:
        """Joins the records of all shards into the manifest, and removes them.

        Returns:
            The manifest, complete.

        Raises:
            FileFormatError: If the record of a shard is missing.
        """
        found = Manifest.load(self.path)
        if found.is_complete:
            return found
        files: list[SampleFile] = []
        for shard in self._shards:
            entries = self._record(shard)
            if entries is None:
                raise FileFormatError(
                    f"{self.path}: the samples {shard.samples[0]} to {shard.samples[-1]} are "
                    "missing, though they were written; run the same command again."
                )
            files += entries
        complete = replace(self.manifest, files=tuple(files))
        with self.guarded():
            complete.save(self.path)
        self._remove_records()
        return complete

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Says what a full disk means for the run.

        Raises:
            DiskFullError: In place of the system's error.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFullError(
                f"no space is left for '{self.path}'. The samples that were written are kept: free "
                "some space and run the same command again."
            ) from error

    def _entries(self, shard: Shard, files: Sequence[bytes]) -> list[SampleFile]:
        layout = layout_named(self.manifest.layout)
        inputs = self.manifest.inputs
        names = file_names(
            layout,
            shard,
            inputs,
            self.manifest.names,
            come_again=self.manifest.num_samples > len(inputs),
        )
        parts = [shard.samples] if len(names) == 1 else [range(i, i + 1) for i in shard.samples]
        return [SampleFile.of(*x) for x in zip(names, parts, files, strict=True)]

    def _write_record(self, shard: Shard, entries: Sequence[SampleFile]) -> None:
        document = {"files": [asdict(entry) for entry in entries]}
        with self.guarded():
            write_atomically(self._record_path(shard), format_json(document))

    def _record_path(self, shard: Shard) -> Path:
        return self.path / RECORDS / f"{shard.number:06d}.json"

    def _record(self, shard: Shard) -> tuple[SampleFile, ...] | None:
        """The files of a shard that is done; None if it is not, or a file of it has gone."""
        path = self._record_path(shard)
        if not path.is_file():
            return None
        entries = file_entries(parse_json(path.read_bytes(), str(path)).fields("files")["files"])
        return entries if self._are_there(entries) else None

    def _are_there(self, entries: Sequence[SampleFile]) -> bool:
        """Whether files exist and have their size; digests are compared when they are read."""
        files = [(self.path / SAMPLES / entry.file, entry.nbytes) for entry in entries]
        return all(file.is_file() and file.stat().st_size == nbytes for file, nbytes in files)

    def _remove_records(self) -> None:
        folder = self.path / RECORDS
        if folder.is_dir():
            for record in folder.iterdir():
                record.unlink()
            folder.rmdir()
