"""Trajectories of calibrations: recorded, kept in files, and refused where they make no sense."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration.test_solver_responses import STEPS, Denoiser, Pipeline
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import smoothcache as sc
from smoothcache.calibration import recording as _recording


def calibrated(
    pipe: Any, samples: int = 2, num_steps: int = STEPS, **options: Any
) -> sc.Calibration:
    def sample(i: int) -> Tensor:
        return pipe.sample(i, num_steps)

    settings = {"max_gap": 2, "granularity": "model", "progress": False, **options}
    return sc.calibrate(pipe, sample, samples, **settings)


def pipeline(**options: Any) -> Pipeline:
    return Pipeline(DDIMScheduler(clip_sample=False, **options), "batch")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    calibrated(pipeline()).save(path := tmp_path / "c.safetensors")
    return path


def test_latents_and_outputs_are_those_of_the_run() -> None:
    pipe = pipeline()
    seen: list[Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0][:2]))
    pipe.sample(1)
    hook.remove()
    trajectories = calibrated(pipe).trajectories
    assert trajectories is not None
    assert (trajectories.num_samples, trajectories.num_steps) == (2, STEPS)
    torch.testing.assert_close(trajectories.latents[1], torch.stack(seen).half())
    flat = trajectories.outputs[1].double().flatten(1)
    np.testing.assert_allclose(trajectories.grams[1], (flat @ flat.T).numpy(), rtol=5e-3, atol=0.05)
    assert trajectories.nbytes == 2 * 2 * 2 * STEPS * 2 * 4 * 36 + 8 * STEPS * (3 * STEPS + 1)


def test_samples_come_out_as_without() -> None:
    pipe = pipeline()
    seen: dict[int, Tensor] = {}

    def sample(i: int) -> None:
        seen.setdefault(i, pipe.sample(i))

    sc.calibrate(pipe, sample, 2, max_gap=2, granularity="model", progress=False)
    assert all(torch.equal(seen[i], pipe.sample(i)) for i in range(2))


def test_measuring_the_solver_does_not_call_the_model() -> None:
    pipe = pipeline()
    calls: list[int] = []
    pipe.transformer.mix.register_forward_hook(lambda *_: calls.append(1))
    calibrated(pipe, 3)
    assert len(calls) == 3 * STEPS


def test_layers_are_measured_as_without_it() -> None:
    pipe = pipeline()
    a, b = calibrated(pipe), calibrated(pipe, trajectory=False)
    np.testing.assert_array_equal(a.errors, b.errors)
    assert b.trajectories is None
    assert "no_trajectories" not in b.provenance


def test_inner_products_alone_are_small() -> None:
    trajectories = calibrated(pipeline(), trajectory="gram").trajectories
    assert trajectories is not None and not trajectories.has_latents
    assert trajectories.nbytes < 4096
    sc.plan_trajectory(calibrated(pipeline(), trajectory="gram"), speedup=2)


def test_large_recordings_keep_inner_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recording, "MOST_BYTES", 1000)
    calibration = calibrated(pipeline())
    assert calibration.trajectories is not None and not calibration.trajectories.has_latents
    assert "MiB left out" in calibration.provenance["trajectories"]


def test_what_cannot_be_recorded_is_told_and_does_not_break_the_calibration() -> None:
    pipe = Pipeline(DDIMScheduler(clip_sample=True))
    calibration = calibrated(pipe)
    assert calibration.trajectories is None
    assert "not linear" in calibration.provenance["no_trajectories"]
    with pytest.raises(sc.InvalidArgumentError, match="not linear"):
        sc.plan_trajectory(calibration, speedup=2)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(sc.InvalidArgumentError, match="trajectory must be"):
        calibrated(pipeline(), trajectory="all")


def test_two_denoisers_share_a_trajectory() -> None:
    class Two(Pipeline):
        def __init__(self) -> None:
            super().__init__(DDIMScheduler(clip_sample=False))
            self.first, self.second = self.transformer, Denoiser()
            self.components = {
                "first": self.first,
                "second": self.second,
                "scheduler": self.scheduler,
            }

        def guided(self, x: Tensor, t: Tensor) -> Tensor:
            return (self.first if t >= 500 else self.second)(x, t)

    pipe = Two()
    calibration = calibrated(pipe, 3)
    assert calibration.trajectories is not None, calibration.provenance
    firsts = calibration.trajectories.first_steps()
    assert len(firsts) == 2
    planned = sc.plan_trajectory(calibration, steps_computed=4)
    assert set(planned.rows) == {"first", "second"}
    fitted = sc.fit(pipe, pipe.sample, planned, calibration, progress=False)
    with sc.cached(pipe, fitted) as run:
        out = pipe.sample(7)
    assert not run.summary().recomputed
    with sc.cached(pipe, planned):
        open_loop = pipe.sample(7)
    assert (out - pipe.sample(7)).norm() < (open_loop - pipe.sample(7)).norm()


def test_files_give_back_what_was_recorded(saved: Path) -> None:
    loaded, made = sc.Calibration.load(saved), calibrated(pipeline())
    a, b = loaded.trajectories, made.trajectories
    assert a is not None and b is not None
    np.testing.assert_array_equal(a.grams, b.grams)
    np.testing.assert_array_equal(a.responses.table, b.responses.table)
    assert a.responses.guidance == b.responses.guidance
    assert a.denoisers == b.denoisers
    assert all(torch.equal(x, y) for x, y in zip(a.latents, b.latents, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a.outputs, b.outputs, strict=True))
    planned = [sc.plan_trajectory(x, speedup=2) for x in (loaded, made)]
    assert planned[0].rows == planned[1].rows


def altered(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        tables = {name: file.get_tensor(name) for name in file.keys()}
        document = json.loads(file.metadata()["smoothcache"])
    change(tables, document)
    save_file(tables, path, {"smoothcache": json.dumps(document)})


def _drop(tables: dict[str, Any], _: dict[str, Any]) -> None:
    del tables["trajectory.outputs.1"]


def _add(tables: dict[str, Any], _: dict[str, Any]) -> None:
    tables["trajectory.more"] = torch.zeros(1)


def _not_finite(tables: dict[str, Any], _: dict[str, Any]) -> None:
    tables["trajectory.latents.0"][1] = torch.nan


def _shorter(tables: dict[str, Any], _: dict[str, Any]) -> None:
    tables["trajectory.latents.0"] = tables["trajectory.latents.0"][:-1].clone()


def _other_type(tables: dict[str, Any], _: dict[str, Any]) -> None:
    tables["trajectory.grams"] = tables["trajectory.grams"].float()


def _other_steps(tables: dict[str, Any], _: dict[str, Any]) -> None:
    tables["trajectory.responses"] = tables["trajectory.responses"][:-1].clone()


def _more_samples(_: dict[str, Any], document: dict[str, Any]) -> None:
    document["trajectories"]["samples"] = 3


def _no_guidance(_: dict[str, Any], document: dict[str, Any]) -> None:
    document["trajectories"]["guidance"] = [[1.0]]


def _infinite_guidance(_: dict[str, Any], document: dict[str, Any]) -> None:
    document["trajectories"]["guidance"] = [["inf", 1.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"'trajectory.outputs.1' is missing"),
        (_add, r"'trajectory.more' is unknown"),
        (_not_finite, "NaN"),
        (_shorter, "7 latents"),
        (_other_type, "float32"),
        (_other_steps, r"responses must have the shape \[8, 9\]"),
        (_more_samples, r"is missing"),
        (_no_guidance, "expected 2 weights"),
        (_infinite_guidance, "finite number"),
    ],
)
def test_damaged_files_are_refused(saved: Path, change: Any, message: str) -> None:
    altered(saved, change)
    with pytest.raises(sc.FileFormatError, match=message):
        sc.Calibration.load(saved)


def test_files_that_are_cut_short_are_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(sc.FileFormatError, match="cut short"):
        sc.Calibration.load(saved)


def test_resampled_calibrations_have_none() -> None:
    calibration = calibrated(pipeline())
    assert calibration.resample(STEPS - 1).trajectories is None
    with pytest.raises(sc.InvalidArgumentError, match="7 steps, but the errors have 8"):
        replace(calibration, trajectories=calibrated(pipeline(), num_steps=7).trajectories)
