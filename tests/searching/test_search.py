"""The search as a whole: it keeps its budget, its winner wins, and bad input is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.searches import (
    SOLVERS,
    STEPS,
    Sampler,
    calibrated,
    error_of,
    real_compute,
    result_of,
    same,
    search,
    state_of,
    two_denoisers,
    uniform_runs,
)
from support.toys import TOKENS, WIDTH, Toy, build
from torch import Tensor

import smoothcache as sc


@pytest.mark.parametrize(
    ("toy_name", "branches", "target"),
    [
        ("single", 1, {"speedup": 1}),
        ("single", 1, {"speedup": 2.0}),
        ("single", 1, {"speedup": 3.7}),
        ("single", 1, {"compute": 0.125}),
        ("single", 1, {"compute": 0.9}),
        ("single", 2, {"compute": 0.45}),
        ("dual", 1, {"speedup": 2.5}),
        ("shared", 1, {"compute": np.float32(0.6)}),
        ("keyword", 1, {"speedup": 2}),
        ("self-forward", 1, {"speedup": 2}),
        ("instance-forward", 2, {"speedup": 2}),
        ("parallel-block", 1, {"compute": 0.35}),
        ("in-place", 1, {"compute": 0.55}),
    ],
)
def test_the_budget_is_kept_in_a_real_run(
    toy_name: str, branches: int, target: dict[str, float]
) -> None:
    toy = build(toy_name, depth=2)
    before = state_of(toy)
    sample = Sampler(toy, branches=branches).alone
    schedule = search(toy, sample, max_cost=12, **target)
    best = result_of(schedule).best
    budget = target.get("compute", 1 / target.get("speedup", 1))
    assert schedule.compute == best.compute <= budget + 1e-9
    assert real_compute(toy, sample, schedule) == pytest.approx(best.compute, abs=1e-9)
    assert best.schedule is not None and best.schedule.rows == schedule.rows
    assert schedule.is_all_compute == (budget == 1)
    assert state_of(toy) == before


def test_a_model_with_a_single_layer() -> None:
    toy = build("parallel-block", depth=1)
    schedule = search(toy, Sampler(toy).alone, compute=0.5)
    assert real_compute(toy, Sampler(toy).alone, schedule) <= 0.5 + 1e-9


@pytest.mark.parametrize("target", [{"compute": 0.7}, {"compute": 0.5}, {"max_error": 0.02}])
def test_two_denoisers_that_share_a_generation(target: dict[str, float]) -> None:
    pipe, sample = two_denoisers()
    before = state_of(pipe)
    schedule = search(pipe, sample, **target)
    assert len(schedule.rows) == 8
    assert real_compute(pipe, sample, schedule) == pytest.approx(schedule.compute, abs=1e-9)
    assert result_of(schedule).best.compute <= target.get("compute", 0.6) + 1e-9
    assert result_of(schedule).best.error <= target.get("max_error", 1)
    assert state_of(pipe) == before


@pytest.mark.parametrize("target", [{"compute": 0.05}, {"speedup": 8.1}, {"speedup": 1e9}])
def test_a_budget_that_nothing_meets(toy: Toy, target: dict[str, float]) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=r"no schedule is as cheap .* 0\.125"):
        search(toy, Sampler(toy).stepped, calibrated(), **target)


def test_a_pipeline_whose_budget_nothing_meets() -> None:
    pipe, sample = two_denoisers()
    with pytest.raises(sc.InvalidArgumentError, match="no schedule is as cheap"):
        search(pipe, sample, compute=0.2)


@pytest.mark.parametrize(
    ("toy_name", "num_steps", "budget"),
    [
        ("single", 8, 0.7),
        ("dual", 9, 0.5),
        ("single", 8, 0.4),
        ("dual", 9, 0.3),
        ("single", 8, 0.2),
    ],
)
def test_no_uniform_schedule_is_better(toy_name: str, num_steps: int, budget: float) -> None:
    toy = build(toy_name, depth=2)
    sample = Sampler(toy, num_steps).alone
    schedule = search(toy, sample, calibrated(toy_name, num_steps), compute=budget)
    error = error_of(toy, sample, schedule, range(2))
    rivals = [
        np.mean(errors[:2])
        for compute, errors in uniform_runs(toy_name, num_steps)
        if compute <= budget + 1e-9
    ]
    assert error <= min(rivals) + 1e-12
    assert result_of(schedule).front[-1].error == pytest.approx(error, abs=1e-9)


def test_more_samples_are_more_samples(toy: Toy) -> None:
    sampler = Sampler(toy)
    options = {"num_samples": 3, "num_validation": 4, "compute": 0.5, "max_cost": 1}
    search(toy, sampler.alone, **options)
    assert {i for i, _ in sampler.calls} == set(range(7))


@pytest.mark.parametrize("seed", [0, 5])
def test_the_same_seed_gives_the_same(seed: int) -> None:
    runs = [
        search(toy, Sampler(toy).stepped, speedup=2, seed=seed)
        for toy in (build("single", depth=2), build("single", depth=2))
    ]
    assert same(*runs)


def test_the_order_of_dicts_does_not_matter(toy: Toy) -> None:
    calibration = calibrated()
    turned = copy.copy(calibration)
    object.__setattr__(turned, "provenance", dict(reversed(calibration.provenance.items())))
    backwards = dict(reversed(SOLVERS.items()))
    for options in ({"joint": True}, {}):
        one = search(toy, Sampler(toy).full, calibration, compute=0.4, solvers=SOLVERS, **options)
        other = search(toy, Sampler(toy).full, turned, compute=0.4, solvers=backwards, **options)
        assert same(one, other)


def test_outputs_of_several_tensors(toy: Toy) -> None:
    def sample(i: int) -> dict[str, Any]:
        x = Sampler(toy).alone(i)
        return {"latents": [x[:, :2], x[:, 2:]], "seed": i, "nothing": None}

    one, other = (search(toy, way, compute=0.5) for way in (sample, Sampler(toy).alone))
    assert one.rows == other.rows
    assert one.quality["error"] == pytest.approx(other.quality["error"])


@pytest.mark.parametrize("sample", [None, "sample", torch.zeros(2), 3])
def test_a_sample_that_is_no_function(toy: Toy, sample: Any) -> None:
    with pytest.raises(sc.InvalidArgumentError, match="sample must be a function"):
        search(toy, sample, speedup=2)


@pytest.mark.parametrize("k", [0, 3, 12])
def test_a_sample_that_raises(toy: Toy, k: int) -> None:
    sampler = Sampler(toy)

    def sample(i: int) -> Tensor:
        if len(sampler.calls) == k:
            toy.denoise(torch.zeros(1, TOKENS, WIDTH), torch.tensor([1000.0]), torch.tensor([0]))
            raise RuntimeError("out of memory")
        return sampler.alone(i)

    with pytest.raises(RuntimeError, match="out of memory"):
        search(toy, sample, speedup=2)


def test_the_calibration_of_another_model(toy: Toy) -> None:
    sampler = Sampler(toy)
    with pytest.raises(sc.ScheduleMismatchError, match="another model"):
        search(toy, sampler.alone, calibrated("dual"), speedup=2)
    assert sampler.calls == []


@pytest.mark.parametrize("num_steps", [7, 9])
def test_the_calibration_of_another_number_of_steps(toy: Toy, num_steps: int) -> None:
    with pytest.raises(sc.ScheduleMismatchError, match=f"the schedule covers {num_steps}"):
        search(toy, Sampler(toy).alone, calibrated(num_steps=num_steps), speedup=2)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_too_few_steps(toy: Toy, num_steps: int) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=rf"{num_steps} steps.* at least 4"):
        search(toy, Sampler(toy, num_steps).stepped, speedup=1.5)


def test_the_fewest_steps(toy: Toy) -> None:
    schedule = search(toy, Sampler(toy, 4).stepped, speedup=2)
    assert real_compute(toy, Sampler(toy, 4).alone, schedule) <= 0.5 + 1e-9


def test_a_sample_that_runs_another_model(toy: Toy) -> None:
    other = build("single", depth=2)
    with pytest.raises(sc.CalibrationError, match="never ran the model"):
        search(toy, Sampler(other).alone, speedup=2)


def test_a_model_that_is_none() -> None:
    with pytest.raises(sc.InvalidArgumentError, match="expected a diffusers pipeline"):
        search(lambda x: x, lambda i: torch.zeros(1), speedup=2)


def test_a_model_that_is_cached_already(toy: Toy) -> None:
    sampler = Sampler(toy)
    with sc.cached(toy, sc.Schedule.uniform(toy, STEPS, 2)) as run:
        for calibration in (None, calibrated()):
            with pytest.raises(sc.AlreadyCachedError):
                search(toy, sampler.alone, calibration, speedup=2)
        run.reset()
