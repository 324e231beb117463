"""Grids of samples: images, clips and spectrograms beside their differences.

Functions return a matplotlib figure independent of pyplot, and save it if a path is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError
from ..files.document import write_atomically
from ..files.media import FRAMES_PER_SECOND, encoded_clip, rgb_pixels
from ..optional import optional_module
from .style import SMALL, Path, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


def plot_image_grid(
    rows: Sequence[tuple[str, Tensor]],
    reference: Tensor,
    path: Path | None = None,
    *,
    reference_title: str = "uncached",
) -> Figure:
    """Draws uncached images, and below them cached images with their differences.

    Each row is labelled with its mean PSNR. Differences are absolute, averaged over channels and
    multiplied by one factor for the whole figure, which the labels show.

    Source: Figure 5 of Liu et al., "SmoothCache", arXiv 2411.10510.

    Args:
        rows: A title and images for each row, [batch, channels, height, width] in [0, 1], of the
            same seeds as the reference.
        reference: The uncached images, of the same shape. Each becomes a column.
        path: File to save; its extension determines the format. None does not save.
        reference_title: Label of the first row.

    Returns:
        The figure, whether it is saved or not.

    Raises:
        InvalidArgumentError: If there is no row, or images have the wrong shape.
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> images = torch.zeros(2, 3, 8, 8)
        >>> figure = plot_image_grid([("every 2nd step", images)], images)
    """
    from ..metrics.fidelity import psnr  # brings torch with it

    if not rows:
        raise InvalidArgumentError("pass at least one row of images beside the reference.")
    quality = [float(psnr(images, reference).mean()) for _, images in rows]
    titles = [_with_decibels(title, x) for (title, _), x in zip(rows, quality, strict=True)]
    pictures = [rgb_pixels(images) for _, images in rows]
    lines = _beside_their_differences(titles, pictures, (reference_title, rgb_pixels(reference)))
    strips = [(title, _strip(line)) for title, line in lines]
    return save_figure(_stacked(strips, width=_width_of(len(reference))), path)


def animate_clip_grid(
    rows: Sequence[tuple[str, Tensor]],
    reference: Tensor,
    path: Path,
    *,
    reference_title: str = "uncached",
    frames_per_second: float = FRAMES_PER_SECOND,
) -> None:
    """Animates uncached clips, and below them cached clips with their differences.

    Each row is labelled with its mean PSNR. Differences are absolute, averaged over channels and
    multiplied by one factor for the whole figure, which the labels show.

    Args:
        rows: A title and clips for each row, [batch, frames, channels, height, width] in [0, 1],
            of the same seeds as the reference.
        reference: The uncached clips, of the same shape. Each becomes a column.
        path: GIF file to write.
        reference_title: Label of the first row.
        frames_per_second: Frame rate.

    Raises:
        InvalidArgumentError: If there is no row, or clips have the wrong shape.
        MissingPackageError: If matplotlib or pillow is not installed.

    Example:
        >>> import tempfile, torch
        >>> clips = torch.zeros(1, 2, 3, 8, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     animate_clip_grid([("every 2nd step", clips)], clips, f"{folder}/clips.gif")
    """
    from ..metrics.video import psnr_per_frame  # brings torch with it

    if not rows:
        raise InvalidArgumentError("pass at least one row of clips beside the reference.")
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
    """Returns the reference, then each row and its difference, amplified by a common factor.

    Pictures are [batch, height, width, 3], differences [batch, height, width].
    """
    differences = [np.abs(picture - reference[1]).mean(axis=-1) for picture in pictures]
    factor = _amplification(differences)
    lines = [reference]
    for title, picture, difference in zip(titles, pictures, differences, strict=True):
        lines += [(title, picture), (f"difference\n× {factor}", difference * factor)]
    return lines


def _width_of(columns: int) -> float:
    """Returns the width of a grid in inches."""
    return min(9.0, max(3.2, float(columns)))


def _rendered(figure: Figure) -> npt.NDArray[np.uint8]:
    """Returns the pixels of a figure, [height, width, 3]."""
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
    """Draws log-mel spectrograms of uncached and cached sounds, and their differences.

    Time runs to the right and frequency upwards. The darkest colour is -90 dB of full scale; the
    brightest absolute difference is 30 dB. Each row is labelled with its mean log-spectral
    distance.

    Source: Figure 6 of Liu et al., "SmoothCache", arXiv 2411.10510.

    Args:
        rows: A title and sounds for each row, [batch, channels, samples], of the same seeds as
            the reference.
        reference: The uncached sounds, of the same shape. Each becomes a column.
        sampling_rate: Sampling rate in Hz.
        path: File to save; its extension determines the format. None does not save.
        reference_title: Label of the first row.

    Returns:
        The figure, whether it is saved or not.

    Raises:
        InvalidArgumentError: If there is no row, or sounds have the wrong shape.
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> sounds = torch.sin(torch.arange(4096) / 5).reshape(1, 1, -1)
        >>> figure = plot_spectrograms([("every 2nd step", sounds)], sounds, sampling_rate=8000)
    """
    from ..metrics.audio import (
        log_mel,
        log_spectral_distance,  # bring torch with them
    )

    if not rows:
        raise InvalidArgumentError("pass at least one row of sounds beside the reference.")

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
    return save_figure(_stacked(strips, width=min(9.0, max(3.2, 1.5 * len(uncached)))), path)


def _stacked(strips: Sequence[tuple[str, npt.NDArray[np.float32]]], *, width: float) -> Figure:
    """Draws labelled strips of equal size below each other, with square pixels; width in inches."""
    height = width * strips[0][1].shape[0] / strips[0][1].shape[1]
    longest = max(len(line) for name, _ in strips for line in name.split("\n"))
    left, gap, margin = 0.25 + 0.065 * longest, 0.06, 0.05
    total = (left + width + margin, len(strips) * (height + gap) - gap + 2 * margin)
    figure = new_figure(width=total[0], height=total[1], layout="none")
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


def _strip(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Concatenates images [batch, height, width, ...] horizontally with a narrow gap."""
    filling = 1.0 if images.ndim == 4 else math.nan
    gap = max(1, images.shape[2] // 16)
    padding = [(0, 0), (0, 0), (0, gap)] + [(0, 0)] * (images.ndim - 3)
    padded = np.pad(images, padding, constant_values=filling)
    return np.concatenate(list(padded), axis=1)[:, :-gap]


def _amplification(differences: Sequence[npt.NDArray[np.float32]]) -> int:
    """Returns the largest round factor that clips hardly any difference."""
    largest = float(np.quantile(np.stack(differences), 0.995))
    factors = (1, 2, 5, 10, 20, 50, 100)
    return max(factor for factor in factors if factor == 1 or factor * largest <= 1)
