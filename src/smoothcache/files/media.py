"""Encodes samples as files: images as PNG, clips as animated GIF, sounds as WAV."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import InvalidArgumentError
from ..optional import optional_module

FRAMES_PER_SECOND = 6.0


def encoded(sample: Tensor, sampling_rate: int | None = None) -> tuple[str, bytes]:
    """Encodes a sample; returns the file extension and the bytes.

    Args:
        sample: An image [channels, height, width], a clip [frames, channels, height, width] or a
            sound [channels, samples].
        sampling_rate: Sampling rate of a sound in Hz.

    Raises:
        InvalidArgumentError: If the shape is unsupported, or a sound has no sampling rate.
        MissingPackageError: If pillow is not installed.
    """
    if sample.ndim == 2 and sampling_rate is not None:
        return "wav", encoded_sound(sample, sampling_rate)
    if sample.ndim == 3:
        return "png", _encoded_image(sample)
    if sample.ndim == 4:
        return "gif", encoded_clip(rgb_pixels(sample))
    what = "is a sound of unknown sampling rate" if sample.ndim == 2 else "cannot be written"
    raise InvalidArgumentError(
        f"a sample of shape {list(sample.shape)} {what}; supported are images [channels, height, "
        "width], clips [frames, channels, height, width] and sounds [channels, samples]. Run the "
        "pipeline from Python instead."
    )


def rgb_pixels(images: Tensor) -> npt.NDArray[np.float32]:
    """Returns pixels [batch, height, width, 3]; grey images get three equal channels.

    Raises:
        InvalidArgumentError: If there are neither 1 nor 3 channels.
    """
    if images.shape[1] not in (1, 3):
        raise InvalidArgumentError(f"images must have 1 or 3 channels, got {images.shape[1]}.")
    rgb = images.detach().cpu().float().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return np.asarray(rgb.numpy(), dtype=np.float32)


def encoded_clip(
    frames: Sequence[npt.NDArray[Any]] | npt.NDArray[Any],
    *,
    frames_per_second: float = FRAMES_PER_SECOND,
) -> bytes:
    """Encodes frames [height, width, 3], uint8 or floats in [0, 1], as a looping GIF."""
    first, *others = (_picture(frame) for frame in frames)
    data = io.BytesIO()
    duration = round(1000 / frames_per_second)
    first.save(data, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return data.getvalue()


def encoded_sound(waveform: Tensor, sampling_rate: int) -> bytes:
    """Encodes a waveform as a 16-bit WAV file.

    Args:
        waveform: Waveform [channels, samples]; values outside [-1, 1] are clipped.
        sampling_rate: Sampling rate in Hz.

    Raises:
        InvalidArgumentError: If the waveform has another shape or is not finite.
    """
    if waveform.ndim != 2 or not waveform.numel() or not waveform.isfinite().all():
        raise InvalidArgumentError(
            f"a waveform must be finite numbers [channels, samples], got {list(waveform.shape)}."
        )
    samples = (32767 * waveform.detach().cpu().float().clamp(-1, 1)).round().T.contiguous()
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(len(waveform))
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes(np.asarray(samples, dtype="<i2").tobytes())
    return data.getvalue()


def _encoded_image(image: Tensor) -> bytes:
    data = io.BytesIO()
    _picture(rgb_pixels(image[None])[0]).save(data, format="PNG")
    return data.getvalue()


def _picture(pixels: npt.NDArray[Any]) -> Any:
    """Returns a pillow image; values outside [0, 1] are clipped."""
    image = optional_module("PIL.Image", extra="demo")
    if pixels.dtype != np.uint8:
        pixels = np.round(255 * pixels.clip(0, 1)).astype(np.uint8)
    return image.fromarray(pixels)
