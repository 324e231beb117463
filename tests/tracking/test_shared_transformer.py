"""One transformer, two pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from support.generations import (
    HANDLES,
    SOLVERS,
    STEPS,
    WitnessPipe,
    dit_pipe,
    ready,
    run_dit,
    witness_schedule,
)

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


@HANDLES
@pytest.mark.parametrize("others", [STEPS - 2, STEPS, STEPS + 3])
@pytest.mark.parametrize(
    ("first", "second"),
    [("ddim", "ddim"), ("ddim-trailing", "ddim-trailing"), ("euler", "euler"), ("ddim", "euler")],
)
def test_another_pipeline_in_between(handle: str, others: int, first: str, second: str) -> None:
    """The second is right or refused; the first is what it would be alone."""
    labels = (1,) if others == STEPS else (2, 3)
    pipe = dit_pipe(SOLVERS[first]())
    other = ready(diffusers.DiTPipeline(pipe.transformer, pipe.vae, scheduler=SOLVERS[second]()))
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    model = pipe if handle == "pipeline" else pipe.transformer
    with sc.cached(pipe, schedule):
        fresh = [run_dit(pipe, seed=seed) for seed in (0, 1)]
    longer = sc.Schedule.uniform(pipe, others, 2)
    right = [run_dit(other, others, seed=2, labels=labels)]
    with sc.cached(other, longer):
        right.append(run_dit(other, others, seed=2, labels=labels))
    with sc.cached(model, schedule) as run:
        assert torch.equal(run_dit(pipe), fresh[0])
        with suppress(sc.ScheduleMismatchError):
            got = run_dit(other, others, seed=2, labels=labels)
            assert any(torch.equal(got, one) for one in right)
        assert torch.equal(run_dit(pipe, seed=1), fresh[1])
    assert run.summary().finished >= 2


@pytest.mark.parametrize("solver", ["ddim", "ddim-trailing", "euler", "dpmsolver++", "heun"])
@pytest.mark.parametrize("steps", [STEPS - 2, STEPS, STEPS + 3])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_another_pipeline_after_a_generation_broken_off(solver: str, steps: int, stop: int) -> None:
    pipe = WitnessPipe(SOLVERS[solver]())
    other = WitnessPipe(SOLVERS[solver](), pipe.transformer)
    with sc.cached(pipe, witness_schedule(STEPS, 6)):
        pipe.generate("first", stop=stop)
        with suppress(sc.ScheduleMismatchError):
            other.generate("other", steps)
        pipe.generate("again")
    assert pipe.transformer.foreign() == []


@pytest.mark.parametrize("solver", ["ddim", "ddim-trailing", "euler", "dpmsolver++", "heun"])
@pytest.mark.parametrize("steps", [STEPS - 2, STEPS])
def test_another_pipeline_after_a_generation_broken_off_in_its_first_step(
    solver: str, steps: int
) -> None:
    pipe = WitnessPipe(SOLVERS[solver]())
    other = WitnessPipe(SOLVERS[solver](), pipe.transformer)
    with sc.cached(pipe, witness_schedule(STEPS, 6)):
        pipe.generate("first", stop=1)
        with suppress(sc.ScheduleMismatchError):
            other.generate("other", steps)
        pipe.generate("again")
    assert pipe.transformer.foreign() == []


@pytest.mark.parametrize(
    "stop",
    [1, 2, 3, 9],
)
def test_several_generations_from_one_list_of_timesteps(stop: int) -> None:
    """A loop of one's own may tell the scheduler once, and begin again after breaking off."""
    pipe = WitnessPipe(SOLVERS["ddim"]())
    pipe.scheduler.set_timesteps(STEPS)
    with sc.cached(pipe, witness_schedule(STEPS, 6)):
        pipe.generate(0, stop=stop, announce=False)
        pipe.generate(1, announce=False)
    assert pipe.transformer.foreign() == []


@HANDLES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_latents_in_a_buffer_that_stays(handle: str, mode: Callable[[], Any], stop: int) -> None:
    """As for CUDA graphs: every generation, broken off or not, is written into one tensor."""
    pipe = WitnessPipe(SOLVERS["ddim"]())
    with (
        mode(),
        sc.cached(pipe if handle == "pipeline" else pipe.transformer, witness_schedule(STEPS, 6)),
    ):
        buffer = torch.zeros(1, 4, 2, 2)
        pipe.generate(0, stop=stop, into=buffer)
        pipe.generate(1, into=buffer)
    assert pipe.transformer.foreign() == []
