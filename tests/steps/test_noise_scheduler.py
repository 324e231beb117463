"""How noisy the latents are at every step, against what real noise schedulers do to them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import pytest
import torch

import smoothcache as sc
from smoothcache.steps.noise_scheduler import check_noise_levels, levels_at, levels_of_solver

SOLVERS: dict[str, Any] = {
    "DDIM": lambda: diffusers.DDIMScheduler(timestep_spacing="trailing"),
    "DDPM": diffusers.DDPMScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler,
    "DPM-Solver++, log-SNR": lambda: diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True),
    "UniPC": diffusers.UniPCMultistepScheduler,
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, UniPC": lambda: diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
    "EDM": diffusers.EDMDPMSolverMultistepScheduler,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_levels_are_what_the_scheduler_adds(name: str) -> None:
    """``add_noise`` (or ``scale_noise``) of zeros and ones shows sigma, and of ones alpha."""
    scheduler = SOLVERS[name]()
    levels = levels_of_solver(scheduler, 8)
    assert levels is not None and len(levels) == 8
    assert all(a > b for a, b in itertools.pairwise(levels))
    scheduler.set_timesteps(8)

    def add(sample: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(sample, timestep, noise)
        return scheduler.add_noise(sample, noise, timestep)

    zeros, ones = torch.zeros(1, 1), torch.ones(1, 1)
    for timestep, level in zip(scheduler.timesteps, levels, strict=True):
        alpha = float(add(ones, zeros, timestep[None]))
        sigma = float(add(zeros, ones, timestep[None]))
        assert sigma / (alpha + sigma) == pytest.approx(level, abs=2e-3)


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(5)
    announced = scheduler.timesteps
    levels_of_solver(scheduler, 20)
    assert scheduler.timesteps is announced


def test_who_does_not_say() -> None:
    assert levels_of_solver(None, 5) is None
    assert levels_of_solver(object(), 5) is None
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert levels_of_solver(dynamic, 5) is None  # asks for a resolution
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(5)
    assert levels_at(scheduler, []) is None
    assert levels_at(scheduler, range(6)) is None
    assert levels_at(scheduler, [2, 2]) is None  # not told apart


@pytest.mark.parametrize("wrong", [(0.5, 0.5), (0.9, 1.2), (0.1, 0.9, 0.3), (0.5,), (math.nan, 0)])
def test_levels_that_make_no_sense(wrong: tuple[float, ...]) -> None:
    steps = 3 if len(wrong) == 3 else 2
    with pytest.raises(sc.InvalidArgumentError, match="noise level"):
        check_noise_levels(wrong, steps)


def tiny() -> Any:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8
    )


def test_a_predictor_over_the_noise_level_needs_one() -> None:
    with pytest.raises(sc.InvalidArgumentError, match=r"noise level.*noise_levels.*taylor"):
        sc.Schedule.uniform(tiny(), 4, 2, predictor="taylor-angle")
    levels = (0.9, 0.6, 0.3, 0.1)
    schedule = sc.Schedule.uniform(tiny(), 4, 2, predictor="taylor-angle", noise_levels=levels)
    assert schedule.noise_levels == levels
