"""Timesteps of all kinds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.generations import (
    FLOWS,
    PROMPTS,
    SOLVERS,
    STEPS,
    Witness,
    WitnessPipe,
    by_text,
    compare_with_by_hand,
    run_wan,
    step_of_each,
    wan_pipe,
    witness_schedule,
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


KINDS: dict[str, Callable[[float], Any]] = {
    "float": float,
    "int": int,
    "0-d": lambda t: torch.tensor(t),
    "0-d integer": lambda t: torch.tensor(int(t)),
    "[batch]": lambda t: torch.full((2,), t),
    "[batch], double": lambda t: torch.full((2,), t, dtype=torch.float64),
    "[batch, tokens]": lambda t: torch.full((2, 3), t),
    "[batch, tokens], the first of which is done": lambda t: torch.tensor([[0.0, t, t]] * 2),
    "bfloat16": lambda t: torch.full((2,), t).bfloat16(),
    "of [0, 1], bfloat16": lambda t: torch.full((2,), t / 1000).bfloat16(),
    "of [0, 1], half": lambda t: torch.full((2,), t / 1000).half(),
    "rising": lambda t: torch.full((2,), 1 - t / 1000),
    "rising, bfloat16": lambda t: torch.full((2,), 1 - t / 1000).bfloat16(),
    "from 1000 less": lambda t: 1000 - t,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["ddim-trailing", "euler"])
def test_timesteps_of_any_kind(kind: str, solver: str) -> None:
    for handle, branches in itertools.product(("pipeline", "module"), ("c", "uc")):
        pipe = WitnessPipe(SOLVERS[solver]())
        schedule = witness_schedule(STEPS, 3)
        with sc.cached(pipe if handle == "pipeline" else pipe.transformer, schedule) as run:
            for generation in range(3):
                pipe.scheduler.set_timesteps(STEPS)
                for step, t in enumerate(pipe.scheduler.timesteps):
                    x = pipe.scheduler.scale_model_input(torch.randn(2, 4, 2, 2), t)
                    for branch in branches:
                        given, prompt = KINDS[kind](float(t)), PROMPTS[branch]
                        pipe.transformer.tell(generation, branch, step, x, given, prompt)
                    pipe.scheduler.step(torch.zeros_like(x), t, x)
        pipe.transformer.assert_right(run)
        assert run.summary().recomputed == {}
        assert run.summary().reused == 3 * len(branches) * schedule.reused
        assert (run.summary().finished, run.summary().broken_off) == (3, 0)


def test_timesteps_for_every_token_of_a_pipeline() -> None:
    pipe = wan_pipe(expand_timesteps=True)
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    run, _ = compare_with_by_hand(pipe, schedule, run_wan, branch_of=by_text)
    assert run.summary().recomputed == {}


def test_frames_that_are_denoised_one_after_the_other() -> None:
    """Diffusion forcing: the largest timestep stands still while the first frames move."""
    times = [1000.0, 750.0, 500.0, 250.0]
    rows = [[times[min(max(k - 2 * f, 0), 3)] for f in range(3)] for k in range(8)]
    schedule, model = witness_schedule(len(rows), 4), Witness()
    with (
        pytest.raises(sc.ScheduleMismatchError, match=r"ended after 4 steps.*covers 8"),
        sc.cached(model, schedule) as run,
    ):
        for step, row in enumerate(rows):
            model.tell(0, "c", step, torch.randn(1, 3, 2), torch.tensor([row]), PROMPTS["c"])
    assert model.foreign() == []
    assert run.summary().finished == 0


@pytest.mark.parametrize("interval", [2, 3])
def test_a_solver_whose_timesteps_rise(interval: int) -> None:
    scheduler = diffusers.DDIMInverseScheduler(clip_sample=False)
    scheduler.scale_model_input = lambda x, t: x
    pipe = WitnessPipe(scheduler)
    with sc.cached(pipe, witness_schedule(STEPS, interval)) as run:
        for generation in range(2):
            pipe.generate(generation, branches="uc")
    pipe.transformer.assert_right(run)
    assert (run.summary().finished, run.summary().recomputed) == (2, {})


@pytest.mark.parametrize("flow", ["euler", "heun", "unipc"])
def test_timesteps_that_round_to_one_number(flow: str) -> None:
    """A solver that counts its steps tells them apart where bfloat16 does not."""
    scheduler = FLOWS[flow](12.0)
    scheduler.scale_model_input = lambda x, t: x
    pipe = WitnessPipe(scheduler)
    scheduler.set_timesteps(30)
    steps = step_of_each(scheduler.timesteps)[-1] + 1
    assert step_of_each(scheduler.timesteps.bfloat16())[-1] + 1 < steps
    with sc.cached(pipe, witness_schedule(steps, 3)) as run:
        for generation in range(2):
            pipe.generate(generation, 30, unit=Tensor.bfloat16, branches="uc")
    pipe.transformer.assert_right(run)
    assert (run.summary().finished, run.summary().broken_off) == (2, 0)


def test_timesteps_that_round_to_one_number_where_nothing_counts_steps() -> None:
    """Nothing is mixed, and the summary says that the generations went wrong."""
    pipe = WitnessPipe(SOLVERS["ddim"]())
    with sc.cached(pipe, witness_schedule(333, 3)) as run:
        for generation in range(2):
            pipe.generate(generation, 333, unit=Tensor.bfloat16)
    assert pipe.transformer.foreign() == []
    assert run.summary().broken_off or run.summary().steps_under_way


def test_another_number_of_steps_is_refused_at_once_with_rounded_timesteps() -> None:
    pipe = WitnessPipe(SOLVERS["ddim"]())
    with sc.cached(pipe, witness_schedule(STEPS, 3)) as run:
        with pytest.raises(sc.ScheduleMismatchError, match=r"\b4 steps.*\b6\b"):
            pipe.generate(0, 4, unit=Tensor.bfloat16)
        run.reset()


@pytest.mark.parametrize(
    "times",
    [
        [80.0, 9.72, 0.47, 0.002],  # sigmas of Karras et al., for 4 steps
        [0.0, 0.6, 0.85],  # rectified flow from noise to image, shifted
        [1000.0, 8.0, 0.0],
    ],
)
def test_few_steps_that_lie_far_apart_without_a_scheduler(times: list[float]) -> None:
    model, schedule = Witness(), witness_schedule(len(times), 2)
    with sc.cached(model, schedule) as run:
        for generation in range(2):
            for step, t in enumerate(times):
                x = torch.randn(1, 2, 2)
                model.tell(generation, "c", step, x, torch.tensor([t]), PROMPTS["c"])
    model.assert_right(run)
    assert run.summary().finished == 2
