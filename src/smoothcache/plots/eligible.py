"""Which parts of a model can be reused, drawn from what ``find_layers`` finds in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..layers.find import find_layers
from ..layers.layer import CacheLayer
from ..model.target import Target
from ..optional import optional_module
from .style import (
    BLACK,
    BLUE,
    GREEN,
    NORMAL,
    ORANGE,
    SMALL,
    Path,
    in_display_order,
    kind_colour,
    kind_name,
    legend_above,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

ALWAYS = "#F1F1F1"
PART = "#FFFFFF99"  # of a block that is reused as a whole


@dataclass(frozen=True)
class Box:
    """A part of a model.

    Attributes:
        name: Of the module in its parent.
        class_name: Of the module.
        kind: Of the layer that it is or holds; None if it is always computed.
        count: How many like it follow each other.
    """

    name: str
    class_name: str
    kind: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Column:
    """A module and its parts, in the order in which they were defined.

    Attributes:
        title: Of the module.
        boxes: Its parts.
        kind: If the module is reused as a whole.
    """

    title: str
    boxes: tuple[Box, ...]
    kind: str | None = None


def plot_eligible_layers(
    model: Any,
    path: Path | None = None,
    *,
    layers: Sequence[CacheLayer] | None = None,
    title: str = "",
) -> Figure:
    """Draws a model's kinds of blocks, coloured where an output can be reused.

    The first column of each denoiser is the denoiser itself, with what is always computed around
    its blocks; then follows one column for each kind of block.

    Source: Figure 3 of Liu et al., "SmoothCache", arXiv 2411.10510, for any model.

    Args:
        model: A pipeline or a module.
        path: Where to save the picture.
        layers: What can be reused; by default what ``find_layers`` finds.
        title: Above the picture; by default the denoiser's class.

    Returns:
        The figure, whether it is saved or not.

    Raises:
        LayersNotFoundError: If the model has no layer to reuse.
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=3)
        >>> figure = plot_eligible_layers(model)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['self-attention', 'feed-forward', 'always computed']
    """
    found = list(find_layers(model) if layers is None else layers)
    columns = columns_of(model, found)
    kinds = in_display_order({layer.kind for layer in found})
    most = max(len(column.boxes) for column in columns)
    figure = new_figure(width=0.3 + 2.35 * len(columns), height=1.5 + 0.42 * most)
    patches = optional_module("matplotlib.patches", extra="plots")
    panel = figure.subplots()
    for number, column in enumerate(columns):
        _draw(panel, patches, column, number)
    panel.set_xlim(-0.05, len(columns) - 0.02)
    panel.set_ylim(most + 0.15, -1.25)
    panel.axis("off")
    handles = [patches.Patch(facecolor=kind_colour(kind)) for kind in kinds]
    handles.append(patches.Patch(facecolor=ALWAYS, edgecolor="#BBBBBB"))
    names = [*map(kind_name, kinds), "always computed"]
    shown = title or ", ".join(type(x).__name__ for x in Target.of(model).denoisers.values())
    legend_above(figure, handles, names, title=shown)
    return save_figure(figure, path)


def columns_of(model: Any, layers: Sequence[CacheLayer]) -> list[Column]:
    """The denoisers and their kinds of blocks, each once."""
    columns: list[Column] = []
    for name, denoiser in Target.of(model).denoisers.items():
        start = f"{name}." if name else ""
        own = [x for x in layers if x.path == name or x.path.startswith(start)]
        kinds = {x.path.removeprefix(start): x.kind for x in own}
        blocks = list(dict.fromkeys(x.block.removeprefix(start) for x in own))
        columns.append(_denoiser(denoiser, blocks, kinds))
        seen: dict[tuple[str, tuple[Box, ...], str | None], list[str]] = {}
        for block in blocks:
            if block:
                parts = _parts(denoiser.get_submodule(block), block, kinds)
                key = (type(denoiser.get_submodule(block)).__name__, parts, kinds.get(block))
                seen.setdefault(key, []).append(block)
        for (class_name, parts, kind), members in seen.items():
            heading = f"{class_name}\n× {len(members)}"
            columns.append(Column(heading, parts, kind))
    return columns


def _denoiser(denoiser: nn.Module, blocks: Sequence[str], kinds: dict[str, str]) -> Column:
    boxes = []
    for name, child in denoiser.named_children():
        inside = [block for block in blocks if f"{block}.".startswith(f"{name}.")]
        kind = kinds.get(name) or ("blocks" if inside else None)
        boxes.append(Box(name, type(child).__name__, kind, max(1, len(inside))))
    return Column(type(denoiser).__name__, tuple(boxes), kinds.get(""))


def _parts(block: nn.Module, path: str, kinds: dict[str, str]) -> tuple[Box, ...]:
    """The children of a block; a child that holds a layer has its kind."""
    boxes = []
    for name, child in block.named_children():
        own = f"{path}.{name}"
        inside = [kind for at, kind in kinds.items() if f"{at}.".startswith(f"{own}.")]
        boxes.append(Box(name, type(child).__name__, inside[0] if inside else None))
    return tuple(boxes)


def _draw(panel: Any, patches: Any, column: Column, number: int) -> None:
    height = len(column.boxes)
    frame = patches.FancyBboxPatch(
        (number, 0), 0.9, height, boxstyle="round,pad=0.0,rounding_size=0.04",
        facecolor=kind_colour(column.kind) if column.kind else "white",
        edgecolor="#888888", linewidth=0.9,
    )  # fmt: skip
    panel.add_patch(frame)
    panel.text(
        number + 0.45, -0.12, column.title, ha="center", va="bottom", fontsize=NORMAL, color=BLACK
    )
    for row, box in enumerate(column.boxes):
        is_stack = box.kind == "blocks"
        plain = PART if column.kind else ALWAYS
        colour = "white" if is_stack else kind_colour(box.kind) if box.kind else plain
        panel.add_patch(
            patches.Rectangle(
                (number + 0.04, row + 0.1), 0.82, 0.8, facecolor=colour,
                edgecolor=BLACK if is_stack else "#BBBBBB", linewidth=1.2 if is_stack else 0.6,
            )
        )  # fmt: skip
        ink = "white" if colour in (BLUE, GREEN, ORANGE) else BLACK
        x, size = number + 0.45, NORMAL if len(box.name) < 20 else SMALL
        below = f"{box.class_name} × {box.count}" if is_stack else box.class_name
        panel.text(x, row + 0.4, _shortened(box.name), ha="center", va="center", fontsize=size,
                   color=ink)  # fmt: skip
        panel.text(x, row + 0.7, _shortened(below), ha="center", va="center",
                   fontsize=SMALL - 1.5, color=ink)  # fmt: skip


def _shortened(text: str) -> str:
    return text if len(text) <= 26 else f"{text[:24]}…"
