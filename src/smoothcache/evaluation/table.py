"""A table of schedules: what each costs, and what was measured of its samples."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError
from ..files.document import write_atomically
from ..metrics.result import MetricResult

MISSING = "-"


@dataclass(frozen=True)
class EvaluationRow:
    """One way of sampling.

    Attributes:
        name: What the row is called.
        steps: Solver steps.
        tmacs: Multiply-accumulates of the denoisers for one sample, in 10^12.
        compute: The same as a fraction of the uncached run.
        seconds: Wall clock of one batch over its samples, median of several.
        results: Metric -> result.
        extras: Further cells, as text, by the name of their column.
    """

    name: str
    steps: int | None = None
    tmacs: float | None = None
    compute: float | None = None
    seconds: float | None = None
    results: Mapping[str, MetricResult] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Every value in full precision.

        Returns:
            Name of a field -> value.
        """
        fields = ("name", "steps", "tmacs", "compute", "seconds")
        return {
            **{name: getattr(self, name) for name in fields},
            "results": {name: result.to_json() for name, result in self.results.items()},
            "extras": dict(self.extras),
        }


@dataclass(frozen=True)
class EvaluationTable:
    """Rows of one evaluation. Printed, it is an aligned table of plain text.

    Example:
        >>> result = MetricResult("fid", 2.271, 50000, unit="", protocol="", spread=0.04)
        >>> rows = (EvaluationRow("uncached", 50, compute=1.0, results={"fid": result}),)
        >>> print(EvaluationTable(rows, title="DiT-XL/2"))
        DiT-XL/2
                  steps  compute  fid
        uncached  50     100.0 %  2.271 ± 0.040

    Attributes:
        rows: In the order in which they are shown.
        title: Comes above the table; may be empty.
        notes: Sentences that come below it.
    """

    rows: tuple[EvaluationRow, ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*([self.title] if self.title else []), *table, *self.notes])

    def header(self) -> list[str]:
        """Headings of the columns that have a value; that of the names is empty.

        Returns:
            The headings.
        """
        return self._lines()[0]

    def cells(self) -> list[list[str]]:
        """What the table shows below its headings.

        Returns:
            A list for each row, with a cell for each heading.
        """
        return self._lines()[1:]

    def _lines(self) -> list[list[str]]:
        """The headings and the rows. Columns without a value are left out."""
        metrics = dict.fromkeys(name for row in self.rows for name in row.results)
        extras = dict.fromkeys(name for row in self.rows for name in row.extras)
        headings = ["", "steps", "TMACs", "compute", "seconds", *metrics, *extras]
        lines = [
            [
                row.name,
                _text(row.steps, "{:d}"),
                _text(row.tmacs, "{:.4g}"),
                _text(None if row.compute is None else 100 * row.compute, "{:.1f} %"),
                _text(row.seconds, "{:.3g}"),
                *(value_text(row.results.get(name)) for name in metrics),
                *(row.extras.get(name, MISSING) for name in extras),
            ]
            for row in self.rows
        ]
        used = [
            i for i in range(len(headings)) if not i or any(line[i] != MISSING for line in lines)
        ]
        return [[line[i] for i in used] for line in (headings, *lines)]

    def to_markdown(self) -> str:
        """A Markdown table.

        Returns:
            The text.
        """
        first, *others = [[cell.replace("|", "\\|") for cell in line] for line in self._lines()]
        rule = ["---", *["---:"] * (len(first) - 1)]
        lines = [f"| {' | '.join(line)} |" for line in (first, rule, *others)]
        above = [f"**{self.title}**", ""] if self.title else []
        return "\n".join([*above, *lines, *(["", *self.notes] if self.notes else [])]) + "\n"

    def to_json(self) -> str:
        """Every value in full precision, with protocols and digests of weights.

        Returns:
            The text.
        """
        document = {
            "title": self.title,
            "rows": [row.document() for row in self.rows],
            "notes": list(self.notes),
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, *paths: str | os.PathLike[str]) -> None:
        """Writes the table to files.

        Args:
            paths: Their endings tell the format: .json or .md.

        Raises:
            InvalidArgumentError: If one has another ending.
        """
        formats = {".json": self.to_json, ".md": self.to_markdown}
        check_endings(paths)
        for path in paths:
            write_atomically(path, formats[Path(path).suffix.lower()]().encode())


def check_endings(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Refuses files of a table that are of no known format.

    Raises:
        InvalidArgumentError: If one is.
    """
    for path in paths:
        if Path(path).suffix.lower() not in (".json", ".md"):
            raise InvalidArgumentError(f"the table '{path}' must end in .json or .md.")


def value_text(result: MetricResult | None) -> str:
    """A value with its spread, to the digits that the spread leaves.

    >>> value_text(MetricResult("fid", 2.2711, num_samples=9, unit="", protocol="", spread=0.041))
    '2.271 ± 0.041'
    """
    if result is None:
        return MISSING
    if not result.spread:
        return f"{result.value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(result.spread)))
    if result.value:  # no more than four digits of the value
        decimals = max(0, min(decimals, 3 - math.floor(math.log10(abs(result.value)))))
    return f"{result.value:.{decimals}f} ± {result.spread:.{decimals}f}"


def _text(value: float | None, written: str) -> str:
    return MISSING if value is None else written.format(value)
