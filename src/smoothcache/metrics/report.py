"""Tables of cost and quality, as text, Markdown or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import InvalidArgumentError
from ..files.markup import fragment, paragraph, table

MISSING = "-"


@dataclass(frozen=True)
class ReportRow:
    """Cost and quality of one sampling configuration; None for values that were not measured.

    Fidelity is measured against the uncached samples of the same seeds, as the mean over samples.

    Attributes:
        name: Name of the row.
        family: Method that the row is a setting of; may be empty.
        steps: Number of solver steps.
        compute: MACs relative to the uncached run; 1 for the uncached run itself.
        time: Wall-clock time relative to the uncached run.
        seconds: Wall-clock time of all samples, in seconds.
        psnr: PSNR in dB.
        ssim: SSIM, at most 1.
        snr: Signal-to-noise ratio of sounds in dB.
        log_spectral_distance: Log-spectral distance of sounds in dB.
        stft_distance: Multi-resolution STFT distance of sounds.
        relative_error: Relative L1 error.
        motion_error: Relative L1 error of the changes between frames of clips.
        temporal_consistency: One minus the mean change between frames of clips.
        perceptual_distance: Relative L2 distance of a classifier's features.
        converged_psnr: PSNR in dB against samples of the same noise with many more steps.
        class_accuracy: Fraction of samples that a classifier recognises, in [0, 1].
        accuracies: Fraction of samples that a classifier recognises, by attribute, in [0, 1]; one
            column each.
        label_divergence: KL divergence of a classifier's labels in nats.
        frechet_distance: Frechet distance between features of the samples and of real data.
        peak_bytes: Peak bytes of kept outputs.
        margins: Half the width of the 95 % confidence interval of the mean, by field.
    """

    name: str
    family: str = ""
    steps: int | None = None
    compute: float | None = None
    time: float | None = None
    seconds: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    snr: float | None = None
    log_spectral_distance: float | None = None
    stft_distance: float | None = None
    relative_error: float | None = None
    motion_error: float | None = None
    temporal_consistency: float | None = None
    perceptual_distance: float | None = None
    converged_psnr: float | None = None
    class_accuracy: float | None = None
    accuracies: Mapping[str, float] = field(default_factory=dict)
    label_divergence: float | None = None
    frechet_distance: float | None = None
    peak_bytes: int | None = None
    margins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {**asdict(self), **self.accuracies}.items():
            if isinstance(value, float) and math.isnan(value):
                raise InvalidArgumentError(
                    f"{name} of the row '{self.name}' is NaN; leave it out if it is not known."
                )


@dataclass(frozen=True)
class Report:
    """A table of rows; ``str()`` gives an aligned plain-text table.

    Columns without any value are omitted; single missing values are shown as a dash.

    Example:
        >>> rows = (ReportRow("uncached", compute=1.0), ReportRow("cached", compute=0.5, psnr=38.2))
        >>> print(Report(rows, title="Demo"))
        Demo
                  compute  PSNR, dB
        uncached  100.0 %         -
        cached     50.0 %      38.2

    Attributes:
        rows: Rows in display order.
        title: Title above the table; may be empty.
        notes: Sentences below the table.
    """

    rows: tuple[ReportRow, ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.to_text()

    def header(self) -> list[str]:
        """Returns the headings of columns with values; the heading of the names is empty."""
        return ["", *(_heading(column) for column in self._columns())]

    def cells(self) -> list[list[str]]:
        """Returns the cells of the table: one list per row, for the columns of `header`."""
        columns = self._columns()
        return [[row.name, *(_cell(row, column) for column in columns)] for row in self.rows]

    def to_text(self) -> str:
        """Returns an aligned table, for a terminal or a log."""
        lines = [self.header(), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*([self.title] if self.title else []), *table, *self.notes])

    def to_markdown(self) -> str:
        """Returns a Markdown table, for a README or a model card."""
        lines = [self.header(), *self.cells()]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        rule = ["---", *["---:"] * (len(escaped[0]) - 1)]
        table = [f"| {' | '.join(line)} |" for line in (escaped[0], rule, *escaped[1:])]
        above = [f"**{self.title}**", ""] if self.title else []
        below = ["", *self.notes] if self.notes else []
        return "\n".join([*above, *table, *below])

    def to_json(self) -> str:
        """Returns a JSON document with values in full precision.

        Missing values are null. Infinite values, such as the PSNR of identical images, are the
        string "inf".
        """
        return json.dumps(self.document(), indent=2, ensure_ascii=False, allow_nan=False)

    def document(self) -> dict[str, Any]:
        """Returns the content of ``to_json``, for inclusion in another document."""
        rows = [{name: _finite(value) for name, value in asdict(row).items()} for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}

    def _repr_html_(self) -> str:
        """What a notebook shows: the table and its notes."""
        parts = [table(self.header(), self.cells()), *map(paragraph, self.notes)]
        return fragment(self.title, *parts)

    def _columns(self) -> list[str]:
        """Returns the fields, or ``accuracies.NAME``, with a value in some row."""
        attributes = dict.fromkeys(name for row in self.rows for name in row.accuracies)
        names = [
            column
            for name in COLUMNS
            for column in ([f"{name}.{x}" for x in attributes] if name == "accuracies" else [name])
        ]
        return [x for x in names if any(_value(row, x) is not None for row in self.rows)]


def _value(row: ReportRow, column: str) -> float | None:
    name, _, attribute = column.partition(".")
    value: float | None = row.accuracies.get(attribute) if attribute else getattr(row, name)
    return value


def _heading(column: str) -> str:
    name, _, attribute = column.partition(".")
    return f"{attribute} accuracy" if attribute else COLUMNS[name][0]


def _written(column: str) -> Callable[[float], str]:
    return COLUMNS[column.partition(".")[0]][1]


def _size(count: float) -> str:
    """Formats bytes in the largest unit with a value of at least 1."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(int(math.log2(count) // 10) if count >= 1 else 0, len(units) - 1)
    return f"{count / 1024**power:.{1 if power else 0}f} {units[power]}"


