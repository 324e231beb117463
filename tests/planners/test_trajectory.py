"""Steps planned from trajectories: the best of all choices, in little time."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import smoothcache as sc
from smoothcache.calibration.trajectory import Guidance, SolverResponses, Trajectories
from smoothcache.planners.open_loop import LARGEST_NORM, RIDGE, open_loop_weights
from smoothcache.planners.segments import Segments
from smoothcache.planners.step_choice import choose_steps
from smoothcache.planners.trajectory import plan_trajectory


def problem(steps: int, *, size: int = 5, seed: int = 0) -> tuple[Any, Any]:
    """Outputs [steps, size] and responses [steps, steps + 1] at random."""
    rng = np.random.default_rng(seed)
    outputs = np.cumsum(rng.normal(size=(steps, size)), axis=0)
    return outputs, np.triu(rng.normal(size=(steps, steps + 1)), 1)


def cost_of(outputs: Any, table: Any, steps: tuple[int, ...], memory: int) -> float:
    """The sum of costs of a choice, as the page says it."""
    total = 0.0
    for number, (j, end) in enumerate(zip(steps, (*steps[1:], len(outputs)), strict=True)):
        effect = sum(
            (table[t, end] * outputs[t] for t in range(j + 1, end)), np.zeros(outputs.shape[1])
        )
        known = outputs[list(steps[: number + 1][::-1][:memory])]
        gram = known @ known.T
        gram = gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        right = known @ effect
        total += max(effect @ effect - right @ np.linalg.solve(gram, right), 0.0)
    return float(total)


@pytest.mark.parametrize("memory", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9])
def test_no_choice_is_better(memory: int, count: int) -> None:
    outputs, table = problem(9)
    segments = Segments(outputs @ outputs.T, table, [9] * 9)
    chosen, cost = choose_steps(segments, count, memory=memory)
    every = [(0, *rest) for rest in itertools.combinations(range(1, 9), count - 1)]
    least = min(cost_of(outputs, table, steps, memory) for steps in every)
    assert cost == pytest.approx(least, rel=1e-6, abs=1e-9)
    assert cost_of(outputs, table, tuple(chosen), memory) == pytest.approx(cost, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("steps", "seconds"), [(50, 2.0), (100, 5.0)])
def test_it_takes_little_time(steps: int, seconds: float) -> None:
    outputs, table = problem(steps, size=40)
    started = time.perf_counter()
    segments = Segments(outputs @ outputs.T, table, [steps] * steps)
    chosen, _ = choose_steps(segments, steps // 3)
    assert time.perf_counter() - started < seconds
    assert len(chosen) == steps // 3


def test_denoisers_compute_their_first_step_and_share_nothing() -> None:
    outputs, table = problem(8)
    segments = Segments(outputs @ outputs.T, table, [5] * 5 + [8] * 3)
    for count in (2, 3, 4):
        chosen, _ = choose_steps(segments, count)
        assert {0, 5} <= set(chosen)
        weights = open_loop_weights(segments, chosen, 3)
        own = [sum(1 for s in chosen if 5 <= s < t) for t in range(8)]
        assert all(len(weights[t]) <= own[t] for t in range(5, 8))


def test_weights_leave_what_the_costs_say() -> None:
    outputs, table = problem(9)
    segments = Segments(outputs @ outputs.T, table, [9] * 9)
    chosen, cost = choose_steps(segments, 4, memory=3)
    weights = open_loop_weights(segments, chosen, 3)
    total = 0.0
    for number, (j, end) in enumerate(zip(chosen, [*chosen[1:], 9], strict=True)):
        left = np.zeros(outputs.shape[1])
        for t in range(j + 1, end):
            known = chosen[: number + 1][::-1][: len(weights[t])]
            guess = sum(w * outputs[s] for w, s in zip(weights[t], known, strict=True))
            left += table[t, end] * (outputs[t] - guess)
        total += float(left @ left)
    assert total == pytest.approx(cost, rel=1e-3, abs=1e-6)


def test_weights_that_would_explode_combine_fewer_outputs() -> None:
    rng = np.random.default_rng(0)
    base, slope = rng.normal(size=(2, 30))
    # The two computed outputs are nearly the same, the reused one is far along their difference.
    outputs = np.stack([base, base + 1e-2 * slope, base + slope])
    segments = Segments(outputs @ outputs.T, np.triu(np.ones((3, 4)), 1), [3] * 3)
    weights = open_loop_weights(segments, [0, 1], 2)
    assert len(weights[2]) == 1
    assert np.abs(weights[2]).sum() <= LARGEST_NORM


def recorded(steps: int = 9, samples: int = 2) -> sc.Calibration:
    """A calibration with trajectories, by hand."""
    grams = []
    for seed in range(samples):
        outputs, _ = problem(steps, seed=seed)
        grams.append(outputs @ outputs.T)
    responses = SolverResponses(problem(steps)[1], Guidance(((1.0,),)))
    layer = sc.CacheLayer("blocks.0.attn", kind="self_attn", block="blocks.0", macs=50)
    errors = np.zeros((samples, 1, 1, steps))
    errors[..., 0] = np.nan
    return sc.Calibration(
        (layer,),
        errors,
        total_macs=100,
        timesteps=tuple(range(steps, 0, -1)),
        trajectories=Trajectories(responses, np.stack(grams), ("",) * steps, output_bytes=64),
    )


def test_the_plan_is_a_schedule_of_the_whole_denoiser() -> None:
    schedule = plan_trajectory(recorded(), steps_computed=4)
    (row,) = schedule.rows.values()
    assert row.predictor == "fitted"
    assert sum(row.computed) == 4
    assert schedule.compute == pytest.approx(4 / 9)
    assert schedule.peak_bytes == 3 * 64
    assert schedule.layers is not None and schedule.layers[0].kind == "model"


def test_budgets_are_kept() -> None:
    calibration = recorded()
    for options, count in [({"speedup": 3}, 3), ({"compute": 0.5}, 4), ({"compute": 1}, 9)]:
        (row,) = plan_trajectory(calibration, **options).rows.values()  # type: ignore[arg-type]
        assert sum(row.computed) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"speedup": 2, "compute": 0.5}, "exactly one"),
        ({"compute": 0.05}, "0 of 9 steps"),
        ({"compute": float("nan")}, "finite"),
        ({"compute": 1.5}, r"\(0, 1\]"),
        ({"speedup": 0.5}, "at least 1"),
        ({"speedup": 10}, "0 of 9 steps"),
        ({"steps_computed": 0}, "steps_computed"),
        ({"steps_computed": 10}, "10 of 9 steps"),
        ({"steps_computed": 3, "max_lag": 0}, "max_lag"),
        ({"steps_computed": 3, "memory": 4}, "memory"),
        ({"steps_computed": 3, "early_weight": 0}, "early_weight"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=message):
        plan_trajectory(recorded(), **options)


def test_a_calibration_without_trajectories_is_refused_with_the_reason() -> None:
    bare = replace(recorded(), trajectories=None, provenance={"no_trajectories": "it clips"})
    with pytest.raises(sc.InvalidArgumentError, match=r"no trajectories.*it clips"):
        plan_trajectory(bare, speedup=2)
    with pytest.raises(sc.InvalidArgumentError, match="expected a Calibration"):
        plan_trajectory(None, speedup=2)  # type: ignore[arg-type]
