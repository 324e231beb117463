"""Clips as MP4 files: the same bytes each time, and frames that come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smoothcache import InvalidArgumentError
from smoothcache.files.media import decoded_clip, encoded_video, rgb_pixels
from smoothcache.generation import SampleSet, sample_many


def clip() -> torch.Tensor:
    """A bright square that moves, [frames, 3, height, width]."""
    frames = torch.full((6, 3, 32, 48), 0.2)
    for i, frame in enumerate(frames):
        frame[:, 8:24, 4 * i : 4 * i + 16] = 0.9
    return frames


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="even height and width, got 3 x 4"):
        encoded_video(rgb_pixels(torch.zeros(2, 3, 3, 4)), 8.0)


def test_frames_come_back(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    data = encoded_video(rgb_pixels(clip()), 8.0)
    assert data == encoded_video(rgb_pixels(clip()), 8.0)
    frames = decoded_clip(data)
    assert frames.shape == (6, 3, 32, 48)
    assert (frames.float() / 255 - clip()).abs().mean() < 0.02
    sample_many(lambda numbers: torch.stack([clip()] * len(numbers)), tmp_path / "run", 2,
                layout="mp4", inputs=["a square"], progress=False)  # fmt: skip
    samples = SampleSet.open(tmp_path / "run")
    assert [file.file for file in samples.files] == ["a square-0.mp4", "a square-1.mp4"]
