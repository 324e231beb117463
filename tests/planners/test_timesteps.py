"""Grids of timesteps: the best of all choices, and what their errors mean."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from planners.test_trajectory import problem

import smoothcache as sc
from smoothcache.planners.segments import Segments
from smoothcache.planners.timesteps import TimestepGrid, cheapest_grid, coarse_step_costs
from smoothcache.steps.predictors import extrapolation_weights


def cost_of(outputs: Any, table: Any, positions: Any, steps: tuple[int, ...], order: int) -> float:
    """The sum of squared errors of a grid, output by output."""
    total = 0.0
    for number, (begin, end) in enumerate(zip(steps, (*steps[1:], len(outputs)), strict=True)):
        known = steps[max(0, number + 1 - order) : number + 1]
        error = np.zeros(outputs.shape[1])
        for t in range(begin + 1, end):
            weights = extrapolation_weights([positions[s] for s in known], positions[t])
            predicted = sum(w * outputs[s] for w, s in zip(weights, known, strict=True))
            error += table[t, end] * (outputs[t] - predicted)
        total += error @ error
    return float(total)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("coincide", [False, True])
def test_no_grid_is_better(order: int, count: int, coincide: bool) -> None:
    outputs, table = problem(8, seed=count)
    positions = np.cumsum(np.random.default_rng(1).uniform(0.5, 2, size=8))
    if coincide:
        positions[1] = positions[0]
    costs = coarse_step_costs(Segments(outputs @ outputs.T, table, [8] * 8), positions, order)
    chosen, cost = cheapest_grid(costs, count)
    every = [(0, *rest) for rest in itertools.combinations(range(1, 8), count - 1)]
    least = min(cost_of(outputs, table, positions, steps, order) for steps in every)
    assert cost == pytest.approx(least, rel=1e-6, abs=1e-9)
    assert cost_of(outputs, table, positions, tuple(chosen), order) == pytest.approx(
        cost, rel=1e-6, abs=1e-9
    )


class Velocity(torch.nn.Module):
    """A velocity that depends on the time alone, sharply at one moment."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(40 * (t - 0.3)) * torch.ones_like(x)


def sampled(model: Velocity, times: list[float]) -> torch.Tensor:
    x = torch.zeros(1, 4, 8, 8)
    for t, following in zip(times, [*times[1:], 0.0], strict=True):
        x = x + (following - t) * model(x, torch.tensor(t))
    return x


def test_the_expected_error_is_the_error_of_the_sampler() -> None:
    """Where outputs do not depend on the latents, nothing is carried on."""
    model, times = Velocity(), [1 - i / 40 for i in range(40)]

    def sample(i: int) -> torch.Tensor:
        return sampled(model, times)

    with torch.no_grad():
        calibration = sc.calibrate(
            model, sample, 1, 1, granularity="model", trajectory=True, progress=False
        )
        grid = sc.plan_timesteps(calibration, 6, order=1, early_weight=1.0)
        even = [1 - i / 6 for i in range(6)]
        fine = sample(0)
        ends = [sampled(model, list(times)) for times in (grid.timesteps, even)]
        errors = [float((end - fine).abs().max()) for end in ends]
    assert errors[0] < 0.5 * errors[1]
    assert grid.timesteps[0] == 1.0
    assert any(0.2 < t < 0.4 for t in grid.timesteps)
    assert 0 < grid.expected_state_error < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 9}, "at most the 6 steps"),
        ({"order": 3}, "order must be 1 or 2"),
        ({"early_weight": 0}, "early_weight must be positive"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    model = Velocity()
    with torch.no_grad():
        calibration = sc.calibrate(
            model,
            lambda i: sampled(model, [1 - i / 6 for i in range(6)]),
            1,
            1,
            granularity="model",
            trajectory=True,
            progress=False,
        )
    with pytest.raises(sc.InvalidArgumentError, match=message):
        sc.plan_timesteps(calibration, **{"num_steps": 3, **change})


def test_sigmas() -> None:
    grid = TimestepGrid((900.0, 500.0), (0.75, 0.5), (0, 3), 2, 0.1)
    assert len(grid) == 2
    assert grid.sigmas(flow=True) == (0.75, 0.5)
    assert grid.sigmas(flow=False) == (3.0, 1.0)
    with pytest.raises(sc.InvalidArgumentError, match="no noise levels"):
        TimestepGrid((900.0,), None, (0,), 2, 0.1).sigmas(flow=True)
