"""JSON documents, with atomic writes and validation on load."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from ..checks import listed
from ..errors import FileFormatError

T = TypeVar("T")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically: readers see the old content or the new, never a part.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write '{path}': the folder '{target.parent}' is missing.")
    unfinished = target.with_name(f".{uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


@dataclass(frozen=True)
class Value:
    """A JSON value with its file and position, which error messages name.

    The methods return the value as a given type and raise ``FileFormatError`` for other types.
    """

    raw: object
    file: str
    place: str = ""

    def error(
        self, problem: str, remedy: str = "Correct the file, or create and save it again."
    ) -> FileFormatError:
        """Returns an error about this value."""
        where = f"{self.file}: {_shortened(self.place)}" if self.place else self.file
        return FileFormatError(f"{where}: {_shortened(problem)}. {remedy}")

    def text(self) -> str:
        if not isinstance(self.raw, str):
            raise self.error(f"expected a string, got {_shown(self.raw)}")
        return self.raw

    def integer(self, least: int = 0) -> int:
        if not isinstance(self.raw, int) or isinstance(self.raw, bool) or self.raw < least:
            raise self.error(f"expected an integer of at least {least}, got {_shown(self.raw)}")
        return self.raw

    def number(self) -> float:
        if isinstance(self.raw, int | float) and not isinstance(self.raw, bool):
            try:
                number = float(self.raw)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
        raise self.error(f"expected a finite number, got {_shown(self.raw)}")

    def items(self) -> list[Value]:
        if not isinstance(self.raw, list):
            raise self.error(f"expected a list, got {_shown(self.raw)}")
        return [self._inside(item, f"[{index}]") for index, item in enumerate(self.raw)]

    def entries(self) -> dict[str, Value]:
        if not isinstance(self.raw, dict):
            raise self.error(f"expected an object, got {_shown(self.raw)}")
        return {name: self._inside(item, f".{name}") for name, item in self.raw.items()}

    def fields(self, *names: str, optional: Collection[str] = ()) -> dict[str, Value]:
        """Returns the entries of an object with exactly these names; optional ones may be null."""
        absent = {name: self._inside(None, f".{name}") for name in optional}
        entries = {**absent, **self.entries()}
        missing = [name for name in names if name not in entries]
        unknown = [name for name in entries if name not in names and name not in absent]
        if missing:
            raise self.error(f"the field {listed(missing)} is missing")
        if unknown:
            raise self.error(
                f"the field {listed(unknown)} is unknown; known fields are {listed(names, 20)}"
            )
        return entries

    def or_none(self, read: Callable[[Value], T]) -> T | None:
        """Returns None for null, otherwise ``read(self)``."""
        return None if self.raw is None else read(self)

    def list_of(self, read: Callable[[Value], T]) -> list[T]:
        return [read(item) for item in self.items()]

    def dict_of(self, read: Callable[[Value], T]) -> dict[str, T]:
        return {name: read(item) for name, item in self.entries().items()}

    def _inside(self, raw: object, step: str) -> Value:
        return Value(raw, self.file, (self.place + step).removeprefix("."))


def parse_json(data: bytes | str, file: str) -> Value:
    """Parses JSON without duplicate keys in objects.

    Raises:
        FileFormatError: If the data is not valid JSON or has duplicate keys; gives the position.
    """
    try:
        raw = json.loads(data, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise Value(None, file).error(f"not valid JSON, or cut short ({error})") from error
    return Value(raw, file)


def check_version(document: Value, name: str, version: int) -> None:
    """Refuses a document of another format, or of a newer version.

    Raises:
        FileFormatError: If the format or version does not match.
    """
    entries = document.entries()
    if "format" not in entries or entries["format"].raw != name:
        found = _shown(entries["format"].raw) if "format" in entries else "none"
        raise document.error(f"expected a file of the format '{name}', got {found}")
    if "version" not in entries:
        raise document.error("the field 'version' is missing")
    if (found_version := entries["version"].integer(least=1)) > version:
        raise document.error(
            f"made by a newer smoothcache (file version {found_version}, this one reads {version})",
            "Upgrade smoothcache.",
        )


def format_json(document: Mapping[str, Any]) -> bytes:
    """Returns readable JSON: one line per field, and one line per object in a list of objects."""
    lines = [f"  {json.dumps(name)}: {_field(value)}" for name, value in document.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _field(value: object) -> str:
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(f"    {_compact(item)}" for item in value) + "\n  ]"
    return _compact(value)


def _compact(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def _shown(raw: object) -> str:
    text = json.dumps(raw, default=repr)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _shortened(text: str) -> str:
    """Shortens a text to message length by cutting its middle."""
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-180:]}"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {listed({n for n in names if names.count(n) > 1})} comes twice")
    return entries
