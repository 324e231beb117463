"""The search: its budget is a promise, its bookkeeping is right, and its winner does win."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.toys import CLASSES, TOKENS, WIDTH, Block, Toy, build
from torch import Tensor

import smoothcache as sc
from smoothcache.model.costs import MacCounter
from smoothcache.searching.masks import (
    affordable,
    every,
    every_from_last,
    least_error,
    neighbours,
    spaced,
)
from smoothcache.searching.objectives import latent_l2, typical_l2

STEPS = 8
PATIENCE = 120.0  # seconds until a process that waits is a failure


class Adams:
    """A solver of second order; as ``Euler``, it asks the model once in a step."""


class Euler:
    """The sampler's own solver under another name."""


class Sampler:
    """Samples with a toy, as far as each method lets a search choose, and notes every call."""

    def __init__(self, toy: Toy, num_steps: int = STEPS, branches: int = 1) -> None:
        self.toy, self.num_steps, self.branches = toy, num_steps, branches
        self.calls: list[tuple[int, int]] = []
        self.stop_after: int | None = None

    def alone(self, i: int) -> Tensor:
        return self._run(i, None, None)

    def stepped(self, i: int, num_inference_steps: int | None = None) -> Tensor:
        return self._run(i, num_inference_steps, None)

    def full(self, i: int, num_inference_steps: int | None = None, scheduler: Any = None) -> Tensor:
        return self._run(i, num_inference_steps, scheduler)

    def shaken(self, i: int, num_inference_steps: int | None = None) -> Tensor:
        """Gives the model one of four very different inputs in turn, which a cache cannot know."""
        return self._run(i, num_inference_steps, None, shake=3.0)

    def _run(self, i: int, num_steps: int | None, scheduler: Any, shake: float = 0.0) -> Tensor:
        num_steps = num_steps or self.num_steps
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((i, num_steps))
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(1, TOKENS, WIDTH, generator=generator)
        shakes = shake * torch.randn(4, TOKENS, WIDTH, generator=generator)
        before = None
        for step in range(num_steps):
            t = torch.tensor([1000 * (1 - step / num_steps)])
            given = x + shakes[step % 4]
            outputs = [
                self.toy.denoise(given, t, torch.tensor([(i + branch) % CLASSES]))
                for branch in range(self.branches)
            ]
            output = slope = sum(outputs) / self.branches
            if isinstance(scheduler, Adams) and before is not None:
                slope = 1.5 * output - 0.5 * before
            x, before = x - slope / num_steps, output
        return x


SOLVERS = {"adams": Adams(), "euler": Euler()}


def state_of(model: Any) -> list[Any]:
    toys = [model] if isinstance(model, Toy) else model.components.values()
    modules = [module for toy in toys for module in toy.modules()]
    return [
        (type(x), sorted(vars(x)), len(x._forward_hooks), len(x._forward_pre_hooks))
        for x in modules
    ]


@pytest.fixture
def toy() -> Iterator[Toy]:
    """A toy that no test may leave altered, whatever is raised in it."""
    toy = build("single", depth=2)
    before, output = state_of(toy), Sampler(toy).alone(0)
    yield toy
    assert state_of(toy) == before
    assert torch.equal(Sampler(toy).alone(0), output)


def search(model: Any, sample: Any, *args: Any, **options: Any) -> sc.SearchedSchedule:
    return sc.search(model, sample, *args, progress=False, **options)


@cache
def calibrated(toy_name: str = "single", num_steps: int = STEPS) -> sc.Calibration:
    toy = build(toy_name, depth=2)
    return sc.calibrate(toy, Sampler(toy, num_steps).alone, 2, progress=False)


@cache
def found(way: str, **options: Any) -> tuple[sc.SearchedSchedule, list[tuple[int, int]]]:
    """What a search finds for the toy, and the calls that it made."""
    toy = build("single", depth=2)
    sampler = Sampler(toy)
    return search(toy, getattr(sampler, way), **options), sampler.calls


def result_of(schedule: sc.SearchedSchedule) -> sc.SearchResult:
    assert schedule.result is not None
    return schedule.result


def distance(output: Tensor, reference: Tensor) -> float:
    return float((output.double() - reference.double()).norm() / reference.double().norm())


def errors_of(
    model: Any,
    sample: Callable[[int], Tensor],
    schedule: sc.Schedule,
    samples: range,
    references: list[Tensor] | None = None,
) -> list[float]:
    """The error of each sample, run by hand."""
    references = references or [sample(i) for i in samples]
    errors = []
    for i, reference in zip(samples, references, strict=True):
        with sc.cached(model, schedule) as run:
            output = sample(i)
        assert run.summary().recomputed == {}
        errors.append(distance(output, reference))
    return errors


def error_of(*arguments: Any) -> float:
    """The mean over the samples."""
    return float(np.mean(errors_of(*arguments)))


def macs_of(run: Callable[[], Any]) -> int:
    with MacCounter() as counter:
        run()
    return counter.total


def real_compute(
    model: Any, sample: Callable[[int], Any], schedule: sc.Schedule, **options: Any
) -> float:
    """MACs of a run under a schedule, with these options, over those of an uncached one."""
    with sc.cached(model, schedule) as run:
        macs = macs_of(lambda: sample(0, **options))
    assert run.summary().recomputed == {} and run.summary().never_ran == ()
    return macs / macs_of(lambda: sample(0))


def same(a: sc.SearchedSchedule, b: sc.SearchedSchedule) -> bool:
    """Whether two searches came to the same in every way."""
    ours, theirs = result_of(a), result_of(b)
    return (
        a == b
        and str(ours) == str(theirs)
        and (ours.best, ours.honest, ours.front) == (theirs.best, theirs.honest, theirs.front)
        and (ours.rollouts, ours.cost) == (theirs.rollouts, theirs.cost)
    )


