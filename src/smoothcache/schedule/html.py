"""A schedule as HTML: which steps compute which layers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ..files.markup import attribute
from .row import Row

if TYPE_CHECKING:
    from .schedule import Schedule

MOST_ROWS = 48  # what a reader scrolls through


def schedule_map(schedule: Schedule) -> str:
    """A line for each distinct row: its layers, a cell for each step, the number computed.

    Args:
        schedule: Bound to a model or not.

    Returns:
        HTML in which all names are escaped; its classes are those of ``files.markup.STYLE``.
    """
    groups = _distinct_rows(schedule)
    shown = list(groups.items())[:MOST_ROWS]
    lines = [_line(name, row, count) for (name, row), count in shown]
    if rest := len(groups) - len(shown):
        lines.append(f'<p class="sc-muted">and {rest} more rows</p>')
    key = "".join(
        f'<span><svg viewBox="0 0 1 1" aria-hidden="true"><rect class="{css}" width="1" '
        f'height="1"/></svg>{word}</span>'
        for css, word in (("sc-on", "computed"), ("sc-off", "reused"))
    )
    return f'<div class="sc-map"><div class="sc-key">{key}</div>{"".join(lines)}</div>'


def _distinct_rows(schedule: Schedule) -> dict[tuple[str, Row], int]:
    """Kind or name, and row -> for how many layers."""
    kinds = {layer.path: layer.kind for layer in schedule.layers or ()}
    groups: dict[tuple[str, Row], int] = {}
    for name, row in schedule.rows.items():
        key = (kinds.get(name, name), row)
        groups[key] = groups.get(key, 0) + 1
    return groups


def _line(name: str, row: Row, count: int) -> str:
    steps, computed = len(row.computed), sum(row.computed)
    spoken = (
        f"{name}: {computed} of {steps} steps computed ({_listed_steps(row.computed)}), "
        f"the others reused by {row.predictor}"
    )
    layers = f" × {count}" if count > 1 else ""
    return (
        f'<div class="sc-row"><span>{escape(name)}{layers}</span>'
        f'<svg viewBox="0 0 {steps} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{attribute(spoken)}"><title>{escape(spoken)}</title>{_cells(row.computed)}'
        f'</svg><span class="sc-count">{computed} / {steps}</span></div>'
    )


def _cells(computed: Sequence[bool]) -> str:
    """One path for all computed steps and one for all reused ones."""

    def path(wanted: bool, css: str) -> str:
        moves = "".join(f"M{i + 0.05:g} 0h.9v1h-.9z" for i, x in enumerate(computed) if x is wanted)
        return f'<path class="{css}" d="{moves}"/>' if moves else ""

    return path(True, "sc-on") + path(False, "sc-off")


def _listed_steps(computed: Sequence[bool]) -> str:
    return ", ".join(str(i) for i, x in enumerate(computed) if x)
