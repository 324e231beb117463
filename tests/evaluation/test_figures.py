"""The paper's figures from the folders of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import noise
from support.made_up import calibration_of
from torch import Tensor

from smoothcache import FileFormatError, InvalidArgumentError
from smoothcache.evaluation import draw_figures
from smoothcache.evaluation.figures import first_samples, groups_in
from smoothcache.generation import SampleSet, sample_many


def images(numbers: Sequence[int]) -> Tensor:
    return noise(numbers).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def darker(numbers: Sequence[int]) -> Tensor:
    return 0.9 * images(numbers)


def write(run: Path, sample: Any, **options: Any) -> None:
    """A run with uncached samples of 4 and of 8 steps, and cached ones of 8."""
    rows = {"uncached": (8, None, 1.0), "half": (8, "sha256:1", 0.9), "4-steps": (4, None, 0.8)}
    for name, (steps, schedule, factor) in rows.items():

        def scaled(numbers: Sequence[int], factor: float = factor) -> Tensor:
            return factor * sample(numbers)

        settings = {"steps": steps, "schedule": schedule, "pipeline": "ToyPipeline"}
        sample_many(scaled, run / name, 3, settings=settings, progress=False, **options)


def test_images_and_calibrations(tmp_path: Path) -> None:
    write(tmp_path / "run", images)
    calibration_of().save(tmp_path / "run" / "calibration.safetensors")
    (group,) = groups_in(tmp_path / "run")
    assert (group.title, [name for name, _ in group.cached]) == ("ToyPipeline, 8 steps", ["half"])
    paths = draw_figures([tmp_path / "run"], tmp_path / "figures")
    assert [x.name for x in paths] == [
        *("figure-1.png", "figure-2.png", "figure-4.png", "figure-5.png")
    ]
    assert all(x.read_bytes()[:4] == b"\x89PNG" for x in paths)


def test_sounds_and_clips_of_two_runs(tmp_path: Path) -> None:
    def sounds(numbers: Sequence[int]) -> Tensor:
        return 2 * noise(numbers).flatten(1).repeat(1, 60)[:, None] - 1

    def clips(numbers: Sequence[int]) -> Tensor:
        return torch.stack([images(numbers), 1 - images(numbers)], dim=1)

    write(tmp_path / "sounds", sounds, layout="wav", sampling_rate=4000)
    write(tmp_path / "clips", clips, layout="gif")
    runs = [tmp_path / "sounds", tmp_path / "clips"]
    paths = draw_figures(runs, tmp_path / "figures", ending="svg", num_samples=2)
    names = ["figure-1.svg", "figure-6-sounds-8.svg", "figure-5-clips-8.svg"]
    assert [x.name for x in paths] == names
    opened = SampleSet.open(tmp_path / "clips" / "half")
    assert first_samples(opened, 2).shape == (2, 2, 3, 16, 24)


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="there is nothing to draw in no run"):
        draw_figures([], tmp_path)
    with pytest.raises(InvalidArgumentError, match="no samples under a schedule beside"):
        draw_figures([tmp_path], tmp_path)
    with pytest.raises(FileFormatError, match="there is no folder"):
        draw_figures([tmp_path / "none"], tmp_path)
    with pytest.raises(InvalidArgumentError, match="png, svg or pdf"):
        draw_figures([], tmp_path, ending="gif")
