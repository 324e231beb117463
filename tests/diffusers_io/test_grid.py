"""Noise schedulers that step over a planned grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from smoothcache import InvalidArgumentError
from smoothcache.diffusers_io import scheduler_on_grid
from smoothcache.planners import TimestepGrid

SIGMA = (0.9, 0.5, 0.1)


def grid_of(scheduler: Any) -> TimestepGrid:
    """A grid of three of the steps that a scheduler itself takes in twenty."""
    from smoothcache.steps.noise_scheduler import levels_at

    fine = type(scheduler).from_config(scheduler.config)
    given = {"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}
    fine.set_timesteps(20, **given)
    steps = (0, 8, 17)
    levels = levels_at(fine, range(20))
    assert levels is not None
    timesteps = tuple(float(fine.timesteps[s]) for s in steps)
    return TimestepGrid(timesteps, tuple(levels[s] for s in steps), steps, 2, 0.1)


SCHEDULERS = {
    "DPM-Solver++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "DPM-Solver++, SDE": lambda: diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++"
    ),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow, shifted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, dynamic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_steps_over_the_grid(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    grid = grid_of(scheduler)
    planned = scheduler_on_grid(scheduler, grid)
    for _ in range(2):
        planned.set_timesteps(num_inference_steps=3, device="cpu")
        x = torch.ones(1, 2, 4, 4)
        for t in planned.timesteps:
            x = planned.step(torch.zeros_like(x), t, x).prev_sample
        assert x.isfinite().all()
        assert planned.timesteps.tolist() == pytest.approx(grid.timesteps, abs=5)
    assert "set_timesteps" not in vars(scheduler)


def test_flow_sigmas_are_not_shifted_twice() -> None:
    scheduler = SCHEDULERS["flow, shifted"]()
    grid = grid_of(scheduler)
    planned = scheduler_on_grid(scheduler, grid)
    assert planned.sigmas[:3].tolist() == pytest.approx(list(grid.noise_levels or ()), abs=1e-4)


def test_bad_schedulers_and_step_counts() -> None:
    grid = grid_of(diffusers.DPMSolverMultistepScheduler())
    with pytest.raises(InvalidArgumentError, match="DDIMScheduler takes neither"):
        scheduler_on_grid(diffusers.DDIMScheduler(), grid)
    planned = scheduler_on_grid(diffusers.DPMSolverMultistepScheduler(), grid)
    with pytest.raises(InvalidArgumentError, match="num_inference_steps=3"):
        planned.set_timesteps(20)
    pure = TimestepGrid((1000.0, 500.0), (1.0, 0.5), (0, 1), 1, 0.1)
    with pytest.raises(InvalidArgumentError, match="no finite sigma"):
        scheduler_on_grid(diffusers.UniPCMultistepScheduler(), pure)


@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_lu_lambdas"])
def test_a_scheduler_with_a_spacing_of_its_own_is_refused(spacing: str) -> None:
    own = diffusers.DPMSolverMultistepScheduler(**{spacing: True})
    grid = grid_of(diffusers.DPMSolverMultistepScheduler())
    with pytest.raises(InvalidArgumentError, match="switch off its own spacing"):
        scheduler_on_grid(own, grid)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("known", [True, False])
def test_timesteps_that_the_denoiser_is_given_over_a_thousand(name: str, known: bool) -> None:
    """As FLUX and others are: the grid has their unit, the scheduler lists its own."""
    scheduler = SCHEDULERS[name]()
    grid = grid_of(scheduler)
    levels = grid.noise_levels if known else None
    scaled = replace(grid, timesteps=tuple(t / 1000 for t in grid.timesteps), noise_levels=levels)
    planned = scheduler_on_grid(scheduler, scaled)
    assert planned.timesteps.tolist() == pytest.approx(grid.timesteps, abs=5)
