"""Calls by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.generations import (
    HANDLES,
    PROMPTS,
    SOLVERS,
    STEPS,
    WitnessPipe,
    dit_pipe,
    noise,
    run_dit,
    with_step_computed,
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


def call_by_hand(pipe: Any, timestep: float, seed: int = 5) -> Tensor:
    given = {"timestep": torch.tensor([timestep]), "class_labels": torch.tensor([1])}
    out: Tensor = pipe.transformer(noise(1, 4, 4, 4, seed=seed), **given).sample
    return out


@pytest.mark.parametrize("solver", ["ddim", "ddim-trailing", "euler", "dpmsolver++", "heun"])
def test_calls_by_hand_do_no_harm_to_a_pipeline(solver: str) -> None:
    """Before, between and after generations, at timesteps of the list and at others."""
    pipe = dit_pipe(SOLVERS[solver]())
    plain = call_by_hand(pipe, 500.0)
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    with sc.cached(pipe, schedule):
        fresh = [run_dit(pipe, seed=seed, guidance=1.0) for seed in range(2)]
    listed = pipe.scheduler.timesteps.tolist()
    for times, timestep in enumerate([*listed[::2], 1000.0, 999.0, 500.0, listed[-1] + 0.5]):
        with sc.cached(pipe, schedule) as run:
            for seed in range(2):
                for _ in range(1 + times % 2):
                    call_by_hand(pipe, timestep)
                assert torch.equal(run_dit(pipe, seed=seed, guidance=1.0), fresh[seed])
            assert torch.equal(call_by_hand(pipe, 500.0), plain)
            run.reset()
        assert run.summary().finished >= 2


@pytest.mark.parametrize("times", [1, 2])
def test_calls_by_hand_do_no_harm_to_a_bare_module(times: int) -> None:
    pipe = dit_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    model = pipe.transformer
    with sc.cached(model, schedule):
        fresh = [run_dit(pipe, seed=seed, guidance=1.0) for seed in range(2)]
    with sc.cached(model, with_step_computed(schedule, 1)):
        careful = [run_dit(pipe, seed=seed, guidance=1.0) for seed in range(2)]
    plain = [run_dit(pipe, seed=seed, guidance=1.0) for seed in range(2)]
    if times == 2:  # two calls alike, and a third in what could be the same step
        careful = plain
    first, *others = pipe.scheduler.timesteps.tolist()
    for timestep in (first, *others, 500.0, 1.0):
        with sc.cached(model, schedule) as run:
            for seed in range(2):
                for _ in range(times):
                    call_by_hand(pipe, timestep)
                before = sum(run.summary().recomputed.values())
                got = run_dit(pipe, seed=seed, guidance=1.0)
                assert torch.equal(got, (careful if timestep == first else fresh)[seed])
                recomputed = sum(run.summary().recomputed.values()) - before
                calls = 0 if timestep != first else 1 if times == 1 else STEPS - 2
                assert recomputed == calls * len(schedule.rows)
        assert run.summary().finished == 2


def test_a_call_by_hand_further_back_than_a_bare_generation_begins_is_refused_in_the_end() -> None:
    pipe = WitnessPipe(SOLVERS["ddim"]())
    with (
        pytest.raises(sc.ScheduleMismatchError, match=r"reached step 7.*covers 6.*run\.reset"),
        sc.cached(pipe.transformer, witness_schedule(STEPS, 3)),
    ):
        pipe.transformer.tell("by hand", "c", 0, torch.randn(1, 4, 2, 2), 999.0, PROMPTS["c"])
        pipe.generate(0)


@pytest.mark.parametrize("timestep", [300.0, 500.0, 900.0])
def test_a_call_by_hand_before_a_bare_generation_of_two_steps(timestep: float) -> None:
    pipe = WitnessPipe(SOLVERS["euler"]())
    run = sc.enable(pipe.transformer, witness_schedule(2, 2))
    x, t = torch.randn(1, 4, 2, 2), torch.tensor([timestep]).double()
    pipe.transformer.tell("by hand", "c", 0, x, t, PROMPTS["c"])
    for generation in range(3):
        pipe.generate(generation, 2)
    run.disable()
    assert pipe.transformer.foreign() == []


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmsolver++"])
def test_calls_by_hand_after_the_generation_of_a_pipeline_are_computed(solver: str) -> None:
    """All steps that its scheduler announced are over; nothing else was announced."""
    pipe = dit_pipe(SOLVERS[solver]())
    plain = [call_by_hand(pipe, t, seed) for seed, t in enumerate((900.0, 600.0))]
    with sc.cached(pipe, sc.Schedule.uniform(pipe, STEPS, 3)) as run:
        run_dit(pipe)
        got = [call_by_hand(pipe, t, seed) for seed, t in enumerate((900.0, 600.0))]
        run.reset()
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1], plain[1])


def test_a_call_by_hand_after_the_generation_of_a_pipeline_is_no_reason_to_refuse() -> None:
    pipe = dit_pipe(SOLVERS["euler"]())
    with sc.cached(pipe, sc.Schedule.uniform(pipe, STEPS, 3)):
        run_dit(pipe)
        call_by_hand(pipe, 500.0)


@pytest.mark.parametrize(
    "solver",
    [
        "euler",
        "dpmsolver++",
        "ddim-trailing",
    ],
)
def test_a_call_by_hand_beyond_the_last_timestep(solver: str) -> None:
    pipe = dit_pipe(SOLVERS[solver]())
    plain = call_by_hand(pipe, 0.0)
    with sc.cached(pipe, sc.Schedule.uniform(pipe, STEPS, 3)) as run:
        run_dit(pipe)
        assert torch.equal(call_by_hand(pipe, 0.0), plain)
        run.reset()


@HANDLES
def test_many_calls_by_hand_do_not_fill_the_memory(handle: str) -> None:
    pipe = WitnessPipe(SOLVERS["euler"]())
    model = pipe if handle == "pipeline" else pipe.transformer
    x = torch.randn(1, 4, 2, 2)
    with sc.cached(model, witness_schedule(STEPS, 3)) as run:
        pipe.generate(0)
        held = []
        for _ in range(30):
            pipe.transformer.tell("by hand", "c", 0, x.clone(), 500.0, PROMPTS["c"])
            held.append(run.summary().held_bytes)
        run.reset()
    assert max(held) <= 4 * x.nbytes


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_call_by_hand_in_a_callback(solver: str, at: int) -> None:
    """A preview of the next step: its value must not find its way into the generation."""
    pipe = WitnessPipe(SOLVERS[solver]())
    step, calls = pipe.scheduler.step, iter(range(STEPS))

    def stepping(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        if next(calls) == at:
            x, t = torch.randn(1, 4, 2, 2), pipe.scheduler.timesteps[at + 1].reshape(1).double()
            pipe.transformer.tell("preview", "c", 0, x, t, PROMPTS["c"])
        return out

    pipe.scheduler.step = stepping
    with sc.cached(pipe, witness_schedule(STEPS, 2)):
        pipe.generate(0)
    assert [pair for pair in pipe.transformer.foreign() if pair[0][0] == 0] == []
