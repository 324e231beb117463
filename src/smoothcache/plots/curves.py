"""Error curves per kind of layer, and the composition of a model's cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InvalidArgumentError
from .style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    NORMAL,
    ORANGE,
    SMALL,
    Path,
    annotate_right_edge,
    count_of_steps,
    cycle_of_colours,
    grid_shape,
    in_display_order,
    kind_colour,
    kind_name,
    legend_above,
    new_figure,
    save_figure,
    tidy_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..calibration.curves import Calibration


def plot_error_curves(
    calibration: Calibration,
    path: Path | None = None,
    *,
    gaps: Iterable[int] | None = None,
    alphas: Sequence[float] = (),
) -> Figure:
    """Draws the relative L1 error of reuse at every step: one panel per kind, one line per gap.

    Bands are 95 % confidence intervals over the samples.

    Source: Figure 2 of Liu et al., "SmoothCache", arXiv 2411.10510.

    Args:
        calibration: Calibration to draw.
        path: File to save; its extension determines the format. None does not save.
        gaps: Gaps to draw, in steps; by default all measured gaps.
        alphas: Thresholds to draw as horizontal lines.

    Returns:
        The figure, whether it is saved or not.

    Raises:
        InvalidArgumentError: If a gap was not measured.
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> import numpy as np
        >>> from smoothcache import CacheLayer, Calibration
        >>> layer = CacheLayer("blocks.0.ff", kind="ffn", block="blocks.0", macs=60)
        >>> errors = np.array([[[[np.nan, 0.5, 0.25]]]])
        >>> calibration = Calibration((layer,), errors, total_macs=80, timesteps=(9.0, 5.0, 1.0))
        >>> figure = plot_error_curves(calibration, alphas=[0.3])
        >>> figure.axes[0].get_ylabel()
        'relative L1 error'
    """
    chosen = tuple(range(1, calibration.max_gap + 1) if gaps is None else gaps)
    kinds = calibration.kinds
    rows, columns = grid_shape(len(kinds))
    figure = new_figure(width=max(5.6, 1.2 + 3.1 * columns), height=1.0 + 2.4 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    steps = np.arange(calibration.num_steps)
    for i, (panel, kind) in enumerate(zip(panels, kinds, strict=False)):
        for gap, colour in zip(chosen, cycle_of_colours(len(chosen)), strict=True):
            curve = calibration.curve(gap=gap, kind=kind)
            panel.plot(
                steps, curve.mean, color=colour, linewidth=1.6, label=f"{count_of_steps(gap)} old"
            )
            if not np.isnan(curve.low).all():
                low = np.maximum(curve.low, 0)
                panel.fill_between(steps, low, curve.high, color=colour, alpha=0.3, linewidth=0)
        for alpha in alphas:
            panel.axhline(alpha, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            if i % columns == columns - 1 or i == len(kinds) - 1:
                annotate_right_edge(panel, alpha, f"α = {alpha:g}")
        count = sum(layer.kind == kind for layer in calibration.layers)
        tidy_axes(panel, title=f"{kind_name(kind)}  ({count} layers)")
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
    legend_above(figure, handles, labels, title=f"{title}\n{samples}")
    return save_figure(figure, path)


def composition(calibration: Calibration) -> dict[str, float]:
    """Returns the fraction of a step's MACs in each kind of layer, and in the rest as "other".

    Args:
        calibration: Calibration with known costs.

    Returns:
        Fractions in [0, 1] by kind of layer, which sum to 1.

    Raises:
        InvalidArgumentError: If the calibration has no costs.

    Example:
        >>> from smoothcache import CacheLayer, Calibration
        >>> layer = CacheLayer("blocks.0.ff", kind="ffn", block="blocks.0", macs=60)
        >>> composition(Calibration((layer,), [[[[float("nan")]]]], 80, timesteps=(0.0,)))
        {'ffn': 0.75, 'other': 0.25}
    """
    if not calibration.total_macs or any(layer.macs is None for layer in calibration.layers):
        raise InvalidArgumentError("the calibration has no MACs, so the composition is unknown.")
    shares = {
        kind: sum(layer.macs or 0 for layer in calibration.layers if layer.kind == kind)
        / calibration.total_macs
        for kind in calibration.kinds
    }
    return {**shares, "other": max(0.0, 1 - sum(shares.values()))}


def plot_composition(
    what: Calibration | Sequence[tuple[str, Mapping[str, float]]], path: Path | None = None
) -> Figure:
    """Draws the fraction of a step's MACs in each kind of layer: one bar per model.

    Source: Figure 4 of Liu et al., "SmoothCache", arXiv 2411.10510.

    Args:
        what: A calibration, or pairs of a model's name and the fraction of each kind, in [0, 1].
        path: File to save; its extension determines the format. None does not save.

    Returns:
        The figure, whether it is saved or not.

    Raises:
        InvalidArgumentError: If there is nothing to draw, or a calibration has no costs.
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> figure = plot_composition([("my model", {"self_attn": 0.4, "ffn": 0.5, "other": 0.1})])
        >>> figure.axes[0].get_xlim() == (0, 100)
        True
    """
    if isinstance(what, Sequence):
        bars = list(what)
    else:
        bars = [(what.model.class_name if what.model else "model", composition(what))]
    if not bars:
        raise InvalidArgumentError("pass the composition of at least one model.")
    kinds = in_display_order({kind for _, shares in bars for kind in shares})
    figure = new_figure(width=7.2, height=1.35 + 0.5 * len(bars))
    panel = figure.subplots()
    left = np.zeros(len(bars))
    for kind in kinds:
        colour = kind_colour(kind)
        widths = np.array([100 * shares.get(kind, 0.0) for _, shares in bars])
        drawn = panel.barh(
            range(len(bars)), widths, left=left, height=0.62, color=colour, edgecolor="white",
            linewidth=1, label=kind_name(kind),
        )  # fmt: skip
        ink = "white" if colour in (BLUE, GREEN, ORANGE) else BLACK
        texts = [f"{width:.1f}" if width >= 5 else "" for width in widths]
        panel.bar_label(drawn, texts, label_type="center", color=ink, fontsize=SMALL)
        left += widths
    panel.set_yticks(range(len(bars)), [name for name, _ in bars])
    panel.invert_yaxis()
    panel.set_xlim(0, 100)
    panel.set_xlabel("share of the multiply-accumulates of a step, %", fontsize=NORMAL)
    tidy_axes(panel)
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0, labelsize=NORMAL)
    legend_above(figure, *panel.get_legend_handles_labels(), title=None)
    return save_figure(figure, path)
