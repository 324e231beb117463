"""A file of finished rollouts, so that an interrupted search resumes."""

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
from .processes import from_first, rank_and_size


class Journal:
    """Results by (reference, candidate, generation), gains by (reference, candidate), and a file.

    The file is the one that they are written to, if any.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.known: dict[tuple[str, str, int], float] = {}
        self.gains: dict[tuple[str, str], list[float]] = {}
        self._path = None if path is None else Path(path)
        self._head = json.dumps({"format": "smoothcache search", "version": 1, **settings})
        if self._path is not None:
            self.known, self.gains = from_first(lambda: self._read(Path(self._path or "")))

    def confirm(self, at: tuple[str, str, int], value: float) -> None:
        """Notes a value that a search which is taken up again finds as it was.

        Raises:
            InvalidArgumentError: If it does not.
        """
        known = self.known.get(at, value)
        if not math.isclose(known, value, rel_tol=1e-3):
            raise InvalidArgumentError(
                f"the journal '{self._path}' is of another search: sample({at[2]}) ends elsewhere "
                "now, so the weights, the prompts or the sampler are others; remove it, or name "
                "another file"
            )
        self.put(at, value)

    def put(self, at: tuple[str, str, int], value: float) -> None:
        is_new = at not in self.known
        self.known[at] = value
        if is_new and rank_and_size()[0] == 0:
            self._append(json.dumps([*at, value]))

    def put_gains(self, at: tuple[str, str], gains: list[float]) -> None:
        """Notes the gains that were fitted to a reference for a candidate."""
        self.gains[at] = gains
        if rank_and_size()[0] == 0:
            self._append(json.dumps([*at, gains]))

    def _read(
        self, path: Path
    ) -> tuple[dict[tuple[str, str, int], float], dict[tuple[str, str], list[float]]]:
        """What the file knows; a new one is begun if there is none."""
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
        # What follows the last line break is a line that an interruption cut short, or nothing.
        known: dict[tuple[str, str, int], float] = {}
        gains: dict[tuple[str, str], list[float]] = {}
        for number, line in enumerate(lines[:-1], start=2):
            if not line:
                continue
            entry = parse_json(line, f"{path}, line {number}")
            fields = entry.items()
            if len(fields) not in (3, 4):
                raise entry.error(f"expected 3 or 4 entries, got {len(fields)}")
            name, key = fields[0].text(), fields[1].text()
            if len(fields) == 3:
                gains[name, key] = fields[2].list_of(Value.number)
            else:
                known[name, key, fields[2].integer()] = _error_of(fields[3])
        if lines[-1]:
            os.truncate(path, len(content) - len(lines[-1]))
        return known, gains

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
                "cannot be taken up again",
                SmoothCacheWarning,
                stacklevel=2,
            )
            self._path = None


def _error_of(value: Value) -> float:
    """A distance in a journal, which is infinite where a sample was not finite."""
    return math.inf if value.raw == math.inf else value.number()
