"""Samples of a calibration shared out over processes: the same curves to the last bit."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.folders import run_ranks
from support.tiny_pipeline import build_pipeline

import smoothcache as sc
from smoothcache.diffusers_io import PipelineSampler

SAMPLES = (1, 3)  # with one sample, the second process has nothing to do


def sampler_of(pipe: Any) -> PipelineSampler:
    pipe.scheduler.register_to_config(clip_sample=False)  # or there are no trajectories
    return PipelineSampler(pipe, class_labels=(0, 3, 5), num_steps=5)


def measured(count: int, **options: Any) -> sc.Calibration:
    pipe = build_pipeline()
    return sc.calibrate(pipe, sampler_of(pipe), count, 2, progress=False, **options)


def work(folder: Path) -> None:
    """What every rank does."""
    rank = int(os.environ["RANK"])
    for count in SAMPLES:
        measured(count, over_ranks=True).save(folder / f"{count}-{rank}.safetensors")
    pipe = build_pipeline()
    sampler = sampler_of(pipe)

    def failing(i: int) -> Any:
        if i == 1:
            raise ValueError("in one rank alone")
        return sampler(i)

    def varying(i: int) -> Any:
        return sampler(i, 5 - i)

    for name, sample in {"failed": failing, "varied": varying}.items():
        try:
            sc.calibrate(pipe, sample, 2, 2, over_ranks=True, progress=False)
        except (ValueError, sc.CalibrationError) as error:
            (folder / f"{name}-{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    ended = run_ranks(__file__, 2, tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    for count in SAMPLES:
        measured(count).save(tmp_path / "one.safetensors")
        one = sc.Calibration.load(tmp_path / "one.safetensors")
        for rank in range(2):
            other = sc.Calibration.load(tmp_path / f"{count}-{rank}.safetensors")
            np.testing.assert_array_equal(one.errors, other.errors)
            same = ("layers", "total_macs", "timesteps", "model", "solver", "noise_levels")
            for name in (*same, "peak_bytes", "tokens", "provenance"):
                assert getattr(one, name) == getattr(other, name), name
            assert one.trajectories is not None and other.trajectories is not None
            np.testing.assert_array_equal(one.trajectories.grams, other.trajectories.grams)
            table = one.trajectories.responses.table
            np.testing.assert_array_equal(table, other.trajectories.responses.table)
            for a, b in zip(one.trajectories.latents, other.trajectories.latents, strict=True):
                assert torch.equal(a, b)
    for rank in range(2):
        assert (tmp_path / f"failed-{rank}.txt").read_text() == "in one rank alone"
        assert "ran 4 steps, those of rank 0 5" in (tmp_path / f"varied-{rank}.txt").read_text()


def test_one_process_is_no_rank() -> None:
    np.testing.assert_array_equal(measured(2, over_ranks=True).errors, measured(2).errors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
