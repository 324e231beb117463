"""Samples of several modalities, uncached and cached, in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError
from ..files.media import rgb_pixels
from .samples import _strip
from .style import LARGE, SMALL, Path, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Panel:
    """Samples of one modality.

    Attributes:
        title: Above them, for example the model's name.
        rows: A name and samples for each row, of the same seeds: images
            [batch, channels, height, width] or clips [batch, frames, channels, height, width] in
            [0, 1], or sounds [batch, channels, samples]. Of clips the frames of the first are
            drawn.
        sampling_rate: Of sounds, samples a second.
    """

    title: str
    rows: Sequence[tuple[str, Tensor]]
    sampling_rate: int | None = None


def plot_teaser(panels: Sequence[Panel], path: Path | None = None) -> Figure:
    """Draws uncached and cached samples of several modalities below each other.

    Source: Figure 1 of Liu et al., "SmoothCache", arXiv 2411.10510.

    Args:
        panels: One for each modality.
        path: Where to save the picture.

    Returns:
        The figure, whether it is saved or not.

    Raises:
        InvalidArgumentError: If there is nothing to draw, or a sound has no sampling rate.
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> images = torch.zeros(4, 3, 8, 8)
        >>> figure = plot_teaser([Panel("images", [("uncached", images), ("cached", images)])])
        >>> len(figure.axes)
        2
    """
    if not panels or any(not panel.rows for panel in panels):
        raise InvalidArgumentError("give at least one panel with at least one row of samples.")
    strips = [[(name, _drawn(panel, samples)) for name, samples in panel.rows] for panel in panels]
    width, gap, between, margin = 7.4, 0.05, 0.34, 0.05
    longest = max(len(name) for panel in strips for name, _ in panel)
    left = 0.25 + 0.065 * longest
    heights = [[width * strip.shape[0] / strip.shape[1] for _, strip in panel] for panel in strips]
    total = sum(sum(panel) + gap * len(panel) + between for panel in heights) + margin
    figure = new_figure(width=left + width + margin, height=total, layout="none")
    size = (left + width + margin, total)
    top = total
    for panel, drawn, tall in zip(panels, strips, heights, strict=True):
        top -= between
        figure.text(left / size[0], (top + 0.08) / total, panel.title, fontsize=LARGE, va="bottom")
        for (name, strip), height in zip(drawn, tall, strict=True):
            place = (left / size[0], (top - height) / total, width / size[0], height / total)
            axes = figure.add_axes(place)
            axes.imshow(strip, cmap="magma", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            axes.set_ylabel(name, fontsize=SMALL, rotation=0, ha="right", va="center", labelpad=6)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_frame_on(False)
            top -= height + gap
    return save_figure(figure, path)


def _drawn(panel: Panel, samples: Tensor) -> npt.NDArray[np.float32]:
    """Samples side by side: pictures, frames or spectrograms."""
    if samples.ndim == 3:
        from ..metrics.audio import log_mel  # brings torch with it

        if panel.sampling_rate is None:
            raise InvalidArgumentError(f"the sounds of '{panel.title}' need a sampling rate.")
        levels = log_mel(samples.detach().cpu(), panel.sampling_rate).flip(1)
        return _strip(np.clip(1 + np.asarray(levels, dtype=np.float32) / 90, 0, 1))
    return _strip(rgb_pixels(samples[0] if samples.ndim == 5 else samples))
