"""A search that starts from plans of trajectories: no baseline is better, and costs are kept."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from support.prompt_pipeline import STEPS, PromptPipeline
from support.searches import distance, macs_of, result_of
from support.searches import search as cheap_search
from support.toys import TOKENS, WIDTH
from torch import Tensor

import smoothcache as sc
from smoothcache.demo.image import FOLDER, sample_shapes
from smoothcache.diffusers_io import load_pipeline
from smoothcache.searching.plans import FITTED_ON, is_recorded

search = partial(cheap_search, max_cost=None)  # the limit of its own


@pytest.fixture
def pipe() -> Iterator[PromptPipeline]:
    """A pipeline that no test may leave altered, whatever is raised in it."""
    pipeline = PromptPipeline()
    before = pipeline.sample(0)
    yield pipeline
    assert torch.equal(pipeline.sample(0), before)
    assert "step" not in vars(pipeline.scheduler)


@cache
def calibrated(num_samples: int = 4) -> sc.Calibration:
    pipe = PromptPipeline()
    return sc.calibrate(pipe, pipe.alone, num_samples, progress=False)


def errors_of(pipe: PromptPipeline, schedule: sc.Schedule, samples: range) -> list[float]:
    errors = []
    for i in samples:
        with sc.cached(pipe, schedule):
            output = pipe.sample(i)
        errors.append(distance(output, pipe.sample(i)))
    return errors


@cache
def uniform_errors() -> list[tuple[float, str, float]]:
    """Compute, name and mean error on the samples of a search of uniform schedules."""
    pipe = PromptPipeline()
    references = [pipe.sample(i) for i in range(2)]
    whole = macs_of(lambda: pipe.sample(0))
    found = []
    for granularity, interval in itertools.product(("auto", "model"), (2, 3, 4, 6, STEPS)):
        compute = None
        for predictor in ("hold", "taylor", "taylor2"):
            schedule = sc.Schedule.uniform(
                pipe, STEPS, interval, predictor=predictor, granularity=granularity
            )
            with sc.cached(pipe, schedule):
                compute = compute or macs_of(lambda: pipe.sample(0)) / whole
                errors = [distance(pipe.sample(i), x) for i, x in enumerate(references)]
            name = f"every {interval}, {predictor}, {granularity}"
            found.append((compute, name, float(np.mean(errors))))
    return found


@pytest.mark.parametrize("budget", [0.62, 0.5, 0.36, 0.27, 0.2, 0.17])
def test_no_uniform_schedule_is_better_on_the_samples_it_is_judged_by(
    pipe: PromptPipeline, budget: float
) -> None:
    schedule = search(pipe, pipe.alone, calibrated(), compute=budget)
    assert (schedule.compute or 1) <= budget + 1e-9
    assert result_of(schedule).cost <= 20
    error = float(np.mean(errors_of(pipe, schedule, range(2))))
    better = [x for x in uniform_errors() if x[0] <= budget + 1e-9 and x[2] < error * (1 - 1e-6)]
    assert not better


def test_it_plans_from_trajectories_that_it_records_itself(pipe: PromptPipeline) -> None:
    schedule = search(pipe, pipe.alone, compute=0.34)
    assert [row.predictor for row in schedule.rows.values()] == ["fitted"]
    assert schedule.provenance["weights"] == "closed loop"
    found = search(pipe, pipe.alone, calibrated(), compute=0.34)
    assert [row.predictor for row in found.rows.values()] == ["fitted"]


@pytest.mark.parametrize("num_samples", [0, 3, 4])
def test_everything_that_is_run_is_counted(pipe: PromptPipeline, num_samples: int) -> None:
    calibration = calibrated(num_samples) if num_samples else None
    whole = macs_of(lambda: pipe.sample(0))
    found: list[sc.SearchedSchedule] = []
    spent = macs_of(lambda: found.append(search(pipe, pipe.alone, calibration, compute=0.34)))
    result = result_of(found[0])
    assert spent / whole == pytest.approx(result.cost, rel=0.03)  # a fit multiplies matrices, too
    assert result.cost <= 20


def test_the_winner_is_validated_on_samples_that_nothing_else_used(pipe: PromptPipeline) -> None:
    schedule = search(pipe, pipe.alone, calibrated(6), compute=0.34)
    best = result_of(schedule).best
    assert best.error == pytest.approx(np.mean(errors_of(pipe, schedule, range(6, 8))), abs=1e-7)


def test_a_worse_baseline_is_measured_on_one_sample(pipe: PromptPipeline) -> None:
    result = result_of(search(pipe, pipe.sample, calibrated(), compute=0.34))
    names = [row.name for row in result.baselines]
    assert names[0] == "4 steps" and "4 steps of UniPC" in names
    runs = [steps for _, steps in pipe.calls]
    assert runs.count(4) == len(names)
    assert STEPS * 10 not in runs  # the converged samples would take more than is allowed
    assert result.best.converged_error is None
    assert result.verdict.startswith("the schedule pays off")


def test_it_goes_on_from_its_journal(pipe: PromptPipeline, tmp_path: Any) -> None:
    options = {"compute": 0.34, "journal": tmp_path / "journal"}
    one, other = (search(pipe, pipe.alone, calibrated(), **options) for _ in range(2))
    assert one.rows == other.rows
    assert str(result_of(one)) == str(result_of(other))


@pytest.mark.parametrize("compute", [0.05, 0.08])
def test_a_budget_below_one_step_is_refused(pipe: PromptPipeline, compute: float) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=r"no schedule is as cheap as 0\.0"):
        search(pipe, pipe.alone, calibrated(), compute=compute)


def test_a_budget_of_all_steps(pipe: PromptPipeline) -> None:
    assert search(pipe, pipe.alone, calibrated(), compute=1, max_cost=8).is_all_compute


def test_a_calibration_of_another_number_of_steps_is_refused(pipe: PromptPipeline) -> None:
    with (
        pytest.warns(sc.SmoothCacheWarning, match="without plans"),
        pytest.raises(sc.ScheduleMismatchError, match=f"{STEPS} steps"),
    ):
        search(pipe, lambda i: pipe.sample(i, STEPS - 3), calibrated(), compute=0.4)


def test_a_sampler_that_does_not_repeat_itself_is_refused(pipe: PromptPipeline) -> None:
    def noisy(i: int) -> Tensor:
        return pipe.sample(i + len(pipe.calls) % 3)

    with pytest.raises(sc.InvalidArgumentError, match="different results"):
        search(pipe, noisy, calibrated(), compute=0.4)


def test_outputs_that_are_not_finite_are_refused(pipe: PromptPipeline) -> None:
    with pytest.raises(sc.InvalidArgumentError, match="NaN"):
        search(pipe, lambda i: pipe.sample(i) * math.nan, calibrated(), compute=0.4)


def test_without_trajectories_it_searches_as_before(pipe: PromptPipeline) -> None:
    bare = replace(calibrated(), trajectories=None)
    schedule = search(pipe, pipe.alone, bare, compute=0.34, max_cost=10)
    assert all(row.weights is None for row in schedule.rows.values())


def test_other_samples_than_those_calibrated_are_recorded(pipe: PromptPipeline) -> None:
    def others(i: int) -> Tensor:
        return pipe.sample(i + 20)

    schedule = search(pipe, others, calibrated(), compute=0.34)
    assert [row.predictor for row in schedule.rows.values()] == ["fitted"]
    assert result_of(schedule).cost <= 20


def test_trajectories_of_another_solver_are_not_used(pipe: PromptPipeline) -> None:
    from diffusers import DPMSolverMultistepScheduler

    own = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
    try:
        with pytest.warns(sc.SmoothCacheWarning, match="measured with DDIMScheduler"):
            schedule = search(pipe, pipe.alone, calibrated(), compute=0.34)
        assert np.mean(errors_of(pipe, schedule, range(2))) < 0.1
    finally:
        pipe.scheduler = own


def test_a_solver_that_is_not_linear_is_told_of(pipe: PromptPipeline) -> None:
    """Where the trajectories cannot be recorded, the search says so and goes on."""

    def clipped(i: int) -> Tensor:
        return pipe.sample(i + 30)

    calibration = calibrated()
    step = type(pipe.scheduler).step

    def clipping(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = step(self, *args, **kwargs)
        output.prev_sample = output.prev_sample.clamp(-0.7, 0.7)
        return output

    pipe.scheduler.__class__ = type("Clipping", (type(pipe.scheduler),), {"step": clipping})
    try:
        with pytest.warns(sc.SmoothCacheWarning, match="without plans from trajectories"):
            schedule = search(pipe, clipped, calibration, compute=0.34, max_cost=10)
    finally:
        pipe.scheduler.__class__ = type(pipe.scheduler).__bases__[0]
    assert all(row.weights is None for row in schedule.rows.values())


def test_the_cheapest_for_an_error_is_planned_from_trajectories(pipe: PromptPipeline) -> None:
    schedule = search(pipe, pipe.alone, calibrated(), max_error=0.01)
    result = result_of(schedule)
    assert result.best.error <= 0.01
    rivals = [compute for compute, _, error in uniform_errors() if error <= 0.004]
    assert result.best.compute <= min(rivals) + 1e-9
    assert result.cost <= 60


def test_proposals_of_the_whole_denoiser_beside_a_calibration_of_layers(
    pipe: PromptPipeline,
) -> None:
    planned = sc.plan_trajectory(calibrated(), steps_computed=4)
    found = search(pipe, pipe.alone, calibrated(), compute=0.34, proposals=[planned])
    assert (found.compute or 1) <= 0.34


def test_a_custom_objective_may_be_negative(pipe: PromptPipeline) -> None:
    def objective(output: Tensor, reference: Tensor) -> float:
        return distance(output, reference) - 1

    own = search(pipe, pipe.alone, calibrated(), compute=0.34, objective=objective)
    assert result_of(own).best.error < -0.9


def test_latents_are_compared_with_those_of_the_calibration(pipe: PromptPipeline) -> None:
    from smoothcache.searching.gains import Recorder

    calibration = calibrated()
    _, trajectory = Recorder(pipe).run(pipe, lambda: pipe.sample(1))
    assert is_recorded(trajectory, calibration, 1)
    assert not is_recorded(trajectory, calibration, 0)
    assert not is_recorded(trajectory, calibration, 9)
    assert not is_recorded(None, calibration, 1)
    trajectory.latents = [torch.zeros(2, TOKENS, WIDTH)] * STEPS
    assert not is_recorded(trajectory, calibration, 1)
    assert FITTED_ON >= 1


@pytest.mark.parametrize("max_cost", [0.1, 8])
def test_little_to_spend(pipe: PromptPipeline, max_cost: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = search(pipe, pipe.alone, calibrated(), compute=0.34, max_cost=max_cost)
    assert (schedule.compute or 1) <= 0.34


def test_the_demo_pipeline_gets_nothing_worse_than_uniform_schedules() -> None:
    steps, budget = 8, 0.4
    pipe = load_pipeline(FOLDER)
    pipe.set_progress_bar_config(disable=True)

    def sample(i: int) -> Tensor:
        return sample_shapes(pipe, [i % 10], 500 + i, steps)

    found = search(pipe, sample, compute=budget)
    result = result_of(found)
    assert result.cost <= 20 and (found.compute or 1) <= budget + 1e-9
    references = [sample(i) for i in range(2)]

    def error(schedule: sc.Schedule) -> float:
        with sc.cached(pipe, schedule):
            return float(np.mean([distance(sample(i), x) for i, x in enumerate(references)]))

    own = error(found)
    for granularity, predictor in itertools.product(("auto", "model"), ("taylor", "taylor2")):
        uniform = sc.Schedule.uniform(pipe, steps, 3, predictor=predictor, granularity=granularity)
        assert own <= error(uniform) + 1e-9
