"""Weights that are fitted along the run that they make."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from calibration.test_solver_responses import STEPS, Denoiser, Pipeline
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

import smoothcache as sc
from smoothcache.fitting.closed_loop import fit
from smoothcache.planners.trajectory import plan_trajectory


def pipeline(guidance: str = "batch") -> Pipeline:
    return Pipeline(DDIMScheduler(clip_sample=False), guidance)


def calibrated(pipe: Any, samples: int = 3, **options: Any) -> sc.Calibration:
    return sc.calibrate(
        pipe, pipe.sample, samples, max_gap=2, granularity="model", progress=False, **options
    )


@cache
def default() -> tuple[Pipeline, sc.Calibration, sc.Schedule]:
    pipe = pipeline()
    calibration = calibrated(pipe)
    return pipe, calibration, plan_trajectory(calibration, steps_computed=4)


def error(pipe: Any, schedule: sc.Schedule, i: int) -> float:
    """How far a generation under a schedule ends from the uncached one."""
    with sc.cached(pipe, schedule):
        out: Tensor = pipe.sample(i)
    return float((out - pipe.sample(i)).norm() / pipe.sample(i).norm())


@pytest.mark.parametrize("guidance", ["none", "batch", "calls"])
def test_it_ends_nearer_than_open_loop_and_polynomials(guidance: str) -> None:
    pipe = pipeline(guidance)
    calibration = calibrated(pipe)
    planned = plan_trajectory(calibration, steps_computed=4)
    fitted = fit(pipe, pipe.sample, planned, calibration, progress=False)
    (row,) = fitted.rows.values()
    taylor = replace(planned, rows={"": sc.Row(row.computed, "taylor2")})
    errors = [np.mean([error(pipe, s, i) for i in (10, 11)]) for s in (taylor, planned, fitted)]
    assert errors[2] < errors[1]
    assert errors[2] < errors[0]


def test_the_errors_it_reports_are_those_of_the_run() -> None:
    pipe, calibration, planned = default()
    fitted = fit(pipe, pipe.sample, planned, calibration, held_out=1, progress=False)
    last = [float(x[-1].float().norm()) for x in calibration.trajectories.latents]  # type: ignore[union-attr]
    real = []
    for i in range(3):
        with sc.cached(pipe, fitted):
            out = pipe.sample(i)
        real.append(float((out - pipe.sample(i)).norm()) / last[i])
    assert fitted.quality["state_error"] == pytest.approx(np.mean(real[:2]), rel=0.05)
    assert fitted.quality["held_out_state_error"] == pytest.approx(real[2], rel=0.05)
    assert fitted.provenance["weights"] == "closed loop"


def test_only_computed_steps_call_the_model() -> None:
    pipe, calibration, planned = default()
    calls: list[int] = []
    handle = pipe.transformer.mix.register_forward_hook(lambda *_: calls.append(1))
    fit(pipe, pipe.sample, planned, calibration, progress=False)
    handle.remove()
    (row,) = planned.rows.values()
    assert len(calls) == 3 * sum(row.computed[:-1])


def test_inner_products_alone_are_enough() -> None:
    pipe, calibration, planned = default()
    bare = replace(calibration, trajectories=calibration.trajectories.without_latents())  # type: ignore[union-attr]
    a = fit(pipe, pipe.sample, planned, bare, progress=False)
    b = fit(pipe, pipe.sample, planned, calibration, progress=False)
    for x, y in zip(a.rows[""].weights or (), b.rows[""].weights or (), strict=True):
        np.testing.assert_allclose(x, y, rtol=0.05, atol=5e-3)


def test_multistep_solvers() -> None:
    pipe = Pipeline(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "batch")
    calibration = calibrated(pipe)
    planned = plan_trajectory(calibration, steps_computed=4)
    fitted = fit(pipe, pipe.sample, planned, calibration, progress=False)
    assert error(pipe, fitted, 10) < 1.05 * error(pipe, planned, 10)


def test_a_sampler_of_no_library() -> None:
    model = Denoiser()

    @torch.no_grad()
    def sample(i: int) -> Tensor:
        x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(i))
        for t in range(STEPS, 0, -1):
            x = x - model(x, torch.tensor([float(t)])) / STEPS
        return x

    calibration = sc.calibrate(
        model, sample, 3, max_gap=2, granularity="model", trajectory=True, progress=False
    )
    planned = plan_trajectory(calibration, speedup=2)
    fitted = fit(model, sample, planned, calibration, progress=False)
    with sc.cached(model, fitted) as run:
        out = sample(9)
    assert not run.summary().recomputed
    with sc.cached(model, planned):
        open_loop = sample(9)
    assert (out - sample(9)).norm() < (open_loop - sample(9)).norm()


def test_uniform_schedules_of_the_whole_denoiser_are_fitted_too() -> None:
    pipe, calibration, _ = default()
    uniform = sc.Schedule.uniform(pipe, STEPS, 2, predictor="taylor", granularity="model")
    fitted = fit(pipe, pipe.sample, uniform, calibration, progress=False)
    assert error(pipe, fitted, 10) < error(pipe, uniform, 10)


def test_a_schedule_that_computes_everything_stays() -> None:
    pipe, calibration, _ = default()
    everything = sc.Schedule.uniform(pipe, STEPS, 1, granularity="model")
    assert fit(pipe, pipe.sample, everything, calibration, progress=False) is everything


def test_other_samples_are_refused() -> None:
    pipe, calibration, planned = default()
    with pytest.raises(sc.CalibrationError, match="other latents"):
        fit(pipe, lambda i: pipe.sample(i + 5), planned, calibration, progress=False)


def test_another_solver_is_refused() -> None:
    pipe, calibration, planned = default()
    other = Pipeline(FlowMatchEulerDiscreteScheduler(), "batch")
    with pytest.raises(sc.CalibrationError, match=r"latents|timestep"):
        fit(other, other.sample, planned, calibration, progress=False)
    kept = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler(timestep_spacing="leading")
    assert pipe.scheduler.config.timestep_spacing == kept.config.timestep_spacing
    try:
        with pytest.raises(sc.CalibrationError):
            fit(pipe, pipe.sample, planned, calibration, progress=False)
    finally:
        pipe.scheduler = kept


def test_another_number_of_steps_is_refused() -> None:
    pipe, calibration, planned = default()
    with pytest.raises(sc.CalibrationError, match=r"latents|timestep"):
        fit(pipe, lambda i: pipe.sample(i, STEPS - 2), planned, calibration, progress=False)
    other = sc.Schedule.uniform(pipe, STEPS + 2, 2, granularity="model")
    with pytest.raises(sc.ScheduleMismatchError, match="10 steps"):
        fit(pipe, pipe.sample, other, calibration, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 4}, "3 samples"),
        ({"num_samples": 1}, "none is left"),
        ({"num_samples": 0}, "num_samples"),
        ({"held_out": -1}, "held_out"),
        ({"max_lag": 0}, "max_lag"),
        ({"ridge": -1.0}, "ridge"),
        ({"ridge": float("inf")}, "finite"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    pipe, calibration, planned = default()
    with pytest.raises(sc.InvalidArgumentError, match=message):
        fit(pipe, pipe.sample, planned, calibration, progress=False, **options)


def test_schedules_of_layers_and_other_things_are_refused() -> None:
    pipe, calibration, planned = default()
    layer = sc.CacheLayer("mix", kind="ffn", block="mix")
    layered = sc.Schedule(STEPS, {"mix": sc.Row.uniform(STEPS, 2)}, (layer,))
    with pytest.raises(sc.ScheduleMismatchError, match="whole denoiser"):
        fit(pipe, pipe.sample, layered, calibration)
    with pytest.raises(sc.InvalidArgumentError, match="expected a Schedule"):
        fit(pipe, pipe.sample, None, calibration)  # type: ignore[arg-type]
    with pytest.raises(sc.InvalidArgumentError, match="function of the sample"):
        fit(pipe, None, planned, calibration)  # type: ignore[arg-type]
    with pytest.raises(sc.InvalidArgumentError, match="no trajectories"):
        fit(pipe, pipe.sample, planned, replace(calibration, trajectories=None))


def test_too_few_numbers_for_the_weights_are_refused() -> None:
    class Tiny(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(x + t)

    model = Tiny()

    def sample(i: int) -> Tensor:
        x = torch.randn(1, 3, generator=torch.Generator().manual_seed(i))
        for t in (0.8, 0.6, 0.4, 0.2):
            x = x - 0.2 * model(x, torch.tensor([t]))
        return x

    calibration = sc.calibrate(
        model, sample, 2, max_gap=2, granularity="model", trajectory=True, progress=False
    )
    planned = plan_trajectory(calibration, steps_computed=2)
    with pytest.raises(sc.InvalidArgumentError, match="too few"):
        fit(model, sample, planned, calibration, progress=False)


def test_nothing_is_left_on_the_model_after_an_error() -> None:
    pipe, calibration, planned = default()

    def broken(i: int) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(pipe, broken, planned, calibration, progress=False)
    with sc.cached(pipe, planned):
        pipe.sample(0)


@pytest.mark.parametrize("guidance", ["batch", "calls"])
def test_branches_with_weights_of_their_own_end_nearer(guidance: str) -> None:
    pipe = pipeline(guidance)
    calibration = calibrated(pipe)
    planned = plan_trajectory(calibration, steps_computed=4)
    shared, apart = (
        fit(pipe, pipe.sample, planned, calibration, per_branch=per_branch, progress=False)
        for per_branch in (False, True)
    )
    assert not shared.rows[""].branch_weights
    assert len(apart.rows[""].branch_weights) == 1
    assert apart.quality["state_error"] < shared.quality["state_error"]
    assert error(pipe, apart, 10) < 1.1 * error(pipe, shared, 10)


def test_the_search_is_no_worse_than_the_plan() -> None:
    pipe, calibration, planned = default()
    calls: list[int] = []
    handle = pipe.transformer.mix.register_forward_hook(lambda *_: calls.append(1))
    found = sc.search_trajectory(
        pipe, pipe.sample, calibration, steps_computed=4, max_cost=6, progress=False
    )
    handle.remove()
    (row,) = found.rows.values()
    assert sum(row.computed) == 4
    assert len(calls) / STEPS < 6 + 2 + 2  # the last plan, and the fit
    fitted = fit(pipe, pipe.sample, planned, calibration, progress=False)
    assert found.quality["state_error"] < 1.1 * fitted.quality["state_error"]
    with pytest.raises(sc.InvalidArgumentError, match="max_cost"):
        sc.search_trajectory(pipe, pipe.sample, calibration, speedup=2, max_cost=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    pipe = Pipeline(DDIMScheduler(clip_sample=False), "batch")
    pipe.transformer.to(dtype)
    plain = pipe.guided
    pipe.guided = lambda x, t: plain(x.to(dtype), t).float()  # type: ignore[method-assign]
    calibration = calibrated(pipe)
    assert calibration.trajectories is not None, calibration.provenance
    weights = calibration.trajectories.responses.guidance.weights
    np.testing.assert_allclose(weights, [(3.0, -2.0)], rtol=0.05)
    planned = plan_trajectory(calibration, steps_computed=4)
    fitted = fit(pipe, pipe.sample, planned, calibration, progress=False)
    assert error(pipe, fitted, 10) < error(pipe, planned, 10)


def test_samplers_in_inference_mode() -> None:
    pipe = pipeline()

    @torch.inference_mode()
    def sample(i: int) -> Tensor:
        return pipe.sample(i)

    calibration = sc.calibrate(
        pipe, sample, 3, max_gap=2, granularity="model", trajectory=True, progress=False
    )
    assert calibration.trajectories is not None, calibration.provenance
    planned = plan_trajectory(calibration, steps_computed=4)
    fitted = fit(pipe, sample, planned, calibration, progress=False)
    assert fitted.quality["state_error"] < 0.2
    with torch.inference_mode():
        assert error(pipe, fitted, 10) < error(pipe, planned, 10)


def test_a_search_takes_fitted_schedules_as_proposals() -> None:
    pipe, calibration, planned = default()
    fitted = fit(pipe, pipe.sample, planned, calibration, progress=False)
    result = sc.search(
        pipe,
        lambda i: pipe.sample(i),
        calibration,
        compute=0.5,
        proposals=[fitted],
        max_cost=12,
        num_samples=1,
        progress=False,
    )
    assert isinstance(result, sc.SearchedSchedule)
    assert (result.compute or 1) <= 0.5
