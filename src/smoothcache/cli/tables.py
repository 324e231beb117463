"""Results as rows and tables for the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calibration.curves import Calibration
from ..layers.layer import CacheLayer
from ..model.costs import human_macs
from ..schedule.schedule import Schedule
from ..steps.resample import CARRIED_OVER, NOT_MEASURED

if TYPE_CHECKING:
    from rich.table import Table

    from ..metrics.report import Report
    from ..searching.result import Measured, SearchResult
    from .checkup import Check


GAP = 2  # spaces between columns
_WIDEST_MAP = 60  # steps of a schedule that fit on a line beside the other columns


def smallest_error(calibration: Calibration) -> float:
    """The smallest error of a reuse with gap 1 where a schedule may reuse; averaged by kind.

    Steps at which a kind does not run, because another denoiser does, have no error.
    """
    first = [calibration.curve(gap=1, kind=kind).mean[1:-1] for kind in calibration.kinds]
    return float(np.nanmin(np.concatenate(first), initial=np.inf))


def kinds(layers: Sequence[CacheLayer], total: int) -> list[dict[str, Any]]:
    """Number, blocks and cost of each kind of layer; a cost is None where it was not observed."""
    rows = []
    for kind in dict.fromkeys(layer.kind for layer in layers):
        members = [layer for layer in layers if layer.kind == kind]
        seen = [layer.macs for layer in members if layer.macs is not None]
        macs = sum(seen) if seen else None
        rows.append(
            {
                "kind": kind,
                "layers": len(members),
                "blocks": len({layer.block for layer in members}),
                "macs": macs,
                "share": macs / total if macs is not None and total else None,
            }
        )
    return rows


def kinds_table(rows: Sequence[dict[str, Any]], total: int) -> Table:
    """What ``kinds`` gave; ``total`` is the MACs of a step, 0 if they were not counted."""
    columns = ["kind", "layers", "blocks"] + ["MACs a step", "share"] * bool(total)
    table = _table(columns)
    for row in rows:
        cost = [_macs(row["macs"]), _percent(row["share"])] if total else []
        _add(table, row["kind"], str(row["layers"]), str(row["blocks"]), *cost)
    if total:
        rest = total - sum(row["macs"] or 0 for row in rows)
        _add(table, "the rest", "", "", human_macs(rest), _percent(rest / total))
    return table


def layers_table(layers: Sequence[CacheLayer], total: int) -> Table:
    """Every layer, with its share of the ``total`` MACs of a step."""
    table = _table(["layer", "kind"] + ["MACs a step", "share"] * bool(total), left=2)
    for layer in layers:
        share = None if layer.macs is None or not total else layer.macs / total
        cost = [_macs(layer.macs), _percent(share)] if total else []
        _add(table, layer.path, layer.kind, *cost)
    return table


def computed_by_kind(schedule: Schedule) -> list[dict[str, Any]]:
    """Of each kind, or name of an unbound schedule: its layers and the steps they compute."""
    kinds = {layer.path: layer.kind for layer in schedule.layers or ()}
    grouped: dict[str, list[tuple[bool, ...]]] = {}
    for name, row in schedule.rows.items():
        grouped.setdefault(kinds.get(name, name), []).append(row.computed)
    return [
        {
            "kind": kind,
            "layers": len(masks),
            "least_computed_steps": min(map(sum, masks)),
            "most_computed_steps": max(map(sum, masks)),
            "compute_steps": [i for i, computed in enumerate(masks[0]) if computed]
            if len(set(masks)) == 1
            else None,
        }
        for kind, masks in grouped.items()
    ]


def schedule_line(schedule: Schedule) -> str:
    """What the schedule is for and what it leaves of the cost."""
    model = schedule.model.class_name if schedule.model else "a model yet to be bound"
    cost = "" if schedule.compute is None else f": {_percent(schedule.compute)} of the MACs"
    note = f" ({NOT_MEASURED})" if CARRIED_OVER in schedule.provenance else ""
    return f"{schedule.num_steps} steps of {model}{cost}{note}"


def schedule_table(schedule: Schedule) -> Table:
    """The computed steps of each kind, drawn where they fit on a line."""
    with_map = schedule.num_steps <= _WIDEST_MAP
    table = _table(["kind", "layers", "computed"] + ["# computed, . reused"] * with_map)
    if with_map:
        table.columns[-1].justify = "left"
    for row in computed_by_kind(schedule):
        low, high = row["least_computed_steps"], row["most_computed_steps"]
        computed = f"{low} of {schedule.num_steps}" if low == high else f"{low} to {high}"
        steps = set(row["compute_steps"] or ())
        drawn = "".join("#" if i in steps else "." for i in range(schedule.num_steps))
        mixed = "differs from layer to layer"
        line = [drawn if row["compute_steps"] else mixed] * with_map
        _add(table, row["kind"], str(row["layers"]), computed, *line)
    return table


def report_tables(report: Report, width: int) -> list[Table]:
    """The cells of a report: its columns, in as many tables as it takes to fit the width."""
    names, *columns = zip(report.header(), *report.cells(), strict=True)
    parts, room = [[names]], width - _width(names)
    for column in columns:
        if room < _width(column) and len(parts[-1]) > 1:
            parts.append([names])
            room = width - _width(names)
        parts[-1].append(column)
        room -= _width(column)
    return [_filled(part) for part in parts]


def _width(column: Iterable[str]) -> int:
    return max(map(len, column)) + GAP


def _filled(columns: Sequence[Sequence[str]]) -> Table:
    """A table of columns that begin with their names."""
    header, *rows = zip(*columns, strict=True)
    table = _table(header)
    for row in rows:
        _add(table, *row)
    return table


def _table(columns: Iterable[str], *, left: int = 1) -> Table:
    """An empty table whose first columns are texts, the others numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    return table


def _add(table: Table, *cells: str) -> None:
    """A row, in which brackets are no markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _macs(value: int | None) -> str:
    return "-" if value is None else human_macs(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def checks_table(checks: Sequence[Check]) -> Table:
    """What was tried, whether it works, and what was found."""
    table = _table(["", "", ""], left=3)
    table.show_header = False
    table.columns[-1].no_wrap = False
    marks = {"ok": "✓", "failed": "✗"}
    for check in checks:
        _add(table, marks.get(check.state, "·"), check.name, check.text)
    return table


def measured(row: Measured) -> dict[str, Any]:
    """A way of sampling and its errors, for JSON."""
    return {
        "name": row.name,
        "compute": row.compute,
        "error": row.error,
        "converged_error": row.converged_error,
        "num_steps": row.num_steps,
        "solver": row.solver,
    }


def search_table(result: SearchResult) -> Table:
    """The winner of a search and the baselines without a cache."""
    knows_converged = result.best.converged_error is not None
    table = _table(["way of sampling", "compute", "error", *["to converged"] * knows_converged])
    for row in (result.best, *(x for x in result.baselines if x != result.best)):
        cells = [row.name, f"{row.compute:.1%}", f"{row.error:.4f}"]
        if row.converged_error is not None:
            cells.append(f"{row.converged_error:.4f}")
        _add(table, *cells)
    return table
