"""What commands print, and the files that they write."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer.core
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import InvalidArgumentError
from ..files.document import write_atomically
from ..files.media import encoded
from ..optional import optional_module
from . import tables as tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table
    from torch import Tensor

    from ..comparison.result import Comparison
    from ..metrics.report import Report
    from ..report.page import Page


_MOST_SHOWN = 8  # samples in a picture
GIVEN: ContextVar[tuple[str, ...]] = ContextVar("given", default=())
"""The words that came after ``smoothcache``."""


def picture_suffix(picture: Path, kinds: Sequence[str] = ("png", "svg", "pdf")) -> str:
    """The format that the name of a picture asks for; refuses a place that cannot be written."""
    kind = picture.suffix.lstrip(".").lower()
    if kind not in kinds:
        endings = ", ".join(f".{kind}" for kind in kinds[:-1])
        raise InvalidArgumentError(f"the picture '{picture}' must end in {endings} or .{kinds[-1]}")
    check_output_file(picture)
    return kind


def write_picture(figure: Figure, path: Path, kind: str) -> None:
    data = io.BytesIO()
    figure.savefig(data, format=kind)
    write_atomically(path, data.getvalue())


def write_samples(
    folder: Path, index: int, samples: Tensor, sampling_rate: int | None
) -> list[Path]:
    """Writes a batch of images as PNG files, of clips as animated GIF files, of sounds as WAV."""
    written = []
    for number, sample in enumerate(samples):
        ending, data = encoded(sample, sampling_rate)
        name = f"{index:04d}" if len(samples) == 1 else f"{index:04d}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{name}.{ending}")
        write_atomically(written[-1], data)
    return written


def write_files(folder: Path, comparison: Comparison, rate: int | None) -> None:
    """Writes the samples of every row into a folder of its own."""
    for row, samples in comparison.images.items():
        place = folder / re.sub(r"[^\w.-]+", "-", row).strip("-.")
        for i, sample in enumerate(samples):
            write_samples(place, i, sample[None], rate)


def draw_samples(picture: Path, kind: str, comparison: Comparison, rate: int | None) -> None:
    """Draws the first samples of every row; of a clip its frames, unless the picture moves."""
    from .. import plots

    first = {row: samples[:_MOST_SHOWN] for row, samples in comparison.images.items()}
    (_, reference), *rows = first.items()
    if reference.ndim == 3:
        if rate is None:
            raise InvalidArgumentError(
                f"'{picture}' is not drawn: the pipeline does not say how many samples of a sound "
                "make a second"
            )
        write_picture(plots.plot_spectrograms(rows, reference, rate), picture, kind)
    elif kind == "gif":
        if reference.ndim == 4:  # images are clips of one frame
            rows, reference = [(row, x[:, None]) for row, x in rows], reference[:, None]
        plots.animate_clip_grid(rows, reference, picture)
    else:
        if reference.ndim == 5:
            rows, reference = [(row, x[0]) for row, x in rows], reference[0]
        write_picture(plots.plot_image_grid(rows, reference), picture, kind)


# ---------------------------------------------------------------------------------- the report
def check_html_file(path: Path | None) -> None:
    """Refuses before long work a report that could not be written after it.

    Raises:
        InvalidArgumentError: If the place cannot be written, or its name has another ending.
        MissingPackageError: If Jinja2, matplotlib or pillow is not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm"):
        raise InvalidArgumentError(f"the report '{path}' must end in .html")
    check_output_file(path)
    for module in ("jinja2", "matplotlib", "PIL"):
        optional_module(module, extra="report")


def write_html(path: Path, page: Page) -> None:
    """Writes a page, with the command that makes it again."""
    from ..report.page import write_page

    write_page(replace(page, command=command_line()), path)


def command_line() -> str:
    """The command that runs, as it can be pasted into a shell."""
    return shlex.join(["smoothcache", *GIVEN.get()])


# ----------------------------------------------------------------------------------- the files
def check_output_file(path: Path) -> None:
    """Refuses before long work what could not be written after it."""
    if path.is_dir():
        raise InvalidArgumentError(f"cannot write '{path}': it is a folder")
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"cannot write '{path}': there is no folder '{path.parent}'")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InvalidArgumentError(f"cannot write '{path}': the folder is not writable")


def check_output_folder(path: Path) -> None:
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InvalidArgumentError(f"cannot write to '{path}': '{existing}' is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InvalidArgumentError(f"cannot write to '{path}': '{existing}' is not writable")


# -------------------------------------------------------------------------------- the terminal
def show(what: str | Table) -> None:
    """Shows a text or a table: wrapped in a terminal, one line a line elsewhere."""
    is_terminal = sys.stdout.isatty()
    _console().print(what, soft_wrap=isinstance(what, str) and not is_terminal)


def _console() -> Console:
    """Of stdout; as wide as any table where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False)


def show_report(report: Report) -> None:
    if report.title:
        show(report.title)
    for table in tables.report_tables(report, _console().width):
        show(table)
    for note in report.notes:
        show(note)


def show_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


@contextmanager
def status_line(text: str) -> Iterator[None]:
    """Says what is going on, in a terminal, for as long as it does."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def with_progress(numbers: range, text: str) -> Iterator[int]:
    """The numbers, with a progress bar in a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(numbers)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    to_stderr(f"warning: {one_line(message)}")


def to_stderr(line: str) -> None:
    typer.echo(line, err=True)


def one_line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")