@pytest.mark.parametrize(
    ("toy_name", "branches", "target"),
    [
        ("single", 1, {"speedup": 1}),
        ("single", 1, {"speedup": 1.3}),
        ("single", 1, {"speedup": 2.0}),
        ("single", 1, {"speedup": 3.7}),
        ("single", 1, {"compute": 0.125}),
        ("single", 1, {"compute": 0.9}),
        ("single", 1, {"compute": 1}),
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
    schedule = search(toy, sample, max_cost=25, **target)
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


def two_denoisers() -> tuple[Any, Callable[[int], Tensor]]:
    """A pipeline of which each half of the steps has a denoiser of its own."""
    toys = [build("single", seed, depth=2) for seed in range(2)]
    pipe = SimpleNamespace(components={"transformer": toys[0], "transformer_2": toys[1]})

    def sample(i: int) -> Tensor:
        x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(i))
        for step in range(STEPS):
            t = torch.tensor([1000 * (1 - step / STEPS)])
            x = x - toys[step >= STEPS // 2](x, t, torch.tensor([i % CLASSES])) / STEPS
        return x

    return pipe, sample


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


@cache
def uniform_runs(toy_name: str, num_steps: int) -> list[tuple[float, list[float]]]:
    """Compute, and error on each sample of a search, seen and unseen, of every uniform schedule."""
    toy = build(toy_name, depth=2)
    sample = Sampler(toy, num_steps).alone
    references = [sample(i) for i in range(4)]
    runs = []
    for granularity in ("auto", "model"):
        for interval in range(1, num_steps + 1):
            compute = None
            for predictor in (name for name, x in sc.PREDICTORS.items() if x.axis == "step"):
                schedule = sc.Schedule.uniform(
                    toy, num_steps, interval, predictor=predictor, granularity=granularity
                )
                compute = compute or real_compute(toy, sample, schedule)
                errors = errors_of(toy, sample, schedule, range(4), references)
                runs.append((compute, errors))
    return runs


@pytest.mark.parametrize(("toy_name", "num_steps"), [("single", 8), ("dual", 9)])
@pytest.mark.parametrize("budget", [0.7, 0.5, 0.4, 0.3, 0.2])
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


def test_no_move_of_a_computed_step_makes_the_winner_better(toy: Toy) -> None:
    sample = Sampler(toy).alone
    schedule = search(toy, sample, calibrated(), compute=0.5, num_samples=1, max_cost=1000)
    (row,) = set(schedule.rows.values())
    error = error_of(toy, sample, schedule, range(1))
    for mask in neighbours(row.computed, random.Random(0)):
        moved = sc.Schedule(
            schedule.num_steps,
            {path: sc.Row(mask, row.predictor) for path in schedule.rows},
            schedule.layers,
        )
        assert error_of(toy, sample, moved, range(1)) >= error - 1e-12


@pytest.mark.parametrize("options", [{"speedup": 2.0}, {"max_error": 0.01}])
def test_the_front_is_what_was_measured_and_a_pareto_front(
    toy: Toy, options: dict[str, float]
) -> None:
    result = result_of(found("stepped", **options)[0])
    for cheaper, dearer in pairwise(result.front):
        assert cheaper.compute < dearer.compute and cheaper.error > dearer.error
    for row in result.front:
        assert row.schedule is not None
        error = error_of(toy, Sampler(toy).alone, row.schedule, range(2))
        assert row.error == pytest.approx(error, abs=1e-9)
        assert row.schedule.compute == row.compute
    assert any(row.schedule.rows == result.best.schedule.rows for row in result.front)  # type: ignore[union-attr]


def test_the_quality_is_that_on_unseen_samples(toy: Toy) -> None:
    schedule, _ = found("stepped", speedup=2.0)
    best = result_of(schedule).best
    sample = Sampler(toy).stepped
    errors, converged_errors = [], []
    for i in range(2, 4):
        with sc.cached(toy, schedule):
            output = sample(i)
        errors.append(distance(output, sample(i)))
        converged_errors.append(distance(output, sample(i, 10 * STEPS)))
    assert best.error == pytest.approx(np.mean(errors), abs=1e-9)
    assert best.converged_error == pytest.approx(np.mean(converged_errors), abs=1e-9)
    assert schedule.quality == {
        "error": best.error,
        "error to the converged sample": best.converged_error,
    }


def test_the_ways_without_a_cache_are_measured_on_the_same_samples(toy: Toy) -> None:
    result = result_of(search(toy, Sampler(toy).full, calibrated(), compute=0.3, solvers=SOLVERS))
    assert [row.name for row in result.honest] == [
        "2 steps",
        "2 steps of adams",
        "2 steps of euler",
    ]
    sample = Sampler(toy).full
    for row in result.honest:
        assert (row.schedule, row.num_steps, row.compute) == (None, 2, 0.25)
        outputs = [sample(i, 2, SOLVERS.get(row.solver or "")) for i in range(2, 4)]
        uncached = [distance(x, sample(i)) for x, i in zip(outputs, range(2, 4), strict=True)]
        converged = [distance(x, sample(i, 80)) for x, i in zip(outputs, range(2, 4), strict=True)]
        assert row.error == pytest.approx(np.mean(uncached), abs=1e-9)
        assert row.converged_error == pytest.approx(np.mean(converged), abs=1e-9)
    assert result.scheduler is None and result.num_steps == STEPS


@cache
def cheapest(max_error: float) -> sc.SearchedSchedule:
    toy = build("single", depth=2)
    return search(toy, Sampler(toy).alone, calibrated(), max_error=max_error)


ERRORS = (0.1, 0.02, 0.005, 0.001, 1e-5, 0.0)


@pytest.mark.parametrize("max_error", ERRORS)
def test_the_cheapest_that_keeps_an_error(toy: Toy, max_error: float) -> None:
    schedule = cheapest(max_error)
    sample = Sampler(toy).alone
    assert error_of(toy, sample, schedule, range(2, 4)) <= max_error
    compute = real_compute(toy, sample, schedule)
    assert compute == pytest.approx(result_of(schedule).best.compute, abs=1e-9)
    rivals = [
        rival
        for rival, errors in uniform_runs("single", STEPS)
        if max(np.mean(errors[:2]), np.mean(errors[2:])) <= max_error
    ]
    assert compute <= min(rivals) + 1e-9
    assert result_of(schedule).cost <= 60


def test_a_tighter_error_is_not_cheaper() -> None:
    computes = [cheapest(max_error).compute for max_error in ERRORS]
    assert computes == sorted(computes)
    assert computes[0] == pytest.approx(1 / STEPS) and computes[-1] == 1


def test_an_error_that_nothing_keeps(toy: Toy) -> None:
    def objective(output: Tensor, reference: Tensor) -> float:
        return 1 + distance(output, reference)

    with pytest.raises(sc.InvalidArgumentError, match=r"no schedule .* 0\.5 .* without a cache"):
        search(toy, Sampler(toy).alone, calibrated(), max_error=0.5, objective=objective)


def test_an_error_for_which_max_cost_is_too_small(toy: Toy) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=r"of the 6 generations that max_cost"):
        search(toy, Sampler(toy).alone, calibrated(), max_error=0.001, max_cost=6)


@pytest.mark.parametrize(
    ("way", "options", "is_calibrated"),
    [
        ("alone", {"speedup": 1.8, "max_cost": 20}, False),
        ("alone", {"max_error": 0.005, "max_cost": 30}, True),
        ("stepped", {"speedup": 1.8, "max_cost": 45}, True),
        ("full", {"compute": 0.5, "solvers": SOLVERS, "max_cost": 45}, False),
        ("full", {"compute": 0.5, "solvers": SOLVERS, "joint": True, "max_cost": 45}, False),
    ],
)
def test_everything_that_is_run_is_counted(
    way: str, options: dict[str, Any], is_calibrated: bool
) -> None:
    toy = build("single", depth=1)
    sampler = Sampler(toy, num_steps=5)
    calibration = None
    if is_calibrated:
        calibration = sc.calibrate(toy, Sampler(toy, 5).alone, 2, progress=False)
    with MacCounter() as counter:
        result = result_of(search(toy, getattr(sampler, way), calibration, **options))
    samples = 2 if options.get("joint") else 4
    converged = sum(num_steps == 50 for _, num_steps in sampler.calls)
    assert converged == {"alone": 0, "stepped": 2, "full": 2}[way]
    calibrating = 0 if is_calibrated else samples // 2
    # Gains are fitted in generations in which the model does not run.
    assert len(sampler.calls) >= calibrating + samples + converged + result.rollouts
    once = macs_of(lambda: Sampler(toy, 5).alone(0))
    assert counter.total / once == pytest.approx(result.cost, abs=1e-6)
    assert result.cost <= options["max_cost"]


@pytest.mark.parametrize("options", [{"speedup": 1.5}, {"compute": 0.3}])
def test_max_cost_is_kept_if_the_least_fits(toy: Toy, options: dict[str, float]) -> None:
    least = result_of(search(toy, Sampler(toy).stepped, calibrated(), max_cost=0.1, **options))
    errors = [least.front[-1].error]
    for max_cost in (least.cost, least.cost + 9, 60):
        result = result_of(
            search(toy, Sampler(toy).stepped, calibrated(), max_cost=max_cost, **options)
        )
        assert least.cost <= result.cost <= max_cost
        errors.append(result.front[-1].error)
    assert min(errors) == errors[-1] and errors[0] == max(errors)
    assert least.cost < 60


def test_more_samples_are_more_samples(toy: Toy) -> None:
    sampler = Sampler(toy)
    options = {"num_samples": 3, "num_validation": 4, "compute": 0.5, "max_cost": 1}
    search(toy, sampler.alone, **options)
    assert {i for i, _ in sampler.calls} == set(range(7))


def test_seconds_end_the_improvement(toy: Toy) -> None:
    schedules = [
        search(toy, Sampler(toy).alone, calibrated(), speedup=2, **options)
        for options in ({"seconds": 1e-6}, {"max_cost": 0.1}, {"seconds": 1000}, {})
    ]
    assert same(schedules[0], schedules[1]) and same(schedules[2], schedules[3])
    assert result_of(schedules[0]).rollouts < result_of(schedules[2]).rollouts


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


def test_a_saved_schedule_is_a_plain_one(toy: Toy, tmp_path: Path) -> None:
    schedule, _ = found("stepped", speedup=2.0)
    schedule.save(tmp_path / "fast.json")
    loaded = sc.Schedule.load(tmp_path / "fast.json")
    assert type(loaded) is sc.Schedule
    plain = {name: getattr(schedule, name) for name in sc.Schedule.__dataclass_fields__}
    assert loaded == sc.Schedule(**plain)
    result = result_of(schedule)
    assert loaded.quality["error"] == result.best.error
    assert loaded.provenance["planner"] == "search"
    assert loaded.provenance["family"] == result.best.name
    assert loaded.provenance["rollouts"] == str(result.rollouts)
    assert loaded.provenance["verdict"] == result.verdict
    outputs = []
    for each in (schedule, loaded):
        with sc.cached(toy, each):
            outputs.append(Sampler(toy).alone(7))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("twice", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_searched_schedule_can_be_copied(twice: Callable[[Any], Any]) -> None:
    schedule, _ = found("stepped", speedup=2.0)
    copied = twice(schedule)
    assert isinstance(copied, sc.SearchedSchedule) and same(copied, schedule)


def test_a_result_is_a_short_text() -> None:
    result = result_of(found("stepped", speedup=2.0)[0])
    head, best, fewer, spent, verdict = str(result).splitlines()
    assert head.split() == ["compute", "error", "to", "converged"]
    assert best.startswith(result.best.name[:32]) and f"{result.best.error:.4f}" in best
    assert fewer.startswith("4 steps ") and "50.0%" in fewer
    assert fewer.endswith(f"{result.honest[0].converged_error:.4f}")
    told = f"{result.rollouts} rollouts, as much as {result.cost:.1f} uncached generations"
    assert spent == told
    assert verdict == result.verdict


def test_where_the_cache_pays() -> None:
    result = result_of(found("stepped", speedup=2.0)[0])
    assert result.best.error < result.honest[0].error
    assert result.verdict.startswith(
        "the schedule pays: it ends closer to the uncached run than 4 steps at no less cost"
    )


def test_a_rival_that_costs_less_is_not_said_to_cost_as_much(toy: Toy) -> None:
    result = result_of(search(toy, Sampler(toy).stepped, compute=0.49, max_cost=1))
    assert result.honest[0].compute == 0.375 < result.best.compute
    assert "no less cost" not in result.verdict and "instead of 37.5%" in result.verdict


def test_where_fewer_steps_are_better(toy: Toy) -> None:
    result = result_of(search(toy, Sampler(toy).shaken, speedup=2))
    assert result.honest[0].error < result.best.error
    assert "NO CACHE IS BETTER: 4 steps costs 50.0% and ends closer" in str(result)


def test_without_a_budget_nothing_is_gained(toy: Toy) -> None:
    schedule = search(toy, Sampler(toy).stepped, speedup=1, max_cost=1)
    assert schedule.is_all_compute and schedule.quality["error"] == 0
    assert "NO CACHE IS BETTER: 8 steps costs 100.0% and ends as close" in str(schedule.result)


def test_a_sampler_that_cannot_take_fewer_steps(toy: Toy) -> None:
    schedule = search(toy, Sampler(toy).alone, speedup=2, max_cost=1)
    result = result_of(schedule)
    assert result.honest == () and result.best.converged_error is None
    assert "not compared with fewer steps" in result.verdict
    assert "converged" not in str(result)
    assert list(schedule.quality) == ["error"]


def test_outputs_of_several_tensors(toy: Toy) -> None:
    def sample(i: int) -> dict[str, Any]:
        x = Sampler(toy).alone(i)
        return {"latents": [x[:, :2], x[:, 2:]], "seed": i, "nothing": None}

    one, other = (search(toy, way, compute=0.5) for way in (sample, Sampler(toy).alone))
    assert one.rows == other.rows
    assert one.quality["error"] == pytest.approx(other.quality["error"])


def test_blocks_are_searched_over_if_they_were_calibrated(toy: Toy) -> None:
    sampler = Sampler(toy)
    blocks = sc.calibrate(toy, sampler.alone, 2, granularity="block", progress=False)
    ours = search(toy, sampler.alone, blocks, compute=0.6)
    tried = {row.schedule.layers for row in result_of(ours).front if row.schedule is not None}
    assert blocks.layers in tried
    assert {x.kind for x in blocks.layers} == {"block"}
    assert ours.compute is not None and ours.compute <= 0.6


def test_an_objective_that_is_given(toy: Toy) -> None:
    """Where it is a number larger by a constant, or a tensor, the same comes out."""
    given: list[tuple[bool, bool]] = []

    def objective(output: Any, reference: Any) -> Tensor:
        given.append((isinstance(output, Tensor), isinstance(reference, Tensor)))
        return torch.tensor(3 + distance(output, reference), dtype=torch.float64)

    ours = search(toy, Sampler(toy).alone, calibrated(), speedup=2, objective=objective)
    theirs = search(toy, Sampler(toy).alone, calibrated(), speedup=2)
    assert ours.rows == theirs.rows and set(given) == {(True, True)}
    assert ours.quality["error"] == pytest.approx(3 + theirs.quality["error"])


def test_the_typical_distance_is_the_geometric_mean_over_the_batch(toy: Toy) -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    output = reference + torch.tensor([[0.0, 0.05], [0.0, 1.0]])
    assert typical_l2(output, reference) == pytest.approx((0.01 * 1.0) ** 0.5, rel=1e-4)
    assert typical_l2(reference, reference) < 1e-9
    for apart in ([output, torch.zeros(3)], [output, torch.tensor(1.0)]):  # no common batch
        whole = [reference, *map(torch.ones_like, apart[1:])]
        assert typical_l2(apart, whole) == latent_l2(apart, whole)
    ours = search(toy, Sampler(toy).alone, calibrated(), speedup=2, objective="typical_l2")
    assert ours.result is not None and ours.compute is not None and ours.compute <= 0.5


def test_an_objective_below_zero_is_improved_too(toy: Toy) -> None:
    def objective(output: Tensor, reference: Tensor) -> float:
        return distance(output, reference) - 1

    ours = search(toy, Sampler(toy).alone, calibrated(), speedup=2, objective=objective)
    theirs = search(toy, Sampler(toy).alone, calibrated(), speedup=2)
    assert ours.quality["error"] == pytest.approx(theirs.quality["error"] - 1)


@pytest.mark.parametrize("value", [math.nan, None, "far", torch.zeros(2), torch.tensor(math.nan)])
def test_an_objective_that_gives_no_number(toy: Toy, value: Any) -> None:
    with pytest.raises(sc.InvalidArgumentError, match="objective must give a number, got"):
        search(toy, Sampler(toy).alone, speedup=2, objective=lambda *_: value)


def test_a_candidate_that_overflows_only_loses(toy: Toy) -> None:
    sampler = Sampler(toy)
    known = {i: sampler.alone(i) for i in range(4)}

    def sample(i: int) -> Tensor:
        x = sampler.alone(i)
        return x if distance(x, known[i]) < 0.004 else x * math.inf

    schedule = search(toy, sample, speedup=2)
    assert schedule.quality["error"] < 0.004


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_a_joint_search(toy: Toy, budget: float) -> None:
    sample = Sampler(toy).full
    schedule = search(
        toy, sample, calibrated(), compute=budget, joint=True, solvers=SOLVERS, max_cost=80
    )
    result = result_of(schedule)
    assert result.scheduler in (None, *SOLVERS.values())
    assert result.scheduler is SOLVERS.get(result.best.solver or "")
    assert result.num_steps == schedule.num_steps == result.best.num_steps or STEPS
    options = {"num_inference_steps": result.num_steps, "scheduler": result.scheduler}
    compute = real_compute(toy, sample, schedule, **options)
    assert compute == pytest.approx(result.best.compute, abs=1e-9)
    assert compute <= budget + 1e-9 and result.cost <= 80
    with sc.cached(toy, schedule):
        output = sample(1, **options)
    error = distance(output, sample(1, 10 * STEPS))
    assert result.best.converged_error == pytest.approx(error, abs=1e-9)
    assert all(error <= row.converged_error + 1e-12 for row in result.honest)  # type: ignore[operator]


def test_a_joint_search_that_needs_no_cache(toy: Toy) -> None:
    """Where every cache is far off, the solver alone comes out, as a schedule that computes all."""

    def sample(i: int, num_inference_steps: int = STEPS, scheduler: Any = None) -> Tensor:
        return Sampler(toy).shaken(i, num_inference_steps)

    schedule = search(toy, sample, compute=0.5, joint=True, solvers={"other": Euler()})
    result = result_of(schedule)
    assert result.best.schedule is None and schedule.is_all_compute
    assert schedule.num_steps == result.num_steps == 4
    assert result.verdict.startswith("no cache is needed: 4 steps")
    compute = real_compute(toy, sample, schedule, num_inference_steps=4)
    assert compute == result.best.compute == 0.5


def test_a_joint_schedule_names_the_class_of_its_solver(toy: Toy) -> None:
    schedule = search(
        toy, Sampler(toy).full, compute=0.5, joint=True, solvers={"a name, of it": Adams()}
    )
    assert result_of(schedule).best.solver == "a name, of it"
    assert schedule.solver == "Adams"


def test_a_joint_search_for_an_error(toy: Toy) -> None:
    """The error is that to the converged sample; the uncached run itself is too far from it."""
    own = distance(Sampler(toy).full(1), Sampler(toy).full(1, 10 * STEPS))
    schedule = search(
        toy, Sampler(toy).full, max_error=own / 2, joint=True, solvers=SOLVERS, max_cost=100
    )
    best = result_of(schedule).best
    assert best.converged_error is not None and best.converged_error <= own / 2
    assert best.compute < 1


OPTIONS: dict[str, Any] = {"speedup": 2.0, "max_cost": 27, "num_validation": 1}


def test_an_interrupted_search_is_taken_up_again(toy: Toy, tmp_path: Path) -> None:
    whole = Sampler(toy)
    expected = search(toy, whole.stepped, **OPTIONS)
    for k in (1, 5, 7, 12, len(whole.calls) - 1):
        journal = tmp_path / f"{k}.jsonl"
        first = Sampler(toy)
        first.stop_after = k
        with pytest.raises(KeyboardInterrupt):
            search(toy, first.stepped, journal=journal, **OPTIONS)
        assert state_of(toy) == state_of(build("single", depth=2))
        second = Sampler(toy)
        assert same(search(toy, second.stepped, journal=journal, **OPTIONS), expected)
        known = max(0, k - 7)  # 2 of the calibration, 4 references, and one of those again
        assert len(second.calls) == len(whole.calls) - known
        third = Sampler(toy)
        text = journal.read_text()
        assert same(search(toy, third.stepped, journal=journal, **OPTIONS), expected)
        assert len(third.calls) == 7 and journal.read_text() == text


def test_a_journal_changes_nothing(toy: Toy, tmp_path: Path) -> None:
    with_journal = search(toy, Sampler(toy).stepped, journal=tmp_path / "a.jsonl", **OPTIONS)
    assert same(with_journal, search(toy, Sampler(toy).stepped, **OPTIONS))


def test_a_journal_serves_another_budget(toy: Toy, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    search(toy, Sampler(toy).stepped, speedup=2, journal=journal)
    again, anew = Sampler(toy), Sampler(toy)
    for sampler, path in ((again, journal), (anew, None)):
        search(toy, sampler.stepped, max_error=0.005, journal=path)
    assert len(again.calls) < len(anew.calls)


def other_objective(output: Tensor, reference: Tensor) -> float:
    return 2 * distance(output, reference)


@pytest.mark.parametrize(
    "other",
    [
        lambda: (build("single", depth=3), {}),
        lambda: (build("single", seed=1, depth=2), {}),
        lambda: (build("dual", depth=2), {}),
        lambda: (build("single", depth=2), {"num_steps": 9}),
        lambda: (build("single", depth=2), {"branches": 2}),
        lambda: (build("single", depth=2), {"objective": other_objective}),
    ],
    ids=["depth", "weights", "model", "steps", "sampler", "objective"],
)
def test_the_journal_of_another_search(other: Callable[[], Any], tmp_path: Path) -> None:
    toy, journal = build("single", depth=2), tmp_path / "journal.jsonl"
    search(toy, Sampler(toy).alone, speedup=2, max_cost=1, journal=journal)
    text = journal.read_text()
    toy, options = other()
    before = state_of(toy)
    objective = options.pop("objective", "latent_l2")
    with pytest.raises(sc.InvalidArgumentError, match=r"journal .* of another search.*remove it"):
        search(toy, Sampler(toy, **options).alone, speedup=2, objective=objective, journal=journal)
    assert journal.read_text() == text and state_of(toy) == before


@pytest.mark.parametrize("text", ["hello\n", "{}\n", '{"format": "smoothcache search"}\n[1, 2]\n'])
def test_a_file_that_is_no_journal(toy: Toy, tmp_path: Path, text: str) -> None:
    (tmp_path / "journal.jsonl").write_text(text)
    with pytest.raises(sc.InvalidArgumentError, match="remove it, or name another file"):
        search(toy, Sampler(toy).alone, speedup=2, journal=tmp_path / "journal.jsonl")
    assert (tmp_path / "journal.jsonl").read_text() == text


def test_a_journal_cut_short(toy: Toy, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    expected = search(toy, Sampler(toy).stepped, journal=journal, **OPTIONS)
    whole = journal.read_text()
    length = len(whole.splitlines()[-1])
    for cut in (1, 2, length // 2, length, length + 1):
        journal.write_text(whole[: -cut - 1])
        assert same(search(toy, Sampler(toy).stepped, journal=journal, **OPTIONS), expected)
        last = journal.read_text().splitlines()[-1]
        assert last == whole.splitlines()[-1] and json.loads(last)


def test_an_empty_journal_is_begun(toy: Toy, tmp_path: Path) -> None:
    journals = [tmp_path / "empty.jsonl", tmp_path / "new.jsonl"]
    journals[0].touch()
    for journal in journals:
        search(toy, Sampler(toy).alone, speedup=2, max_cost=1, journal=str(journal))
    assert journals[0].read_text() == journals[1].read_text()


def test_a_journal_in_a_folder_that_is_missing(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder of the journal .*missing"):
        search(toy, Sampler(toy).alone, speedup=2, journal=tmp_path / "missing" / "journal.jsonl")


@pytest.mark.parametrize("lines", [0, 1, 7])
def test_a_disk_that_is_full(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    journal, written, open_ = tmp_path / "journal.jsonl", [], Path.open

    def open_until_full(path: Path, mode: str = "r", **options: Any) -> Any:
        if path == journal and mode == "a":
            written.append(path)
            if len(written) > lines:
                raise OSError(28, "No space left on device")
        return open_(path, mode, **options)

    monkeypatch.setattr(Path, "open", open_until_full)
    with pytest.warns(sc.SmoothCacheWarning, match="No space left .* goes on") as caught:
        schedule = search(toy, Sampler(toy).stepped, journal=journal, **OPTIONS)
    assert len(caught) == 1
    monkeypatch.undo()
    assert same(schedule, search(toy, Sampler(toy).stepped, **OPTIONS))
    if lines:
        again = Sampler(toy)
        assert same(schedule, search(toy, again.stepped, journal=journal, **OPTIONS))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["exactly one", "speedup", "compute", "max_error"]),
        ({"speedup": 2, "compute": 0.5}, ["exactly one"]),
        ({"speedup": 2, "max_error": 0.1}, ["exactly one"]),
        ({"speedup": 0.99}, ["speedup", "0.99"]),
        ({"speedup": 0}, ["speedup", "0"]),
        ({"speedup": -2}, ["speedup", "-2"]),
        ({"speedup": math.nan}, ["speedup", "nan"]),
        ({"speedup": math.inf}, ["speedup", "inf"]),
        ({"speedup": "2"}, ["speedup", "'2'"]),
        ({"speedup": True}, ["speedup", "True"]),
        ({"speedup": [2]}, ["speedup", "[2]"]),
        ({"compute": 0}, ["compute", "0"]),
        ({"compute": 1.01}, ["compute", "1.01"]),
        ({"compute": -0.5}, ["compute", "-0.5"]),
        ({"compute": math.nan}, ["compute", "nan"]),
        ({"compute": "half"}, ["compute", "'half'"]),
        ({"max_error": -0.1}, ["max_error", "-0.1"]),
        ({"max_error": math.nan}, ["max_error", "nan"]),
        ({"max_error": "0"}, ["max_error", "'0'"]),
        ({"speedup": 2, "seconds": 0}, ["seconds", "0"]),
        ({"speedup": 2, "seconds": math.nan}, ["seconds", "nan"]),
        ({"speedup": 2, "max_cost": 0}, ["max_cost", "0"]),
        ({"speedup": 2, "max_cost": math.nan}, ["max_cost", "nan"]),
        ({"speedup": 2, "objective": "psnr"}, ["objective", "'psnr'"]),
        ({"speedup": 2, "objective": None}, ["objective", "None"]),
        ({"speedup": 2, "num_samples": 0}, ["num_samples", "0"]),
        ({"speedup": 2, "num_samples": 1.5}, ["num_samples", "1.5"]),
        ({"speedup": 2, "num_validation": 0}, ["num_validation", "0"]),
        ({"speedup": 2, "num_validation": True}, ["num_validation", "True"]),
        ({"speedup": 2, "seed": -1}, ["seed", "-1"]),
        ({"speedup": 2, "seed": None}, ["seed", "None"]),
        ({"speedup": 2, "joint": True}, ["joint", "num_inference_steps", "scheduler"]),
    ],
)
def test_bad_arguments(toy: Toy, options: dict[str, Any], words: list[str]) -> None:
    sampler = Sampler(toy)
    with pytest.raises(sc.InvalidArgumentError) as caught:
        search(toy, sampler.stepped, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert sampler.calls == []


def test_a_solver_that_asks_twice_in_a_step(toy: Toy) -> None:
    sampler = Sampler(toy)
    solvers = {"adams": Adams(), "heun": SimpleNamespace(order=2)}
    with pytest.raises(sc.InvalidArgumentError, match="'heun' asks the model 2 times"):
        search(toy, sampler.full, speedup=2, joint=True, solvers=solvers)
    assert sampler.calls == []


@pytest.mark.parametrize("sample", [None, "sample", torch.zeros(2), 3])
def test_a_sample_that_is_no_function(toy: Toy, sample: Any) -> None:
    with pytest.raises(sc.InvalidArgumentError, match="sample must be a function"):
        search(toy, sample, speedup=2)


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x, n: None, ["sample(0)", "NoneType", "final tensor"]),
        (lambda x, n: {"images": []}, ["sample(0)", "dict", "final tensor"]),
        (lambda x, n: x.numpy(), ["sample(0)", "ndarray", "final tensor"]),
        (lambda x, n: x * math.nan, ["sample(0)", "NaN"]),
        (lambda x, n: [x, x / 0], ["sample(0)", "infinity"]),
        (lambda x, n: x + 0.01 * torch.randn(x.shape), ["sample(0)", "generator seeded with i"]),
        (lambda x, n: x + n / 100, ["sample(0)", "two results", "evaluation mode"]),
        (lambda x, n: x[:, : 1 + n % 3], ["shapes", "must be the same"]),
        (lambda x, n: (x,) * (1 + n % 3), ["shapes", "must be the same"]),
    ],
    ids=["none", "empty", "array", "nan", "inf", "noise", "drift", "shapes", "tuples"],
)
def test_a_sample_that_cannot_be_judged_by(
    toy: Toy, spoil: Callable[[Tensor, int], Any], words: list[str], is_calibrated: bool
) -> None:
    sampler = Sampler(toy)

    def sample(i: int) -> Any:
        x = sampler.alone(i)
        return spoil(x, len(sampler.calls))

    with pytest.raises(sc.InvalidArgumentError) as caught:
        search(toy, sample, calibrated() if is_calibrated else None, speedup=2)
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(sampler.calls) <= 7


def test_a_sample_that_returns_every_step(toy: Toy) -> None:
    def sample(i: int, num_inference_steps: int = STEPS) -> Tensor:
        return torch.cat([Sampler(toy).stepped(i, num_inference_steps)] * num_inference_steps)

    with pytest.raises(sc.InvalidArgumentError, match=r"\[80, 6, 16\].* must be the same"):
        search(toy, sample, speedup=2)


def test_a_sample_that_diverges_with_more_steps(toy: Toy) -> None:
    def sample(i: int, num_inference_steps: int = STEPS) -> Tensor:
        x = Sampler(toy).stepped(i, num_inference_steps)
        return x / 0 if num_inference_steps > STEPS else x

    with pytest.raises(sc.InvalidArgumentError, match=r"num_inference_steps=80\).* infinity"):
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
    with pytest.raises(sc.InvalidArgumentError, match=rf"{num_steps} steps.* 4 are the fewest"):
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


def what_was_found(rank: int) -> dict[str, Any]:
    """A search in this process, and one in which a sample fails in the last process alone."""
    toy = build("single", depth=2)
    sampler = Sampler(toy)
    schedule = search(toy, sampler.full, compute=0.4, solvers=SOLVERS, journal="journal.jsonl")
    again = Sampler(toy)
    repeated = search(toy, again.full, compute=0.4, solvers=SOLVERS, journal="journal.jsonl")
    failing = Sampler(toy)

    def sample(i: int) -> Tensor:
        if rank == 1 and len(failing.calls) == 9:
            raise ValueError("in one process alone")
        return failing.alone(i)

    failure, refusal = "", ""
    try:
        search(toy, sample, speedup=2)
    except ValueError as error:
        failure = str(error)
    try:
        search(toy, failing.alone, speedup=3, journal="journal.jsonl")
    except sc.InvalidArgumentError as error:
        refusal = str(error)
    result = result_of(schedule)
    return {
        "rows": {path: (row.computed, row.predictor) for path, row in schedule.rows.items()},
        "quality": dict(schedule.quality),
        "front": [(x.name, x.compute, x.error) for x in result.front],
        "told": (result.rollouts, result.cost, str(result)),
        "is_same_again": same(repeated, schedule),
        "calls": (len(sampler.calls), len(again.calls)),
        "failure": failure,
        "refusal": refusal,
        "is_unaltered": state_of(toy) == state_of(build("single", depth=2)),
    }


def processes_found(folder: Path, size: int) -> list[dict[str, Any]]:
    """What each of some processes found, begun as ``torchrun`` begins them."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * size, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)
def test_two_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the candidates out, write one journal, and fail together."""
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    one = what_was_found(rank=0)
    two = processes_found(tmp_path / "two", 2)
    for other in two:
        assert {x: other[x] for x in ("rows", "quality", "front", "told")} == {
            x: one[x] for x in ("rows", "quality", "front", "told")
        }
        assert other["is_same_again"] and other["is_unaltered"]
        assert other["failure"] == "in one process alone"
        assert "of another search" in other["refusal"]
        assert other["calls"][1] == one["calls"][1] < other["calls"][0] < one["calls"][0]
    shared = sum(calls - again for calls, again in (x["calls"] for x in two))
    assert shared == one["calls"][0] - one["calls"][1]
    journals = [tmp_path / name / "journal.jsonl" for name in ("one", "two")]
    lines = [sorted(journal.read_text().splitlines()) for journal in journals]
    assert lines[0] == lines[1]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Any, Any, int]:
    """Errors [max_gap, steps] with NaN where nothing is known, weights, and a count."""
    num_steps, max_gap = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    errors = rng.integers(0, 6, (max_gap, num_steps)) / 4
    for gap in range(1, max_gap + 1):
        errors[gap - 1, :gap] = np.nan
    return errors, rng.integers(0, 4, num_steps) / 2, draw(st.integers(1, num_steps))


def weighted_error(mask: tuple[bool, ...], errors: Any, weights: Any) -> float:
    total, last = 0.0, 0
    for step, is_computed in enumerate(mask):
        if is_computed:
            last = step
            continue
        gap = step - last
        known = errors[min(gap, len(errors)) - 1, step]
        total += weights[step] * known * max(1.0, gap / len(errors))
    return total


@given(tables())
def test_least_error_is_the_least(table: tuple[Any, Any, int]) -> None:
    errors, weights, count = table
    num_steps = len(weights)
    masks = [
        tuple(step in {0, *others} for step in range(num_steps))
        for others in combinations(range(1, num_steps), count - 1)
    ]
    mask = least_error(errors, weights, count)
    assert mask in masks
    least = min(weighted_error(x, errors, weights) for x in masks)
    assert weighted_error(mask, errors, weights) == pytest.approx(least)


@given(num_steps=st.integers(1, 60), power=st.floats(0.1, 6), data=st.data())
def test_spaced_computes_as_many_steps_as_told(
    num_steps: int, power: float, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_steps))
    mask = spaced(num_steps, count, power)
    assert len(mask) == num_steps and sum(mask) == count and mask[0]
    assert count == 1 or mask[-1]


