"""Pictures of what was measured and planned: error curves, costs, schedules, samples.

Every function returns a matplotlib figure of its own, outside pyplot, and saves it if given a
path. Colours are those of Okabe and Ito, which also the colour-blind tell apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._files import write_atomically
from ._media import FRAMES_PER_SECOND, encoded_clip, rgb_pixels
from ._optional import optional_module
from .errors import InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from .calibration import Calibration
    from .report import ReportRow
    from .schedule import Row, Schedule

Path = str | os.PathLike[str]

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
YELLOW, SKY, BLACK = "#E69F00", "#56B4E9", "#222222"
CYCLE = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY)
GREY, PALE = "#6E6E6E", "#D9D9D9"
COMPUTED, REUSED = "#1B4965", ("#DCE9F2", "#FBE0C3", "#DDEBD3", "#F1DDEA")

KIND_COLOURS = {  # and the order in which kinds are drawn
    "self_attn": BLUE,
    "joint_attn": SKY,
    "cross_attn": GREEN,
    "ffn": YELLOW,
    "block": PINK,
    "model": ORANGE,
    "other": PALE,
}
KIND_NAMES = {
    "self_attn": "self-attention",
    "joint_attn": "joint attention",
    "cross_attn": "cross-attention",
    "ffn": "feed-forward",
}
_PREFIXES = ("refiner_", "spatial_", "temporal_")
SMALL, NORMAL, LARGE = 8.0, 9.0, 10.5
DPI = 160
MARKERS = "osD^vPXh"
MOST_COLUMNS = 3


def plot_error_curves(
    calibration: Calibration,
    path: Path | None = None,
    *,
    gaps: Iterable[int] | None = None,
    alphas: Sequence[float] = (),
) -> Figure:
    """Relative L1 error of a reuse at every step: one panel a kind, one line a gap.

    Bands are 95 % confidence intervals over the samples.

    Source: Figure 2 of Liu et al., "SmoothCache", arXiv 2411.10510.

    Args:
        calibration: What was measured.
        path: Where to save the picture; its ending tells the format.
        gaps: Which gaps to draw, in steps; by default all that were measured.
        alphas: Thresholds to draw as horizontal lines.

    Raises:
        InvalidArgumentError: If a gap was not measured.
        MissingPackageError: If matplotlib is not installed.
    """
    chosen = tuple(range(1, calibration.max_gap + 1) if gaps is None else gaps)
    kinds = calibration.kinds
    rows, columns = _grid(len(kinds))
    figure = _figure(width=max(5.6, 1.2 + 3.1 * columns), height=1.0 + 2.4 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    steps = np.arange(calibration.num_steps)
    for i, (panel, kind) in enumerate(zip(panels, kinds, strict=False)):
        for gap, colour in zip(chosen, _cycled(len(chosen)), strict=True):
            curve = calibration.curve(gap=gap, kind=kind)
            panel.plot(steps, curve.mean, color=colour, linewidth=1.6, label=f"{_steps(gap)} old")
            if not np.isnan(curve.low).all():
                low = np.maximum(curve.low, 0)
                panel.fill_between(steps, low, curve.high, color=colour, alpha=0.3, linewidth=0)
        for alpha in alphas:
            panel.axhline(alpha, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            if i % columns == columns - 1 or i == len(kinds) - 1:
                _beside(panel, alpha, f"α = {alpha:g}")
        count = sum(layer.kind == kind for layer in calibration.layers)
        _tidy(panel, title=f"{_kind_name(kind)}  ({count} layers)")
        panel.set_xlim(0, max(1, calibration.num_steps - 1))
        panel.grid(axis="y", color="#EBEBEB", linewidth=0.8)
        if i % columns == 0:
            panel.set_ylabel("relative L1 error", fontsize=NORMAL)
        if i + columns >= len(kinds):
            panel.set_xlabel("step", fontsize=NORMAL)
            panel.tick_params(labelbottom=True)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    panels[0].set_ylim(bottom=0)
    title = "Error of a reused output"
    if calibration.model:
        title = f"{calibration.model.class_name}: error of a reused output"
    samples = (
        "1 sample"
        if calibration.num_samples == 1
        else (f"mean and 95 % confidence interval of {calibration.num_samples} samples")
    )
    handles, labels = panels[0].get_legend_handles_labels()
    _legend_above(figure, handles, labels, title=f"{title}\n{samples}")
    return _saved(figure, path)


def composition(calibration: Calibration) -> dict[str, float]:
    """Share of each kind of layer in the MACs of a step, and of everything else as "other".

    Raises:
        InvalidArgumentError: If the calibration has no costs.

    Example:
        >>> from smoothcache import CacheLayer, Calibration
        >>> layer = CacheLayer("blocks.0.ff", kind="ffn", block="blocks.0", macs=60)
        >>> composition(Calibration((layer,), [[[[float("nan")]]]], 80, timesteps=(0.0,)))
        {'ffn': 0.75, 'other': 0.25}
    """
    if not calibration.total_macs or any(layer.macs is None for layer in calibration.layers):
        raise InvalidArgumentError("the calibration has no MACs, so no composition either.")
    shares = {
        kind: sum(layer.macs or 0 for layer in calibration.layers if layer.kind == kind)
        / calibration.total_macs
        for kind in calibration.kinds
    }
    return {**shares, "other": max(0.0, 1 - sum(shares.values()))}


def plot_composition(
    what: Calibration | Sequence[tuple[str, Mapping[str, float]]], path: Path | None = None
) -> Figure:
    """What a step spends its MACs on: a bar a model, a segment a kind of layer.

    Source: Figure 4 of Liu et al., "SmoothCache", arXiv 2411.10510.

    Args:
        what: A calibration; or names of models with the shares of each kind, in [0, 1].
        path: Where to save the picture.

    Raises:
        InvalidArgumentError: If there is nothing to draw, or a calibration has no costs.
        MissingPackageError: If matplotlib is not installed.
    """
    if isinstance(what, Sequence):
        bars = list(what)
    else:
        bars = [(what.model.class_name if what.model else "model", composition(what))]
    if not bars:
        raise InvalidArgumentError("give at least one model to draw the composition of.")
    kinds = _in_order({kind for _, shares in bars for kind in shares})
    figure = _figure(width=7.2, height=1.35 + 0.5 * len(bars))
    panel = figure.subplots()
    left = np.zeros(len(bars))
    for kind in kinds:
        colour = _kind_colour(kind)
        widths = np.array([100 * shares.get(kind, 0.0) for _, shares in bars])
        drawn = panel.barh(
            range(len(bars)), widths, left=left, height=0.62, color=colour, edgecolor="white",
            linewidth=1, label=_kind_name(kind),
        )  # fmt: skip
        ink = "white" if colour in (BLUE, GREEN, ORANGE) else BLACK
        texts = [f"{width:.1f}" if width >= 5 else "" for width in widths]
        panel.bar_label(drawn, texts, label_type="center", color=ink, fontsize=SMALL)
        left += widths
    panel.set_yticks(range(len(bars)), [name for name, _ in bars])
    panel.invert_yaxis()
    panel.set_xlim(0, 100)
    panel.set_xlabel("share of the multiply-accumulates of a step, %", fontsize=NORMAL)
    _tidy(panel)
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0, labelsize=NORMAL)
    _legend_above(figure, *panel.get_legend_handles_labels(), title=None)
    return _saved(figure, path)


def plot_schedule(schedule: Schedule, path: Path | None = None, *, title: str = "") -> Figure:
    """Map of layers over steps: dark where a layer is computed, light where it is reused.

    Layers are grouped by kind, in the order of the model from top to bottom; the shade of a
    reused step tells the predictor.

    Args:
        schedule: Bound to a model or not.
        path: Where to save the picture.
        title: Comes before what the title says by itself: steps and cost.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    groups = _rows_by_kind(schedule)
    rows = [row for group in groups.values() for row in group]
    predictors = list(dict.fromkeys(row.predictor for row in rows if False in row.computed))
    shades = {name: REUSED[i % len(REUSED)] for i, name in enumerate(predictors)}
    row_height = min(0.3, max(0.05, 4.0 / len(rows)))
    between = 0.07 / row_height
    length = len(rows) + between * (len(groups) - 1)
    figure = _figure(
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
    _tidy(panel)
    for side in ("left", "bottom"):
        panel.spines[side].set_visible(False)
    panel.tick_params(axis="y", length=0, labelsize=NORMAL)
    patch = optional_module("matplotlib.patches", extra="plots").Patch
    keys = {"computed": COMPUTED, **{f"reused ({name})": shades[name] for name in predictors}}
    _legend_above(
        figure,
        [patch(facecolor=colour, label=label) for label, colour in keys.items()],
        list(keys),
        title=_schedule_title(schedule, title),
    )
    return _saved(figure, path)


def plot_image_grid(
    rows: Sequence[tuple[str, Tensor]],
    reference: Tensor,
    path: Path | None = None,
    *,
    reference_title: str = "uncached",
) -> Figure:
    """Uncached samples, and below them cached ones with what changed, made visible.

    Each row is named with its mean PSNR. Differences are absolute, averaged over channels and
    multiplied by one factor for the whole picture, which the labels name.

    Source: Figure 5 of Liu et al., "SmoothCache", arXiv 2411.10510.

    Args:
        rows: A title and images for each row, [batch, channels, height, width] in [0, 1], of the
            same seeds as the reference.
        reference: The uncached images; the same shape. Each becomes a column.
        path: Where to save the picture.
        reference_title: Names the first row.

    Raises:
        InvalidArgumentError: If there is no row, or images are not as described.
        MissingPackageError: If matplotlib is not installed.
    """
    from .metrics import psnr  # brings torch with it

    if not rows:
        raise InvalidArgumentError("give at least one row of images beside the reference.")
    quality = [float(psnr(images, reference).mean()) for _, images in rows]
    titles = [_with_decibels(title, x) for (title, _), x in zip(rows, quality, strict=True)]
    pictures = [rgb_pixels(images) for _, images in rows]
    lines = _beside_their_differences(titles, pictures, (reference_title, rgb_pixels(reference)))
    strips = [(title, _strip(line)) for title, line in lines]
    return _saved(_stacked(strips, width=_width_of(len(reference))), path)


def animate_clip_grid(
    rows: Sequence[tuple[str, Tensor]],
    reference: Tensor,
    path: Path,
    *,
    reference_title: str = "uncached",
    frames_per_second: float = FRAMES_PER_SECOND,
) -> None:
    """An animated picture: uncached clips, and below them cached ones with what changed.

    Each row is named with its mean PSNR. Differences are absolute, averaged over channels and
    multiplied by one factor for the whole picture, which the labels name.

    Args:
        rows: A title and clips for each row, [batch, frames, channels, height, width] in [0, 1],
            of the same seeds as the reference.
        reference: The uncached clips; the same shape. Each becomes a column.
        path: Where to save the GIF.
        reference_title: Names the first row.
        frames_per_second: How fast it runs.

    Raises:
        InvalidArgumentError: If there is no row, or clips are not as described.
        MissingPackageError: If matplotlib or pillow is not installed.
    """
    from .metrics import psnr_per_frame  # brings torch with it

    if not rows:
        raise InvalidArgumentError("give at least one row of clips beside the reference.")
    quality = [float(psnr_per_frame(clips, reference).mean()) for _, clips in rows]
    titles = [_with_decibels(title, x) for (title, _), x in zip(rows, quality, strict=True)]
    pictures = [rgb_pixels(clips.flatten(0, 1)) for _, clips in rows]
    uncached = rgb_pixels(reference.flatten(0, 1))
    lines = _beside_their_differences(titles, pictures, (reference_title, uncached))
    count, length = reference.shape[:2]
    shots = [
        _stacked([(title, _strip(line[frame::length])) for title, line in lines],
                 width=_width_of(count))
        for frame in range(length)
    ]  # fmt: skip
    frames = [_rendered(shot) for shot in shots]
    write_atomically(path, encoded_clip(frames, frames_per_second=frames_per_second))


def _with_decibels(title: str, decibels: float) -> str:
    measured = "identical" if math.isinf(decibels) else f"PSNR {decibels:.1f} dB"
    return f"{title}\n{measured}"


def _beside_their_differences(
    titles: Sequence[str],
    pictures: Sequence[npt.NDArray[np.float32]],
    reference: tuple[str, npt.NDArray[np.float32]],
) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """The reference, then each row of pictures and its difference from it, made visible.

    All of one factor: pictures [batch, height, width, 3], differences [batch, height, width].
    """
    differences = [np.abs(picture - reference[1]).mean(axis=-1) for picture in pictures]
    factor = _amplification(differences)
    lines = [reference]
    for title, picture, difference in zip(titles, pictures, differences, strict=True):
        lines += [(title, picture), (f"difference\n× {factor}", difference * factor)]
    return lines


def _width_of(columns: int) -> float:
    """Width of a grid in inches."""
    return min(9.0, max(3.2, float(columns)))


def _rendered(figure: Figure) -> npt.NDArray[np.uint8]:
    """The pixels of a figure, [height, width, 3]."""
    backend = optional_module("matplotlib.backends.backend_agg", extra="plots")
    canvas = backend.FigureCanvasAgg(figure)
    canvas.draw()
    pixels: npt.NDArray[np.uint8] = np.array(canvas.buffer_rgba(), dtype=np.uint8)
    return pixels[..., :3]


def plot_spectrograms(
    rows: Sequence[tuple[str, Tensor]],
    reference: Tensor,
    sampling_rate: int,
    path: Path | None = None,
    *,
    reference_title: str = "uncached",
) -> Figure:
    """Log-mel spectrograms of uncached sounds, and below them of cached ones with what changed.

    Time runs to the right and pitch upwards; the darkest is -90 dB of full scale, and of the
    absolute differences the brightest is 30 dB. Each row is named with its mean log-spectral
    distance.

    Source: Figure 6 of Liu et al., "SmoothCache", arXiv 2411.10510.

    Args:
        rows: A title and sounds for each row, [batch, channels, samples], of the same seeds as
            the reference.
        reference: The uncached sounds; the same shape. Each becomes a column.
        sampling_rate: Samples a second.
        path: Where to save the picture.
        reference_title: Names the first row.

    Raises:
        InvalidArgumentError: If there is no row, or sounds are not as described.
        MissingPackageError: If matplotlib is not installed.
    """
    from .metrics import log_mel, log_spectral_distance  # bring torch with them

    if not rows:
        raise InvalidArgumentError("give at least one row of sounds beside the reference.")

    def decibels(sounds: Tensor) -> npt.NDArray[np.float32]:
        return np.asarray(log_mel(sounds.detach().cpu(), sampling_rate).flip(1), dtype=np.float32)

    def shown(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return _strip(np.clip(1 + levels / 90, 0, 1))

    uncached = decibels(reference)
    strips = [(reference_title, shown(uncached))]
    for title, sounds in rows:
        distance = float(log_spectral_distance(sounds, reference).mean())
        levels = decibels(sounds)
        change = np.clip(np.abs(levels - uncached) / 30, 0, 1)
        strips.append((f"{title}\n{distance:.1f} dB off", shown(levels)))
        strips.append(("difference", _strip(change)))
    return _saved(_stacked(strips, width=min(9.0, max(3.2, 1.5 * len(uncached)))), path)


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
    """Cost and quality: a line for each family of methods, a point for each of its settings.

    Args:
        rows: Rows with a family and a compute; those without a finite value are left out.
        path: Where to save the picture.
        column: Field of the rows that is drawn.
        label: What that is.
        panels: Title of a panel -> the families that it shows; one panel with all if None.
        emphasised: Families that are drawn in every panel, in bold.
        title: Above the picture.

    Raises:
        InvalidArgumentError: If no row has something to draw.
        MissingPackageError: If matplotlib is not installed.
    """
    lines = _lines_by_family(rows, column)
    if not lines:
        raise InvalidArgumentError(f"no row has a family, a compute below 1 and a {column}.")
    if panels is None:
        panels = {"": [family for family in lines if family not in emphasised]}
    figure = _figure(width=1.2 + 5.2 * len(panels), height=6.2)
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
        _tidy(panel, title=name)
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
    return _saved(figure, path)


def _lines_by_family(
    rows: Sequence[ReportRow], column: str
) -> dict[str, list[tuple[float, float]]]:
    """Family -> (compute, value) of its rows, the cheapest first."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value = getattr(row, column)
        if row.family and row.compute is not None and value is not None and math.isfinite(value):
            lines.setdefault(row.family, []).append((row.compute, value))
    return {family: sorted(points) for family, points in lines.items()}


def _stacked(strips: Sequence[tuple[str, npt.NDArray[np.float32]]], *, width: float) -> Figure:
    """Named strips of equal size, one below the other, with square pixels; `width` in inches."""
    height = width * strips[0][1].shape[0] / strips[0][1].shape[1]
    longest = max(len(line) for name, _ in strips for line in name.split("\n"))
    left, gap, margin = 0.25 + 0.065 * longest, 0.06, 0.05
    total = (left + width + margin, len(strips) * (height + gap) - gap + 2 * margin)
    figure = _figure(width=total[0], height=total[1], layout="none")
    for i, (name, strip) in enumerate(strips):
        bottom = total[1] - margin - (i + 1) * height - i * gap
        place = (left / total[0], bottom / total[1], width / total[0], height / total[1])
        panel = figure.add_axes(place)
        panel.imshow(strip, cmap="magma", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        panel.set_ylabel(name, fontsize=SMALL, rotation=0, ha="right", va="center", labelpad=6)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_frame_on(False)
    return figure


def _draw_rows(
    panel: Any, rows: Sequence[Row], shades: Mapping[str, str], top: float, *, lines: bool
) -> None:
    """Rows as an image, a cell a step, downwards from `top`, with fine lines between them."""
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
    """Name of a group to its rows: layers of a kind, or each name of an unbound schedule."""
    kinds = {layer.path: _kind_name(layer.kind) for layer in schedule.layers or ()}
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
    return f"{title + ': ' if title else ''}{_steps(schedule.num_steps)}, {cost}"


def _strip(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Images [batch, height, width] or with colours, side by side with a narrow gap between."""
    filling = 1.0 if images.ndim == 4 else math.nan
    gap = max(1, images.shape[2] // 16)
    padding = [(0, 0), (0, 0), (0, gap)] + [(0, 0)] * (images.ndim - 3)
    padded = np.pad(images, padding, constant_values=filling)
    return np.concatenate(list(padded), axis=1)[:, :-gap]


def _amplification(differences: Sequence[npt.NDArray[np.float32]]) -> int:
    """Largest round factor under which hardly any difference is cut off."""
    largest = float(np.quantile(np.stack(differences), 0.995))
    factors = (1, 2, 5, 10, 20, 50, 100)
    return max(factor for factor in factors if factor == 1 or factor * largest <= 1)


def _kind_name(kind: str) -> str:
    for stack in _PREFIXES:
        if kind.startswith(stack):
            return f"{stack[:-1]} {_kind_name(kind.removeprefix(stack))}"
    return KIND_NAMES.get(kind, kind.replace("_", " "))


def _in_order(kinds: Iterable[str]) -> list[str]:
    """Kinds in the order of their colours, unknown ones after them, the rest of the model last."""
    known = list(KIND_COLOURS)
    order = {kind: place for place, kind in enumerate(known)}

    def key(kind: str) -> tuple[bool, int, str]:
        return kind == "other", order.get(_base_kind(kind), len(known)), kind

    return sorted(kinds, key=key)


def _kind_colour(kind: str) -> str:
    """The colour of a kind; temporal layers have a tint of it, those of refiners a shade."""
    colour = KIND_COLOURS.get(_base_kind(kind), PINK)
    if "temporal_" in kind:
        colour = _halfway(colour, 255)
    return _halfway(colour, 0) if kind.startswith("refiner_") else colour


def _halfway(colour: str, to: int) -> str:
    """A colour mixed with as much white (255) or black (0)."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{(value + to) // 2:02X}" for value in channels)


def _base_kind(kind: str) -> str:
    for prefix in _PREFIXES:
        kind = kind.removeprefix(prefix)
    return kind


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _grid(count: int) -> tuple[int, int]:
    columns = min(count, MOST_COLUMNS)
    if count == 4:
        columns = 2
    return math.ceil(count / columns), columns


def _cycled(count: int) -> list[str]:
    return [CYCLE[i % len(CYCLE)] for i in range(count)]


def _figure(*, width: float, height: float, layout: str = "constrained") -> Figure:
    """An empty figure, in inches, that no backend or global state knows of."""
    module = optional_module("matplotlib.figure", extra="plots")
    figure: Figure = module.Figure(figsize=(width, height), layout=layout, dpi=DPI)
    return figure


def _beside(panel: Any, y: float, text: str) -> None:
    panel.annotate(
        text, (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0),
        textcoords="offset points", va="center", fontsize=SMALL, color=GREY,
    )  # fmt: skip


def _tidy(panel: Any, title: str | None = None) -> None:
    if title:
        panel.set_title(title, fontsize=NORMAL, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=SMALL, colors=BLACK)


def _legend_above(
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


def _saved(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=DPI)
    return figure
