"""One self-contained HTML file: what a page holds, and how it is written."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from ..files.document import write_atomically
from ..files.markup import STYLE
from ..optional import optional_module
from .media import Medium

TEMPLATES = "templates"


@dataclass(frozen=True)
class Fact:
    """One figure of the summary.

    Attributes:
        label: What it is.
        value: The figure, with its unit.
        note: What it is measured against; may be empty.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows to read, the first column their names.

    Attributes:
        title: Of the section.
        header: Names of the columns.
        rows: Cells, as many in each row as columns.
        emphasised: The row that the summary speaks of; may be empty.
        notes: Sentences below the table.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    emphasised: str = ""
    notes: tuple[str, ...] = ()
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        title: Of the section.
        svg: SVG or HTML in which all texts are escaped; it stands in the page as it is.
        text: What it shows.
        caption: Below it.
        is_plain: Whether it is HTML that fits any width, which needs no scrolling.
    """

    title: str
    svg: str
    text: str
    caption: str = ""
    is_plain: bool = False
    kind: str = field(default="figure", init=False)

    @property
    def least_width(self) -> int:
        """Pixels below which its letters are too small to read; the page scrolls it then."""
        found = re.search(r'viewBox="0 0 ([\d.]+)', self.svg)
        return round(0.9 * float(found[1])) if found else 0


@dataclass(frozen=True)
class Samples:
    """The same generations in several ways, beside the uncached ones.

    Attributes:
        title: Of the section.
        before: The uncached samples.
        after: Name of a way of sampling -> its samples, in the same order.
        details: Name of a way -> a line about it.
        caption: Below the samples.
    """

    title: str
    before: tuple[Medium, ...]
    after: Mapping[str, tuple[Medium, ...]]
    details: Mapping[str, str] = field(default_factory=dict)
    caption: str = ""
    kind: str = field(default="samples", init=False)


@dataclass(frozen=True)
class Page:
    """What a report says, the summary first.

    Attributes:
        title: Of the page.
        verdict: One or two sentences: does it pay?
        tone: "good", "bad" or "open": how the verdict is marked, beside its words.
        subtitle: Below the title; may be empty.
        facts: Figures of the summary.
        sections: Tables, figures and samples, in their order.
        environment: Name -> value: what it was measured with.
        command: What makes it again; may be empty.
    """

    title: str
    verdict: str
    tone: str = "open"
    subtitle: str = ""
    facts: tuple[Fact, ...] = ()
    sections: tuple[Table | Figure | Samples, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    def to_html(self) -> str:
        """The page as one document that refers to nothing outside of it.

        Returns:
            HTML. Every text is escaped, and the page's own policy forbids the browser any request
            and any script but its own.

        Raises:
            MissingPackageError: If Jinja2 is not installed.
        """
        style, script = f"{STYLE}{_template('style.css')}", _template("script.js")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        page: str = (
            _environment()
            .get_template("page.html")
            .render(page=self, style=style, script=script, digest=digest)
        )
        return page


def write_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Writes a report as one HTML file.

    Args:
        page: What it says.
        path: The file; an existing one is replaced.

    Raises:
        FileNotFoundError: If the folder does not exist.
        MissingPackageError: If Jinja2 is not installed.

    Example:
        >>> import tempfile, pathlib
        >>> page = Page("A comparison", "The schedule pays off.", "good")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_page(page, file := pathlib.Path(folder, "report.html"))
        ...     file.read_text(encoding="utf-8")[:15]
        '<!DOCTYPE html>'
    """
    write_atomically(path, page.to_html().encode("utf-8"))


@cache
def _template(name: str) -> str:
    return (files(__package__) / TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    jinja2 = optional_module("jinja2", extra="report")
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