@given(num_steps=st.integers(2, 60), data=st.data())
def test_spaced_is_even(num_steps: int, data: st.DataObject) -> None:
    mask = spaced(num_steps, data.draw(st.integers(2, num_steps)))
    gaps = np.diff([step for step, is_computed in enumerate(mask) if is_computed])
    assert max(gaps) - min(gaps) <= 1


@given(st.integers(1, 40), st.integers(1, 50))
def test_every_so_many_steps(num_steps: int, interval: int) -> None:
    assert every(num_steps, interval) == sc.Row.uniform(num_steps, interval).computed


@given(st.integers(2, 60), st.integers(1, 9), st.data())
def test_from_the_last_the_gaps_are_even_but_the_first(
    num_steps: int, interval: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_steps))
    computed = np.flatnonzero(every_from_last(num_steps, interval, count))
    assert computed[0] == 0 and len(computed) <= count
    assert set(np.diff(computed)[1:]) <= {interval}
    assert count == 1 or computed[-1] == num_steps - 1


@given(st.lists(st.booleans(), max_size=14), st.integers(0, 2**32))
def test_neighbours_are_one_move_away(later: list[bool], seed: int) -> None:
    mask = (True, *later)
    found = list(neighbours(mask, random.Random(seed)))
    expected = set()
    for old, new in ((old, old + by) for old in range(1, len(mask)) for by in (-2, -1, 1, 2)):
        if mask[old] and 0 < new < len(mask) and not mask[new]:
            moved = list(mask)
            moved[old], moved[new] = False, True
            expected.add(tuple(moved))
    assert len(found) == len(set(found)) and set(found) == expected
    assert found == list(neighbours(mask, random.Random(seed)))


