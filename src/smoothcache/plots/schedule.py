"""Map of a schedule: the steps that compute each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..optional import optional_module
from .style import (
    NORMAL,
    Path,
    count_of_steps,
    kind_name,
    legend_above,
    new_figure,
    save_figure,
    tidy_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..schedule.row import Row
    from ..schedule.schedule import Schedule


COMPUTED, REUSED = "#1B4965", ("#DCE9F2", "#FBE0C3", "#DDEBD3", "#F1DDEA")


def plot_schedule(schedule: Schedule, path: Path | None = None, *, title: str = "") -> Figure:
    """Draws layers over steps: dark where a layer is computed, light where it is reused.

    Layers are grouped by kind, in model order from top to bottom. The shade of a reused step
    indicates the predictor.

    Args:
        schedule: A bound or unbound schedule.
        path: File to save; its extension determines the format. None does not save.
        title: Prefix of the title, which shows steps and cost.

    Returns:
        The figure, whether it is saved or not.

    Raises:
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> from smoothcache import Row, Schedule
        >>> figure = plot_schedule(Schedule(4, {"attn": Row.uniform(4, 2)}))
        >>> figure.axes[0].get_xlabel()
        'step'
    """
    groups = _rows_by_kind(schedule)
    rows = [row for group in groups.values() for row in group]
    predictors = list(dict.fromkeys(row.predictor for row in rows if False in row.computed))
    shades = {name: REUSED[i % len(REUSED)] for i, name in enumerate(predictors)}
    row_height = min(0.3, max(0.05, 4.0 / len(rows)))
    between = 0.07 / row_height
    length = len(rows) + between * (len(groups) - 1)
    figure = new_figure(
        width=min(11.0, max(5.4, 1.9 + 0.13 * schedule.num_steps)),
        height=1.35 + row_height * length,
    )
    panel = figure.subplots()
    top, middles = 0.0, []
    for group in groups.values():
        _draw_rows(panel, group, shades, top, lines=row_height > 0.12)
        middles.append(top + len(group) / 2)
        top += len(group) + between
    for step in range(1, schedule.num_steps):
        panel.axvline(step - 0.5, color="white", linewidth=0.6)
    panel.set_xlim(-0.5, schedule.num_steps - 0.5)
    panel.set_ylim(length, 0)
    names = [f"{name}\n× {len(group)}" if schedule.layers else name
             for name, group in groups.items()]  # fmt: skip
    panel.set_yticks(middles, names)
    ticker = optional_module("matplotlib.ticker", extra="plots")
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    panel.set_xlabel("step", fontsize=NORMAL)
    tidy_axes(panel)
    for side in ("left", "bottom"):
        panel.spines[side].set_visible(False)
    panel.tick_params(axis="y", length=0, labelsize=NORMAL)
    patch = optional_module("matplotlib.patches", extra="plots").Patch
    keys = {"computed": COMPUTED, **{f"reused ({name})": shades[name] for name in predictors}}
    legend_above(
        figure,
        [patch(facecolor=colour, label=label) for label, colour in keys.items()],
        list(keys),
        title=_schedule_title(schedule, title),
    )
    return save_figure(figure, path)


def _draw_rows(
    panel: Any, rows: Sequence[Row], shades: Mapping[str, str], top: float, *, lines: bool
) -> None:
    """Draws rows as an image, one cell per step, downwards from `top`, with fine separators."""
    colours = optional_module("matplotlib.colors", extra="plots")
    cells = [
        COMPUTED if computed else shades[row.predictor] for row in rows for computed in row.computed
    ]
    pixels = colours.to_rgba_array(cells).reshape(len(rows), -1, 4)
    extent = (-0.5, pixels.shape[1] - 0.5, top + len(rows), top)
    panel.imshow(pixels, aspect="auto", interpolation="nearest", extent=extent)
    for row in range(1, len(rows) if lines else 1):
        panel.axhline(top + row, color="white", linewidth=0.4)


def _rows_by_kind(schedule: Schedule) -> dict[str, list[Row]]:
    """Returns rows by group: layers of a kind, or each name of an unbound schedule."""
    kinds = {layer.path: kind_name(layer.kind) for layer in schedule.layers or ()}
    groups: dict[str, list[Row]] = {}
    for name, row in schedule.rows.items():
        groups.setdefault(kinds.get(name, name), []).append(row)
    return groups


def _schedule_title(schedule: Schedule, title: str) -> str:
    cost = (
        f"{schedule.compute:.1%} of the multiply-accumulates"
        if schedule.compute is not None
        else f"{schedule.table().mean():.1%} of the layers computed"
    )
    return f"{title + ': ' if title else ''}{count_of_steps(schedule.num_steps)}, {cost}"
