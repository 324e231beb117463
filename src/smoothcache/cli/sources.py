"""Prompts and images that are read from files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..checks import listed
from ..diffusers_io.call_arguments import check_name, image_arguments
from ..errors import InvalidArgumentError
from ..optional import optional_module

MOST_BYTES = 64 * 2**20  # of a file of prompts
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
COLUMN = "prompt"


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file: txt, a line each; jsonl, texts or objects; csv, a column 'prompt'.

    Raises:
        InvalidArgumentError: If it is none of these, has another encoding, or a prompt is empty.
    """
    readers: dict[str, Callable[[Path, str], list[tuple[int, str]]]] = {
        ".txt": _of_lines,
        ".jsonl": _of_objects,
        ".csv": _of_table,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InvalidArgumentError(f"the prompts '{path}' must end in {listed(readers)}")
    prompts = reader(path, _text(path))
    for line, prompt in prompts:
        if not prompt.strip():
            raise InvalidArgumentError(
                f"{path}, line {line}: the prompt is empty; delete the line, or give an empty "
                'prompt on the command line: --prompt ""'
            )
    if not prompts:
        raise InvalidArgumentError(f"there is no prompt in '{path}'")
    return tuple(prompt for _, prompt in prompts)


def _text(path: Path) -> str:
    if not path.is_file():
        raise InvalidArgumentError(f"there is no file '{path}' to read prompts from")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise InvalidArgumentError(
            f"'{path}' has {size} bytes, more than the {MOST_BYTES} that a file of prompts may have"
        )
    data = path.read_bytes()
    # Editors of Windows write UTF-16 with a mark at its start; without one it cannot be told.
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidArgumentError(
            f"{path}, line {line}: not {encoding.removesuffix('-sig').upper()} (byte "
            f"0x{data[error.start]:02x} at {error.start}); save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise InvalidArgumentError(
            f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: a zero byte, so this "
            "is no text in UTF-8; save the file as UTF-8"
        )
    return text


def _of_lines(path: Path, text: str) -> list[tuple[int, str]]:
    """A prompt for each line; empty lines at the end do not count."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")
    return [(i, line.strip()) for i, line in enumerate(lines, 1)] if text.strip() else []


def _of_objects(path: Path, text: str) -> list[tuple[int, str]]:
    prompts = []
    for i, line in enumerate(text.rstrip().split("\n") if text.strip() else (), 1):
        try:
            value = json.loads(line) if line.strip() else ""
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"{path}, line {i}: not valid JSON ({error})") from error
        if isinstance(value, dict):
            if COLUMN not in value:
                raise InvalidArgumentError(
                    f"{path}, line {i}: the object has no field 'prompt'; it has "
                    f"{listed(value, 20) or 'none'}"
                )
            value = value[COLUMN]
        if not isinstance(value, str):
            raise InvalidArgumentError(
                f"{path}, line {i}: the prompt must be a text, got {json.dumps(value)[:60]}"
            )
        prompts.append((i, value))
    return prompts


def _of_table(path: Path, text: str) -> list[tuple[int, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    prompts: list[tuple[int, str]] = []
    column: int | None = None
    try:
        for row in reader:
            if column is None:
                names = [name.strip().lower() for name in row]
                if COLUMN not in names:
                    raise InvalidArgumentError(
                        f"{path}: the first line must name a column 'prompt'; it names "
                        f"{listed(row, 20) or 'none'}"
                    )
                column = names.index(COLUMN)
            elif row:
                prompts.append((reader.line_num, row[column] if column < len(row) else ""))
    except csv.Error as error:
        raise InvalidArgumentError(f"{path}, line {reader.line_num}: {error}") from error
    return prompts


def images_of(pipeline: Any, sources: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Argument of a pipeline -> the images of a folder, in the order of their names.

    Args:
        pipeline: What is to take them.
        sources: Folders, or NAME=FOLDER for the argument of that name.

    Raises:
        InvalidArgumentError: If the pipeline takes no image, there is none, or one is damaged.
        MissingPackageError: If pillow is not installed.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for source in sources:
        name, _, folder = source.rpartition("=")
        if name:
            check_name(pipeline, name, f"--images {source}", image_arguments(pipeline))
        elif not (names := image_arguments(pipeline)):
            raise InvalidArgumentError(f"{type(pipeline).__name__} takes no images")
        else:
            name = names[0]
        if name in found:
            raise InvalidArgumentError(
                f"images for '{name}' are given twice; {type(pipeline).__name__} takes images as "
                f"{listed(image_arguments(pipeline))}: give NAME=DIR"
            )
        found[name] = _read_images(Path(folder))
    return found


def _read_images(folder: Path) -> tuple[Any, ...]:
    if not folder.is_dir():
        raise InvalidArgumentError(f"there is no folder '{folder}' to read images from")
    files: Sequence[Path] = sorted(x for x in folder.iterdir() if x.suffix.lower() in IMAGES)
    if not files:
        raise InvalidArgumentError(
            f"there is no image in '{folder}'; images end in {listed(IMAGES, 9)}"
        )
    image = optional_module("PIL.Image", extra="demo")
    images = []
    for file in files:
        try:
            with image.open(file) as opened:
                images.append(opened.convert("RGB"))
        except Exception as error:  # a file can be damaged, or too large, in any way
            raise InvalidArgumentError(f"the image '{file}' cannot be read: {error}") from error
    return tuple(images)
