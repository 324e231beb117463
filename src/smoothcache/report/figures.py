"""Figures of matplotlib as SVG that stands inside of a page and takes on its colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ..optional import optional_module
from ..plots.methods import MARKERS
from ..plots.style import BLACK, CYCLE, GREY, NORMAL, new_figure, tidy_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of the figures -> those of the page, which are others in the dark.
THEME = {
    BLACK.lower(): "currentColor",
    "#000000": "currentColor",
    "#ebebeb": "var(--grid)",
    GREY.lower(): "var(--muted)",
    "#0072b2": "var(--blue)",
    "#d55e00": "var(--orange)",
    "#009e73": "var(--green)",
}
POINT = "point-"
SHAPES = dict(zip(MARKERS, "●■◆▲▼✚✖⬢", strict=True))
"""Marker of matplotlib -> the character that looks like it."""


@dataclass(frozen=True)
class Point:
    """A way of sampling in the plane of cost and quality.

    Attributes:
        name: What it is called.
        family: Points of a family have one colour, and a line if there are several.
        x: Cost.
        y: Quality.
        text: Its values, as shown when it is pointed at.
        is_marked: Whether it is the one that the summary speaks of.
    """

    name: str
    family: str
    x: float
    y: float
    text: str
    is_marked: bool = False


def inline_svg(figure: Figure, prefix: str, tips: Mapping[str, str] | None = None) -> str:
    """A figure as SVG for the middle of a page.

    Args:
        figure: Of matplotlib.
        prefix: Comes before all identifiers, which are unique in the page then.
        tips: Identifier of a part -> what is said of it when it is pointed at or focused.
    """
    from matplotlib.text import Text

    matplotlib = optional_module("matplotlib", extra="plots")
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name with dollar signs is a name
    data = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "smoothcache"}):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
            figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    svg = data.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\sid="|url\(#|xlink:href="#)', lambda m: m[1] + prefix, svg)
    svg = svg.replace("xlink:href=", "href=")
    for name in ("width", "height"):  # the page gives it its size
        svg = re.sub(rf'^(<svg[^>]*?) {name}="[^"]*"', r"\1", svg)
    svg = re.sub(r"#[0-9a-f]{6}", lambda m: _themed(m[0]), svg)
    for name, tip in (tips or {}).items():
        spoken = escape(tip, quote=True)
        svg = svg.replace(
            f'<g id="{prefix}{name}">',
            f'<g id="{prefix}{name}" class="point" tabindex="0" role="img" '
            f'aria-label="{spoken}" data-tip="{spoken}">',
        )
    return svg.strip()


def plot_points(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    prefix: str,
    unconnected: Sequence[str] = (),
) -> str:
    """Cost and quality as SVG, whose points tell their values when pointed at or focused.

    Args:
        points: What to draw.
        x_label: Name of the cost.
        y_label: Name of the quality.
        prefix: Of identifiers.
        unconnected: Families whose points are several methods, so that no line joins them.
    """
    figure = new_figure(width=4.5, height=3.4)
    panel: Any = figure.subplots()
    families = list(dict.fromkeys(point.family for point in points))
    colours = [(*CYCLE, GREY)[i % (len(CYCLE) + 1)] for i in range(len(families))]
    tips = {f"{POINT}{i}": f"{point.name}: {point.text}" for i, point in enumerate(points)}
    number = {id(point): i for i, point in enumerate(points)}
    for i, family in enumerate(families):
        members = sorted((x for x in points if x.family == family), key=lambda point: point.x)
        colour, marker = colours[i], _markers(len(families))[i]
        if family not in unconnected:
            panel.plot(
                [x.x for x in members], [x.y for x in members], color=colour, linewidth=1.2,
                alpha=0.6, zorder=1,
            )  # fmt: skip
        for point in members:
            size = 11.0 if point.is_marked else 6.5
            panel.plot(
                [point.x], [point.y], color=colour, marker=marker, markersize=size, zorder=2,
                linestyle="none", gid=f"{POINT}{number[id(point)]}",
            )  # fmt: skip
    tidy_axes(panel)
    panel.set_xlabel(x_label, fontsize=NORMAL)
    panel.set_ylabel(y_label, fontsize=NORMAL)
    panel.grid(color="#EBEBEB", linewidth=0.8)
    panel.set_xlim(left=0)
    key = zip(families, colours, _markers(len(families)), strict=True)
    return inline_svg(figure, prefix, tips) + _legend(key)


def _markers(count: int) -> list[str]:
    """A marker for each family; those of one colour differ."""
    return [MARKERS[i % len(MARKERS)] for i in range(count)]


def _legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Name, colour and marker of each family, in lines as long as the page is wide."""
    items = "".join(
        f'<li><span aria-hidden="true" style="color:{_themed(colour)}">{SHAPES[marker]}</span> '
        f"{escape(name)}</li>"
        for name, colour, marker in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _themed(colour: str) -> str:
    return THEME.get(colour.lower(), colour)
