"""A file of measured distances and fitted gains, from which an interrupted search continues."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError, SmoothCacheWarning
from ..files.document import Value, parse_json
from ..processes import from_rank_zero, rank_and_size

DistanceKey = tuple[str, str, int]  # name of the reference, key of the candidate, generation
GainsKey = tuple[str, str]  # name of the reference, key of the candidate


class Journal:
    """Keeps the results of a search, and writes each of them to a file at once.

    The first line of the file holds the settings, every other line one result, in JSON. All
    processes know all results; rank 0 alone reads and writes the file.

    Args:
        path: The file; None to keep the results in memory only.
        settings: What the results depend on.

    Attributes:
        distances: Measured distances by key.
        gains: Fitted gains by key; [steps] each.

    Raises:
        InvalidArgumentError: If the file was written with other settings.
        FileNotFoundError: If the folder of the file does not exist.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.distances: dict[DistanceKey, float] = {}
        self.gains: dict[GainsKey, list[float]] = {}
        self._path = None if path is None else Path(path)
        self._head = json.dumps({"format": "smoothcache search", "version": 1, **settings})
        if self._path is not None:
            self.distances, self.gains = from_rank_zero(lambda: self._read(Path(self._path or "")))

    def confirm(self, key: DistanceKey, value: float) -> None:
        """Records a value that must agree with the one in the file, if there is one.

        Raises:
            InvalidArgumentError: If the two differ.
        """
        known = self.distances.get(key, value)
        if not math.isclose(known, value, rel_tol=1e-3):
            raise InvalidArgumentError(
                f"the journal '{self._path}' is of another search: sample({key[2]}) gives another "
                "result now, so the weights, the prompts or the sampler have changed; remove it, "
                "or name another file"
            )
        self.record(key, value)

    def record(self, key: DistanceKey, value: float) -> None:
        """Records a distance."""
        is_new = key not in self.distances
        self.distances[key] = value
        if is_new and rank_and_size()[0] == 0:
            self._append(json.dumps([*key, value]))

    def record_gains(self, key: GainsKey, gains: list[float]) -> None:
        """Records gains; [steps]."""
        self.gains[key] = gains
        if rank_and_size()[0] == 0:
            self._append(json.dumps([*key, gains]))

    def _read(self, path: Path) -> tuple[dict[DistanceKey, float], dict[GainsKey, list[float]]]:
        """The distances and gains in the file; begins the file if there is none."""
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the folder of the journal '{path}' is missing.")
        content = path.read_bytes() if path.is_file() else b""
        if not content:
            self._append(self._head)
            return {}, {}
        head, *lines = content.split(b"\n")
        if head != self._head.encode():
            raise InvalidArgumentError(
                f"the journal '{path}' is of another search (another model, sampler, number of "
                "steps or objective); remove it, or name another file"
            )
        # An interruption leaves an incomplete line after the last line break.
        distances: dict[DistanceKey, float] = {}
        gains: dict[GainsKey, list[float]] = {}
        for number, line in enumerate(lines[:-1], start=2):
            if not line:
                continue
            entry = parse_json(line, f"{path}, line {number}")
            fields = entry.items()
            if len(fields) not in (3, 4):
                raise entry.error(f"expected 3 or 4 entries, got {len(fields)}")
            reference, candidate = fields[0].text(), fields[1].text()
            if len(fields) == 3:
                gains[reference, candidate] = fields[2].list_of(Value.number)
            else:
                distances[reference, candidate, fields[2].integer()] = _error_of(fields[3])
        if lines[-1]:
            os.truncate(path, len(content) - len(lines[-1]))
        return distances, gains

    def _append(self, line: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
        except OSError as error:
            warnings.warn(
                f"the journal '{self._path}' cannot be written ({error}); the search goes on, but "
                "cannot continue from it later",
                SmoothCacheWarning,
                stacklevel=2,
            )
            self._path = None


def _error_of(value: Value) -> float:
    """A distance in a journal, which is infinite where a sample was not finite."""
    return math.inf if value.raw == math.inf else value.number()