@given(st.integers(1, 60), st.floats(0.01, 1), st.floats(0.01, 1))
def test_as_many_steps_as_a_budget_allows(num_steps: int, share: float, compute: float) -> None:
    count = affordable(num_steps, share, compute)

    def cost(computed: int) -> float:
        return 1 - share + share * computed / num_steps

    assert count == num_steps or cost(count + 1) > compute - 1e-6
    assert count < 1 or cost(count) <= compute + 1e-6
    assert count <= num_steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = int(os.environ["RANK"])
    torch.save(what_was_found(own), f"{own}.pt")
    torch.distributed.destroy_process_group()


class SameAttention(Block):
    """Its attention puts out the same at every step."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        same = torch.linspace(-1, 1, WIDTH).expand(x.shape)
        x = x + self.attn(same)
        return x + self.mlp(self.norm2(x) + c[:, None])


def test_a_proposal_competes_with_what_the_search_proposes() -> None:
    """No family of the search reuses one layer alone; here that costs nothing in quality."""
    toy = build("single", depth=2)
    toy.blocks[0] = SameAttention(WIDTH).eval().requires_grad_(False)
    sample = Sampler(toy).alone
    calibration = sc.calibrate(toy, sample, 1, progress=False)
    rows = {x.path: sc.Row((True,) * STEPS) for x in calibration.layers}
    rows["blocks.0.attn"] = sc.Row((True,) + (False,) * (STEPS - 1))
    macs = {x.path: x.macs or 0 for x in calibration.layers}["blocks.0.attn"]
    given = sc.Schedule(
        STEPS,
        rows,
        calibration.layers,
        compute=1 - macs * (STEPS - 1) / (STEPS * calibration.total_macs),
        provenance={"planner": "learned"},
    )
    everything = sc.Schedule.uniform(toy, STEPS, 1, layers=calibration.layers)
    options = {"compute": given.compute, "proposals": [everything, given], "max_cost": 30.0}
    best = search(toy, sample, calibration, **options)
    result = result_of(best)
    assert result.best.name == "given 1: learned"
    assert (result.best.error, result.best.compute) == (0.0, given.compute)
    assert (best.rows, best.compute) == (given.rows, given.compute)
    assert not any(row.name.startswith("given 0") for row in result.front)  # beyond the budget


@pytest.mark.parametrize(
    ("proposal", "error", "words"),
    [
        ("dit.json", sc.InvalidArgumentError, "proposals must be schedules.*got str"),
        (
            sc.Schedule(STEPS, {"attn": sc.Row((True,) * STEPS)}),
            sc.InvalidArgumentError,
            "know their layers.*bind",
        ),
        ("shorter", sc.InvalidArgumentError, "a proposal has 4 steps, but a generation"),
        ("other", sc.ScheduleMismatchError, "planned for"),
    ],
)
def test_proposals_that_do_not_fit_are_refused(
    toy: Toy, proposal: Any, error: type[Exception], words: str
) -> None:
    if proposal == "shorter":
        proposal = sc.Schedule.uniform(toy, 4, 2)
    if proposal == "other":
        proposal = sc.Schedule.uniform(build("dual", depth=2), STEPS, 2)
    sampler = Sampler(toy)
    with pytest.raises(error, match=words):
        search(toy, sampler.alone, calibrated(), compute=0.5, proposals=[proposal])
    assert not sampler.calls
