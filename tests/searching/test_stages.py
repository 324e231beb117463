"""The stages of a search: the cheapest schedule that keeps an error, and the joint search."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from support.searches import (
    SOLVERS,
    STEPS,
    Adams,
    Euler,
    Sampler,
    calibrated,
    distance,
    error_of,
    real_compute,
    result_of,
    search,
    uniform_runs,
)
from support.toys import Toy, build
from torch import Tensor

import smoothcache as sc


@cache
def cheapest(max_error: float) -> sc.SearchedSchedule:
    toy = build("single", depth=2)
    return search(toy, Sampler(toy).alone, calibrated(), max_error=max_error, max_cost=60)


ERRORS = (0.1, 0.02, 0.001, 0.0)


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
    assert all(error <= row.converged_error + 1e-12 for row in result.baselines)  # type: ignore[operator]


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
