"""Reads files of prompts."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import listed
from ..errors import FileFormatError
from ..files.document import parse_json

MOST_BYTES = 64 * 2**20  # of a file of prompts
PROMPT, NAME = "prompt", "name"
"""Fields of an object, and columns of a table."""


@dataclass(frozen=True)
class _Entry:
    """One prompt of a file.

    Attributes:
        place: Where it stands, for messages.
        prompt: The text.
        name: None if the file gives none.
    """

    place: str
    prompt: str
    name: str | None = None


def read_prompts(path: str | os.PathLike[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts from a file, in UTF-8, or in UTF-16 with a byte order mark.

    Args:
        path: The ending tells the format. ``.txt``: a prompt a line. ``.jsonl``: a text a line, or
            an object with a field ``prompt`` and perhaps ``name``. ``.csv``: a table with a column
            ``prompt`` and perhaps ``name``. ``.json``: a list of what ``.jsonl`` has in its lines,
            or an object of names and prompts.

    Returns:
        The prompts, and their names if the file has some: those of the files to be written, for
        example the numbers of AudioCaps.

    Raises:
        FileFormatError: If there is no such file, it has another format or encoding, it holds no
            prompts or an empty one, or only some prompts have names.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "prompts.json")
        ...     _ = file.write_text('{"97151": "a dog barks", "12534": "rain"}')
        ...     read_prompts(file)
        (('a dog barks', 'rain'), ('97151', '12534'))
    """
    file = Path(path)
    readers: dict[str, Callable[[Path, str], list[_Entry]]] = {
        ".txt": _of_lines,
        ".jsonl": _of_json_lines,
        ".csv": _of_table,
        ".json": _of_json,
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise FileFormatError(f"the prompts '{file}' must end in {listed(readers, 9)}")
    entries = reader(file, _text(file))
    if not entries:
        raise FileFormatError(f"there is no prompt in '{file}'")
    for entry in entries:
        if not entry.prompt.strip():
            raise FileFormatError(f"{file}, {entry.place}: the prompt is empty; delete it")
    names = tuple(entry.name for entry in entries if entry.name is not None)
    if names and len(names) < len(entries):
        unnamed = next(entry.place for entry in entries if entry.name is None)
        raise FileFormatError(
            f"{file}, {unnamed}: the prompt has no name, though others have; name all or none"
        )
    return tuple(entry.prompt for entry in entries), names


def _text(file: Path) -> str:
    try:
        if (size := file.stat().st_size) > MOST_BYTES:
            raise FileFormatError(
                f"'{file}' has {size} bytes, more than the {MOST_BYTES} that a file of prompts "
                "may have"
            )
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise FileFormatError(f"there is no file '{file}' to read prompts from") from error
    except OSError as error:
        raise FileFormatError(f"the prompts '{file}' cannot be read: {error}") from error
    # Editors of Windows write UTF-16 with a mark at its start; without one it cannot be told.
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise FileFormatError(
            f"{file}, line {line}: not {encoding.removesuffix('-sig').upper()} (byte "
            f"0x{data[error.start]:02x} at {error.start}); save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise FileFormatError(
            f"{file}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: a zero byte, so this "
            "is no text in UTF-8; save the file as UTF-8"
        )
    return text


def _of_lines(file: Path, text: str) -> list[_Entry]:
    """A prompt for each line; empty lines at the end do not count."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")
    if not text.strip():
        return []
    return [_Entry(f"line {i}", line.strip()) for i, line in enumerate(lines, 1)]


def _of_json_lines(file: Path, text: str) -> list[_Entry]:
    lines = text.rstrip().split("\n") if text.strip() else []
    return [
        _entry(file, f"line {i}", parse_json(line, f"{file}, line {i}").raw if line.strip() else "")
        for i, line in enumerate(lines, 1)
    ]


def _of_json(file: Path, text: str) -> list[_Entry]:
    document = parse_json(text, str(file)).raw
    if isinstance(document, dict):
        return [
            _entry(file, f"the prompt '{name}'", {NAME: name, PROMPT: prompt})
            for name, prompt in document.items()
        ]
    if not isinstance(document, list):
        raise FileFormatError(
            f"{file}: expected a list of prompts, or an object of names and prompts, got "
            f"{_shown(document)}"
        )
    return [_entry(file, f"entry {i}", value) for i, value in enumerate(document, 1)]


def _of_table(file: Path, text: str) -> list[_Entry]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    entries: list[_Entry] = []
    columns: list[str] = []
    try:
        for row in reader:
            if not columns:
                columns = [name.strip().lower() for name in row]
                _check_field(f"{file}: the first line has no column", columns, row)
            elif row:
                cells = dict(zip(columns, row, strict=False))
                place = f"line {reader.line_num}"
                entries.append(_Entry(place, cells.get(PROMPT, ""), cells.get(NAME) or None))
    except csv.Error as error:
        raise FileFormatError(f"{file}, line {reader.line_num}: {error}") from error
    return entries


def _entry(file: Path, place: str, value: Any) -> _Entry:
    """A text, or an object with a prompt and perhaps a name."""
    if not isinstance(value, Mapping):
        return _Entry(place, _checked(file, place, PROMPT, value))
    _check_field(f"{file}, {place}: the object has no field", value, value)
    prompt = _checked(file, place, PROMPT, value[PROMPT])
    name = value.get(NAME)
    return _Entry(place, prompt, None if name is None else _checked(file, place, NAME, name))


def _checked(file: Path, place: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FileFormatError(f"{file}, {place}: the {field} must be a text, got {_shown(value)}")
    return value


def _check_field(problem: str, names: Iterable[str], shown: Iterable[str]) -> None:
    if PROMPT not in names:
        raise FileFormatError(f"{problem} 'prompt'; it has {listed(shown, 20) or 'none'}")


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
