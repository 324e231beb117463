"""Files that are written whole or not at all, and read with every value checked."""

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
    """Write a file so that a reader finds the old content or the new, never a part.

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
    """A JSON value that knows its file and its place there, so that a complaint can name both.

    The methods give the value as one type and raise ``FileFormatError`` if it is of another.
    """

    raw: object
    file: str
    place: str = ""

    def error(
        self, problem: str, remedy: str = "Correct the file, or make and save it anew."
    ) -> FileFormatError:
        """The error to raise about this value."""
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
        """The entries of an object that must have exactly these names; null where one may lack."""
        absent = {name: self._inside(None, f".{name}") for name in optional}
        entries = {**absent, **self.entries()}
        missing = [name for name in names if name not in entries]
        unknown = [name for name in entries if name not in names and name not in absent]
        if missing:
            raise self.error(f"the field {listed(missing)} is missing")
        if unknown:
            raise self.error(
                f"the field {listed(unknown)} is unknown; there are {listed(names, 20)}"
            )
        return entries

    def or_none(self, read: Callable[[Value], T]) -> T | None:
        """None if the file says null, otherwise what ``read`` makes of the value."""
        return None if self.raw is None else read(self)

    def list_of(self, read: Callable[[Value], T]) -> list[T]:
        return [read(item) for item in self.items()]

    def dict_of(self, read: Callable[[Value], T]) -> dict[str, T]:
        return {name: read(item) for name, item in self.entries().items()}

    def _inside(self, raw: object, step: str) -> Value:
        return Value(raw, self.file, (self.place + step).removeprefix("."))


def parse_json(data: bytes | str, file: str) -> Value:
    """JSON in which no key comes twice in one object.

    Raises:
        FileFormatError: If the data is not such JSON, with the position of the damage.
    """
    try:
        raw = json.loads(data, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise Value(None, file).error(f"not valid JSON, or cut short ({error})") from error
    return Value(raw, file)


def check_version(document: Value, name: str, version: int) -> None:
    """Refuse a document of another format, or of a newer version than this code reads.

    Raises:
        FileFormatError: If it is one of these.
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
    """JSON for people: a field a line, and in a list of objects an object a line."""
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
    """A text that may quote a file at length, cut in the middle to what a message can hold."""
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-180:]}"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {listed({n for n in names if names.count(n) > 1})} comes twice")
    return entries
