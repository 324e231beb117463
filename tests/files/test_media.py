"""Samples as files: what was written is read back by other packages."""

from __future__ import annotations

import io
import wave

import pytest
import torch
from PIL import Image
from torch import Tensor

from smoothcache import InvalidArgumentError
from smoothcache.files.media import encoded, encoded_sound


def test_images_and_clips_keep_their_pixels() -> None:
    clip = torch.tensor([-0.5, 0.2, 0.6, 1.5]).view(4, 1, 1, 1).expand(4, 3, 8, 6)
    ending, data = encoded(clip[2])
    with Image.open(io.BytesIO(data)) as image:
        assert (ending, image.format, image.size) == ("png", "PNG", (6, 8))
        assert image.getpixel((0, 0)) == (153, 153, 153)
    ending, data = encoded(clip)
    with Image.open(io.BytesIO(data)) as moving:
        assert (ending, moving.format, moving.n_frames) == ("gif", "GIF", 4)
        assert moving.info["loop"] == 0
        colours = [moving.convert("RGB").getpixel((0, 0))[0] for _ in map(moving.seek, range(4))]
    assert colours == pytest.approx([0, 51, 153, 255], abs=2)


def test_a_sound_keeps_its_waveform() -> None:
    ending, data = encoded(torch.tensor([[0.0, 0.5, -1.0, 2.0], [0.25, 0.0, 1.0, -3.0]]), 16_000)
    assert ending == "wav"
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (2, 16_000, 2)
        samples = torch.frombuffer(bytearray(file.readframes(9)), dtype=torch.int16)
    assert samples.reshape(-1, 2).T.tolist() == [
        [0, 16384, -32767, 32767], [8192, 0, 32767, -32767]
    ]  # fmt: skip


@pytest.mark.parametrize("waveform", [torch.zeros(4), torch.zeros(1, 0), torch.ones(1, 4) / 0])
def test_what_is_no_waveform_is_refused(waveform: Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match="a waveform must be finite numbers"):
        encoded_sound(waveform, 16_000)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 400), "a sound of unknown sampling rate"),
        ((400,), "cannot be written"),
        ((1, 1, 1, 1, 1), "cannot be written"),
        ((2, 8, 8), "1 or 3 channels, got 2"),
        ((4, 2, 8, 8), "1 or 3 channels, got 2"),
    ],
)
def test_what_cannot_be_written_is_named(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        encoded(torch.zeros(shape))
