"""Samples as data inside of a page: pictures, videos, sounds, spectrograms."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..files.media import FRAMES_PER_SECOND, encoded_sound, rgb_pixels
from ..optional import optional_module
from .webm import encoded_video

LOSSLESS_BELOW = 160  # pixels of the longer side up to which a picture is stored exactly
QUALITY = 90


@dataclass(frozen=True)
class Medium:
    """One picture, video or sound inside of a page.

    Attributes:
        source: A ``data:`` address.
        kind: "image", "video" or "audio".
        text: What it shows, for who does not see it.
        width: In pixels; 0 of a sound.
        height: In pixels; 0 of a sound.
        spectrogram: Of a sound, a picture of it.
    """

    source: str
    kind: str
    text: str
    width: int = 0
    height: int = 0
    spectrogram: Medium | None = None

    @property
    def size(self) -> int:
        """Characters in the page."""
        return len(self.source) + (self.spectrogram.size if self.spectrogram else 0)


def medium(sample: Tensor, text: str, sampling_rate: int | None = None) -> Medium | None:
    """A sample as a medium; None if it is a sound of unknown rate.

    Args:
        sample: An image [channels, height, width], a clip [frames, channels, height, width] or a
            sound [channels, samples].
        text: What it shows.
        sampling_rate: Of a sound, samples a second.

    Raises:
        MissingPackageError: If pillow is not installed, or of a sound matplotlib.
    """
    if sample.ndim == 2:
        return None if sampling_rate is None else _sound(sample, text, sampling_rate)
    if sample.ndim == 3:
        return picture(_bytes_of(rgb_pixels(sample[None])[0]), text)
    frames = _bytes_of(rgb_pixels(sample))
    data = encoded_video(frames, frames_per_second=FRAMES_PER_SECOND)
    return Medium(_data("video/webm", data), "video", text, frames.shape[2], frames.shape[1])


def picture(pixels: npt.NDArray[np.uint8], text: str) -> Medium:
    """Pixels [height, width, 3] as a picture: exact if it is small, else compressed."""
    image: Any = optional_module("PIL.Image", extra="report")
    features: Any = optional_module("PIL.features", extra="report")
    height, width = pixels.shape[:2]
    options: dict[str, Any] = {"format": "PNG", "optimize": True}
    if features.check("webp"):
        lossless = max(height, width) <= LOSSLESS_BELOW
        options = {"format": "WEBP", "lossless": lossless, "quality": QUALITY}
    data = io.BytesIO()
    image.fromarray(pixels).save(data, **options)
    return Medium(
        _data(f"image/{options['format'].lower()}", data.getvalue()), "image", text, width, height
    )


def _sound(sample: Tensor, text: str, sampling_rate: int) -> Medium:
    source = _data("audio/wav", encoded_sound(sample, sampling_rate))
    drawn = picture(_spectrogram(sample, sampling_rate), f"Log-mel spectrogram of {text}")
    return Medium(source, "audio", text, spectrogram=drawn)


def _spectrogram(sample: Tensor, sampling_rate: int) -> npt.NDArray[np.uint8]:
    """Time to the right, pitch upwards, from black at -90 dB of full scale to bright at 0 dB."""
    from ..metrics.audio import log_mel

    colours = optional_module("matplotlib", extra="plots").colormaps["magma"]
    levels = log_mel(sample[None].detach().cpu(), sampling_rate)[0].flip(0)
    shown = np.clip(1 + np.asarray(levels, dtype=np.float32) / 90, 0, 1)
    return np.asarray(np.round(255 * colours(shown)[..., :3]), dtype=np.uint8)


def _bytes_of(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    return np.round(255 * pixels.clip(0, 1)).astype(np.uint8)


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