def _significant(value: float) -> str:
    """Formats three significant digits, with at most six decimals."""
    if value == 0:
        return "0"
    decimals = min(6, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{decimals}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", "{:d}".format),
    "compute": ("compute", _percent),
    "time": ("time", "× {:.2f}".format),
    "seconds": ("seconds", "{:.2f}".format),
    "psnr": ("PSNR, dB", "{:.1f}".format),
    "ssim": ("SSIM", "{:.4f}".format),
    "snr": ("SNR, dB", "{:.1f}".format),
    "log_spectral_distance": ("log-spectral distance, dB", "{:.2f}".format),
    "stft_distance": ("STFT distance", _significant),
    "relative_error": ("relative error", _significant),
    "motion_error": ("motion error", _significant),
    "temporal_consistency": ("temporal consistency", "{:.4f}".format),
    "perceptual_distance": ("perceptual distance", _significant),
    "converged_psnr": ("PSNR to converged, dB", "{:.1f}".format),
    "class_accuracy": ("class accuracy", _percent),
    "accuracies": ("accuracy", _percent),
    "label_divergence": ("label KL, nats", _significant),
    "frechet_distance": ("Frechet distance", _significant),
    "peak_bytes": ("memory kept", _size),
}
"""Column heading and number format of each field."""


def _cell(row: ReportRow, column: str) -> str:
    value, written = _value(row, column), _written(column)
    if value is None:
        return MISSING
    if math.isinf(value):
        return "inf"
    margin = row.margins.get(column)
    if margin is None:
        return written(value)
    return f"{written(value).removesuffix(' %')} ± {written(margin).removeprefix('× ')}"


def _finite(value: object) -> object:
    return str(value) if isinstance(value, float) and math.isinf(value) else value
