"""A calibration as HTML: the error curves of each kind of layer."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ..files.markup import attribute, table
from .card import curve_rows

if TYPE_CHECKING:
    from .curves import Calibration

WIDTH, HEIGHT = 220, 90
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MOST_KINDS = 12


def curve_figures(calibration: Calibration) -> str:
    """A small drawing for each kind of layer, a line for each gap, and the means in a table.

    Args:
        calibration: What was measured.

    Returns:
        HTML in which all names are escaped.
    """
    header, *rows = curve_rows(calibration)
    if not rows:
        return table(["kind"], [[kind] for kind in calibration.kinds])
    shown = calibration.kinds[:MOST_KINDS]
    top = _highest(calibration)
    drawn = "".join(_drawing(calibration, kind, top) for kind in shown)
    gaps = len(header) - 2
    key = "".join(
        f'<span><svg viewBox="0 0 1 1" aria-hidden="true"><rect fill="{_colour(gap)}" width="1" '
        f'height="1"/></svg>{gap} step{"s" * (gap > 1)} old</span>'
        for gap in range(1, gaps + 1)
    )
    return (
        f'<div class="sc-key">{key}</div><div style="display:flex;flex-wrap:wrap;gap:1rem">{drawn}'
        f"</div>{table(header, rows)}"
    )


def _highest(calibration: Calibration) -> float:
    """The largest mean error, which all drawings have at their top."""
    means = [
        calibration.curve(gap=gap, kind=kind).mean
        for kind in calibration.kinds
        for gap in range(1, min(calibration.max_gap, calibration.num_steps - 1) + 1)
    ]
    return float(np.nanmax(np.concatenate(means), initial=0.0)) or 1.0


def _drawing(calibration: Calibration, kind: str, top: float) -> str:
    lines = []
    for gap in range(1, min(calibration.max_gap, calibration.num_steps - 1) + 1):
        mean = calibration.curve(gap=gap, kind=kind).mean
        points = " ".join(
            f"{WIDTH * step / (calibration.num_steps - 1):.1f},{HEIGHT * (1 - error / top):.1f}"
            for step, error in enumerate(mean)
            if not np.isnan(error)
        )
        lines.append(
            f'<polyline fill="none" stroke="{_colour(gap)}" stroke-width="1.6" points="{points}"/>'
        )
    count = sum(layer.kind == kind for layer in calibration.layers)
    spoken = attribute(
        f"error of reused {kind} over {calibration.num_steps} steps, up to {top:.3g}"
    )
    return (
        f'<figure style="margin:0"><figcaption>{escape(kind)} × {count}</figcaption>'
        f'<svg role="img" aria-label="{spoken}" viewBox="-2 -4 {WIDTH + 4} {HEIGHT + 8}" '
        f'width="{WIDTH}" style="max-width:100%"><path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" '
        f'stroke="currentColor" stroke-opacity=".4"/>{"".join(lines)}</svg></figure>'
    )


def _colour(gap: int) -> str:
    return COLOURS[(gap - 1) % len(COLOURS)]
