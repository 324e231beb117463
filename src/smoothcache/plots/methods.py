"""Quality over cost for many methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import InvalidArgumentError
from .style import (
    BLACK,
    CYCLE,
    GREY,
    LARGE,
    NORMAL,
    SMALL,
    Path,
    new_figure,
    save_figure,
    tidy_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..metrics.report import ReportRow


MARKERS = "osD^vPXh"


def plot_methods(
    rows: Sequence[ReportRow],
    path: Path | None = None,
    *,
    column: str = "psnr",
    label: str = "PSNR against uncached, dB",
    panels: Mapping[str, Sequence[str]] | None = None,
    emphasised: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Draws quality over cost: a line per family of methods, a point per setting.

    Args:
        rows: Rows with a family and a compute; rows without a finite value are omitted.
        path: File to save; its extension determines the format. None does not save.
        column: Field of the rows to draw.
        label: Axis label of that field.
        panels: Families of each panel, by panel title; None draws all in one panel.
        emphasised: Families drawn in bold in every panel.
        title: Title of the figure.

    Returns:
        The figure, whether it is saved or not.

    Raises:
        InvalidArgumentError: If no row has a family, a compute and a finite value.
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> from smoothcache.metrics.report import ReportRow
        >>> rows = [ReportRow("n = 2", family="FORA", compute=0.5, psnr=35.0)]
        >>> len(plot_methods(rows).axes)
        1
    """
    lines = _lines_by_family(rows, column)
    if not lines:
        raise InvalidArgumentError(f"no row has a family, a compute below 1 and a {column}.")
    if panels is None:
        panels = {"": [family for family in lines if family not in emphasised]}
    figure = new_figure(width=1.2 + 5.2 * len(panels), height=6.2)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (name, families) in zip(axes, panels.items(), strict=True):
        shown = [family for family in families if family in lines]
        for i, family in enumerate(shown):
            colour = (*CYCLE, GREY)[i % (len(CYCLE) + 1)]
            style = ("-", (0, (4, 1.5)), (0, (1, 1)))[i // (len(CYCLE) + 1) % 3]
            x, y = zip(*lines[family], strict=True)
            panel.plot(x, y, color=colour, linestyle=style, linewidth=1.2, marker=MARKERS[i % 8],
                       markersize=4, label=family)  # fmt: skip
        for i, family in enumerate(x for x in emphasised if x in lines):
            x, y = zip(*lines[family], strict=True)
            panel.plot(x, y, color=BLACK, linestyle=("-", (0, (2, 1)))[i % 2], linewidth=2.2,
                       marker="*", markersize=9, label=family)  # fmt: skip
        tidy_axes(panel, title=name)
        panel.set_xlabel("compute, share of the uncached MACs", fontsize=NORMAL)
        panel.grid(color="#EBEBEB", linewidth=0.8)
        panel.set_xlim(left=0)
        panel.tick_params(labelleft=True)
        panel.legend(
            frameon=False, fontsize=SMALL - 0.5, loc="upper left", bbox_to_anchor=(-0.02, -0.13),
            ncols=2, handlelength=2.6,
        )  # fmt: skip
    axes[0].set_ylabel(label, fontsize=NORMAL)
    if title:
        figure.suptitle(title, fontsize=LARGE, color=BLACK, x=0.01, ha="left")
    return save_figure(figure, path)


def _lines_by_family(
    rows: Sequence[ReportRow], column: str
) -> dict[str, list[tuple[float, float]]]:
    """Returns (compute, value) of the rows by family, the cheapest first."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value = getattr(row, column)
        if row.family and row.compute is not None and value is not None and math.isfinite(value):
            lines.setdefault(row.family, []).append((row.compute, value))
    return {family: sorted(points) for family, points in lines.items()}
