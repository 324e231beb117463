"""Encodes samples as files: images as PNG, clips as animated GIF, sounds as WAV."""

from __future__ import annotations

import io
import subprocess
import wave
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import FileFormatError, InvalidArgumentError
from ..optional import optional_module

FRAMES_PER_SECOND = 6.0


def encoded(
    sample: Tensor,
    sampling_rate: int | None = None,
    *,
    frames_per_second: float = FRAMES_PER_SECOND,
) -> tuple[str, bytes]:
    """Encodes a sample; returns the file extension and the bytes.

    Args:
        sample: An image [channels, height, width], a clip [frames, channels, height, width] or a
            sound [channels, samples].
        sampling_rate: Sampling rate of a sound in Hz.
        frames_per_second: Frame rate of a clip.

    Raises:
        InvalidArgumentError: If the shape is unsupported, or a sound has no sampling rate.
        MissingPackageError: If pillow is not installed.
    """
    if sample.ndim == 2 and sampling_rate is not None:
        return "wav", encoded_sound(sample, sampling_rate)
    if sample.ndim == 3:
        return "png", _encoded_image(sample)
    if sample.ndim == 4:
        return "gif", encoded_clip(rgb_pixels(sample), frames_per_second=frames_per_second)
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


def encoded_video(frames: npt.NDArray[np.float32], frames_per_second: float) -> bytes:
    """Frames [frames, height, width, 3] in [0, 1] as an MP4 file (H.264), by ffmpeg.

    The same frames give the same bytes: no time of day is written.

    Raises:
        InvalidArgumentError: If height or width is odd, which H.264 does not take.
        MissingPackageError: If imageio-ffmpeg is not installed, which brings the program.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise InvalidArgumentError(
            f"an MP4 file needs an even height and width, got {height} x {width}; write GIF files."
        )
    pixels = np.round(255 * frames.clip(0, 1)).astype(np.uint8)
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    made = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "10"]
    bitexact = ["-fflags", "+bitexact", "-flags:v", "+bitexact"]
    with TemporaryDirectory() as folder:
        file = Path(folder, "clip.mp4")
        rate = ["-r", f"{frames_per_second:g}"]
        _ffmpeg(*given, *rate, "-i", "-", *made, *bitexact, str(file), data=pixels.tobytes())
        return file.read_bytes()


def _ffmpeg(*options: str, data: bytes = b"") -> bytes:
    """What ffmpeg writes to its standard output.

    Raises:
        FileFormatError: If it fails.
    """
    program = optional_module("imageio_ffmpeg", extra="mp4").get_ffmpeg_exe()
    command = [program, "-v", "error", "-y", *options]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode:
        raise FileFormatError(f"ffmpeg failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


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


def decoded_image(data: bytes) -> Tensor:
    """A picture as uint8 [3, height, width]."""
    image = optional_module("PIL.Image", extra="demo")
    with image.open(io.BytesIO(data)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def decoded_sound(data: bytes) -> Tensor:
    """A WAV file of 16 bits as [channels, samples] between -1 and 1.

    Raises:
        FileFormatError: If it is another kind of file.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise FileFormatError(f"not a readable WAV file ({error}).") from error
    if width != 2:
        raise FileFormatError(f"a WAV file of {8 * width} bits, not of 16.")
    values = np.frombuffer(frames, dtype="<i2").astype(np.float32) / 32767
    return torch.from_numpy(values.reshape(-1, channels).T.copy())


def sampling_rate_of(data: bytes) -> int:
    """Samples a second of a WAV file.

    Raises:
        FileFormatError: If it is another kind of file.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            return int(file.getframerate())
    except (wave.Error, EOFError) as error:
        raise FileFormatError(f"not a readable WAV file ({error}).") from error


def decoded_clip(data: bytes) -> Tensor:
    """A GIF or MP4 file as uint8 [frames, 3, height, width]."""
    if data[:3] == b"GIF":
        image = optional_module("PIL.Image", extra="demo")
        sequence = optional_module("PIL.ImageSequence", extra="demo")
        with image.open(io.BytesIO(data)) as clip:
            frames = [np.array(frame.convert("RGB")) for frame in sequence.Iterator(clip)]
    else:
        with TemporaryDirectory() as folder:
            file = Path(folder, "clip.mp4")
            file.write_bytes(data)
            frames = _pictures_in(_ffmpeg("-i", str(file), "-f", "image2pipe", "-c:v", "ppm", "-"))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _pictures_in(stream: bytes) -> list[npt.NDArray[np.uint8]]:
    """Pictures [height, width, 3] that follow each other in the PPM format."""
    pictures, start = [], 0
    while start < len(stream):
        _, size, _, rest = stream[start : start + 40].split(b"\n", 3)
        width, height = map(int, size.split())
        begin = start + min(40, len(stream) - start) - len(rest)
        start = begin + 3 * width * height
        pixels = np.frombuffer(stream[begin:start], dtype=np.uint8)
        pictures.append(pixels.reshape(height, width, 3))
    return pictures
