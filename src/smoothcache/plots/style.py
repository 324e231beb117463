"""Colours, sizes and helpers shared by all figures; the palette is Okabe and Ito's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..optional import optional_module

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Path = str | os.PathLike[str]
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
YELLOW, SKY, BLACK = "#E69F00", "#56B4E9", "#222222"
CYCLE = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY)
GREY, PALE = "#6E6E6E", "#D9D9D9"
KIND_COLOURS = {
    "self_attn": BLUE,
    "joint_attn": SKY,
    "cross_attn": GREEN,
    "ffn": YELLOW,
    "block": PINK,
    "model": ORANGE,
    "other": PALE,
}
"""Colour of each kind of layer in all figures, in drawing order."""
KIND_NAMES = {
    "self_attn": "self-attention",
    "joint_attn": "joint attention",
    "cross_attn": "cross-attention",
    "ffn": "feed-forward",
}
"""Name of each kind of layer in all figures."""
_PREFIXES = ("refiner_", "spatial_", "temporal_")
SMALL, NORMAL, LARGE = 8.0, 9.0, 10.5
DPI = 160
MOST_COLUMNS = 3


def kind_name(kind: str) -> str:
    for stack in _PREFIXES:
        if kind.startswith(stack):
            return f"{stack[:-1]} {kind_name(kind.removeprefix(stack))}"
    return KIND_NAMES.get(kind, kind.replace("_", " "))


def in_display_order(kinds: Iterable[str]) -> list[str]:
    """Sorts kinds in the order of their colours, then unknown kinds, then "other"."""
    known = list(KIND_COLOURS)
    order = {kind: place for place, kind in enumerate(known)}

    def key(kind: str) -> tuple[bool, int, str]:
        return kind == "other", order.get(_base_kind(kind), len(known)), kind

    return sorted(kinds, key=key)


def kind_colour(kind: str) -> str:
    """Returns the colour of a kind, tinted for temporal layers and shaded for refiners."""
    colour = KIND_COLOURS.get(_base_kind(kind), PINK)
    if "temporal_" in kind:
        colour = _halfway(colour, 255)
    return _halfway(colour, 0) if kind.startswith("refiner_") else colour


def _halfway(colour: str, to: int) -> str:
    """Mixes a colour with the same amount of white (255) or black (0)."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{(value + to) // 2:02X}" for value in channels)


def _base_kind(kind: str) -> str:
    for prefix in _PREFIXES:
        kind = kind.removeprefix(prefix)
    return kind


def count_of_steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def grid_shape(count: int) -> tuple[int, int]:
    columns = min(count, MOST_COLUMNS)
    if count == 4:
        columns = 2
    return math.ceil(count / columns), columns


def cycle_of_colours(count: int) -> list[str]:
    return [CYCLE[i % len(CYCLE)] for i in range(count)]


def new_figure(*, width: float, height: float, layout: str = "constrained") -> Figure:
    """Returns an empty figure, sized in inches, independent of pyplot and backends."""
    module = optional_module("matplotlib.figure", extra="plots")
    figure: Figure = module.Figure(figsize=(width, height), layout=layout, dpi=DPI)
    return figure


def annotate_right_edge(panel: Any, y: float, text: str) -> None:
    panel.annotate(
        text, (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0),
        textcoords="offset points", va="center", fontsize=SMALL, color=GREY,
    )  # fmt: skip


def tidy_axes(panel: Any, title: str | None = None) -> None:
    if title:
        panel.set_title(title, fontsize=NORMAL, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=SMALL, colors=BLACK)


def legend_above(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str], *, title: str | None
) -> None:
    longest = 0.45 + 0.075 * max(map(len, labels), default=0)
    columns = max(1, min(len(labels), int(figure.get_figwidth() / longest)))
    legend = figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False,
        fontsize=SMALL, title=title, title_fontsize=LARGE, alignment="left",
        handlelength=1.6, columnspacing=1.6, borderaxespad=0.3,
    )  # fmt: skip
    legend.get_title().set_color(BLACK)


def save_figure(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=DPI)
    return figure
