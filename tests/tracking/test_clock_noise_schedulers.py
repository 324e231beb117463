"""Noise schedulers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.generations import (
    FLOWS,
    SOLVERS,
    STEPS,
    compare_with_by_hand,
    dit_pipe,
    run_dit,
    run_sd3,
    sd3_pipe,
    step_of_each,
    steps_of,
)
from torch import Tensor

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::smoothcache.errors.SmoothCacheWarning"),
]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


every_solver = pytest.mark.parametrize("solver", SOLVERS)


@every_solver
def test_computing_everything_changes_no_bit_under_any_solver(solver: str) -> None:
    pipe = dit_pipe(SOLVERS[solver]())
    plain = run_dit(pipe)
    assert plain.isfinite().all()
    with sc.cached(pipe, sc.Schedule.uniform(pipe, steps_of(pipe, STEPS), 1)) as run:
        assert torch.equal(run_dit(pipe), plain)
    assert run.summary().finished == 1


@every_solver
@pytest.mark.parametrize("interval", [2, 3])
def test_reuse_under_any_solver(solver: str, interval: int) -> None:
    pipe = dit_pipe(SOLVERS[solver]())
    schedule = sc.Schedule.uniform(pipe, steps_of(pipe, STEPS), interval)
    run, _ = compare_with_by_hand(pipe, schedule, run_dit)
    calls_alike = len(set(calls_per_step(pipe))) == 1
    if calls_alike:
        assert run.summary().recomputed == {}
        assert run.summary().reused == 2 * schedule.reused * calls_per_step(pipe)[0]


def calls_per_step(pipe: Any) -> list[int]:
    """Entries of the list of the last generation, by step."""
    steps = step_of_each(pipe.scheduler.timesteps)
    return [steps.count(step) for step in sorted(set(steps))]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("interval", [2, 3])
def test_reuse_under_any_solver_of_flows(flow: str, interval: int) -> None:
    pipe = sd3_pipe(FLOWS[flow]())

    def generate(pipe: Any, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run_sd3(pipe, seed=seed)

    plain = generate(pipe, 0)
    with sc.cached(pipe, sc.Schedule.uniform(pipe, steps_of(pipe, STEPS), 1)):
        assert torch.equal(generate(pipe, 0), plain)
    schedule = sc.Schedule.uniform(pipe, steps_of(pipe, STEPS), interval)
    compare_with_by_hand(pipe, schedule, generate)


@every_solver
def test_another_number_of_steps_is_refused_under_any_solver(solver: str) -> None:
    pipe = dit_pipe(SOLVERS[solver]())
    steps = steps_of(pipe, STEPS)
    schedule = sc.Schedule.uniform(pipe, steps, 2)
    with sc.cached(pipe, schedule):
        fresh = run_dit(pipe)
    with sc.cached(pipe, schedule) as run:
        for other in (STEPS - 2, STEPS + 3):
            announced = steps_of(pipe, other)
            with pytest.raises(
                sc.ScheduleMismatchError, match=rf"\b{announced} steps.*\b{steps}\b"
            ):
                run_dit(pipe, other)
            assert torch.equal(run_dit(pipe), fresh)
    assert run.summary().finished == 2


def test_steps_whose_timesteps_the_solver_rounds_to_one_number() -> None:
    """Exponential and beta sigmas lie so close at one end that integer timesteps repeat."""
    pipe = dit_pipe(diffusers.DPMSolverMultistepScheduler(use_exponential_sigmas=True))
    schedule = sc.Schedule.uniform(pipe, 30, 2)
    with sc.cached(pipe, schedule) as run:
        run_dit(pipe, 30)
    assert run.summary().reused == schedule.reused


def test_the_solver_may_be_changed_between_generations() -> None:
    pipe = dit_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    solvers = ("ddim", "euler", "dpmsolver++", "euler", "ddim")
    fresh = {}
    for solver in solvers:
        pipe.scheduler = SOLVERS[solver]()
        with sc.cached(pipe, schedule):
            fresh[solver] = run_dit(pipe)
    with sc.cached(pipe, schedule) as run:
        for solver in solvers:
            pipe.scheduler = SOLVERS[solver]()
            assert torch.equal(run_dit(pipe), fresh[solver])
    assert (run.summary().finished, run.summary().recomputed) == (len(solvers), {})
