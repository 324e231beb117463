"""Generations broken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
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
    dit_pipe,
    interrupting_after,
    noise,
    run_dit,
    run_sd3,
    sd3_pipe,
    step_of_each,
    steps_of,
    with_step_computed,
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


class Stop(Exception):
    pass


def stopping_after(last: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            raise Stop
        return {}

    return callback


BROKEN_OFF_BY = {"interrupt": interrupting_after, "exception": stopping_after}


@pytest.mark.parametrize("how", BROKEN_OFF_BY)
@pytest.mark.parametrize("flow", ["euler", "heun", "unipc"])
def test_a_pipeline_broken_off_by_a_callback(how: str, flow: str) -> None:
    pipe = sd3_pipe(FLOWS[flow]())
    steps = steps_of(pipe, STEPS)
    schedule = sc.Schedule.uniform(pipe, steps, 3)
    with sc.cached(pipe, schedule) as alone:
        fresh = run_sd3(pipe)
    for last, step in enumerate(step_of_each(pipe.scheduler.timesteps)):
        with sc.cached(pipe, schedule) as run:
            with suppress(Stop):
                run_sd3(pipe, seed=1, callback_on_step_end=BROKEN_OFF_BY[how](last))
            reused = run.summary().reused
            assert torch.equal(run_sd3(pipe), fresh)
        summary = run.summary()
        assert summary.reused - reused == alone.summary().reused
        broken = step < steps - 1
        assert (summary.finished, summary.broken_off) == (2 - broken, broken)


@pytest.mark.parametrize("how", BROKEN_OFF_BY)
def test_a_bare_module_broken_off_by_a_callback(how: str) -> None:
    """Without a scheduler, a first step begun again looks like guidance in two calls."""
    pipe = sd3_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    for last in range(STEPS):
        with sc.cached(pipe.transformer, with_step_computed(schedule, 1 if last == 0 else 0)):
            fresh = run_sd3(pipe)
        with sc.cached(pipe.transformer, schedule) as run:
            with suppress(Stop):
                run_sd3(pipe, seed=1, callback_on_step_end=BROKEN_OFF_BY[how](last))
            assert torch.equal(run_sd3(pipe), fresh)
        recomputed = {"it could have been another generation's value": len(schedule.rows)}
        assert run.summary().recomputed == (recomputed if last == 0 else {})


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("skipped", [0, 1])
def test_a_bare_module_broken_off_and_then_begun_further_along_with_other_latents(
    stop: int, skipped: int, mode: Callable[[], Any]
) -> None:
    """As image to image does. In time it looks like the steps that come, but not in space."""
    model, schedule = Witness(), witness_schedule(STEPS, STEPS)
    ends_early = pytest.raises(sc.ScheduleMismatchError, match=r"ended after 5 steps.*covers 6")
    with ends_early if skipped else nullcontext(), mode(), sc.cached(model, schedule) as run:
        for generation, steps in enumerate((range(stop), range(stop + skipped, STEPS))):
            x = noise(1, 4, 16, 16, seed=generation)
            for step in steps:
                for branch in "cu" if step < stop + 1 else "uc":  # the other comes first later on
                    t = torch.tensor([1000.0 - 150 * step])
                    model.tell(generation, branch, step, x, t, PROMPTS[branch])
                x = 0.8 * x + 0.1 * torch.randn_like(x)
    assert model.foreign() == []
    reasons = list(run.summary().recomputed)
    assert reasons[0] == "it could have been another generation's value"


@pytest.mark.parametrize("solver", ["ddim", "euler-ancestral", "dpmsolver++", "lcm"])
@pytest.mark.parametrize("steps", [4, 8, 20])
def test_latents_of_a_generation_have_to_do_with_each_other(solver: str, steps: int) -> None:
    """But for few steps that each draw all of the noise anew, which are computed and counted."""
    pipe, schedule = WitnessPipe(SOLVERS[solver]()), witness_schedule(steps, 2)
    pipe.scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    picture = torch.randn(1, 4, 16, 16)
    x = torch.randn(1, 4, 16, 16) * pipe.scheduler.init_noise_sigma
    alphas = pipe.scheduler.alphas_cumprod
    with sc.cached(pipe.transformer, schedule) as run:
        for step, t in enumerate(pipe.scheduler.timesteps):
            scaled = pipe.scheduler.scale_model_input(x, t)
            pipe.transformer.tell(0, "c", step, scaled, t.reshape(1), PROMPTS["c"])
            alpha = alphas[int(t)]
            out = (scaled - alpha.sqrt() * picture) / (1 - alpha).sqrt()
            x = pipe.scheduler.step(out, t, x).prev_sample
    pipe.transformer.assert_right(run)
    draws_anew = solver == "lcm" or (solver, steps) == ("euler-ancestral", 4)
    assert (run.summary().recomputed == {}) is not draws_anew


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_bare_module_broken_off_and_then_begun_at_another_step_than_planned(stop: int) -> None:
    pipe, schedule = WitnessPipe(SOLVERS["ddim"]()), witness_schedule(STEPS, STEPS)
    pipe.scheduler.set_timesteps(STEPS)
    schedule = replace(schedule, timesteps=tuple(pipe.scheduler.timesteps.tolist()))
    with sc.cached(pipe.transformer, schedule) as run:
        pipe.generate(0, stop=stop)
        pipe.generate(1, start=stop + 1)
        run.reset()
    assert pipe.transformer.foreign() == []


@pytest.mark.parametrize("where", ["layer", "denoiser", "scheduler"])
@pytest.mark.parametrize("handle", ["pipeline", "module"])
def test_an_exception_in_the_middle(where: str, handle: str) -> None:
    pipe = dit_pipe(SOLVERS["euler"]())
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    model = pipe if handle == "pipeline" else pipe.transformer
    with sc.cached(model, schedule):
        fresh = run_dit(pipe)
    for calls in range(1, STEPS):
        with sc.cached(model, schedule) as run:
            with breaking(pipe, where, calls), pytest.raises(Stop):
                run_dit(pipe, seed=1)
            got = run_dit(pipe)
        if calls == 1 and (handle, where) == ("module", "scheduler"):
            assert sum(run.summary().recomputed.values()) == len(schedule.rows)
        else:
            assert torch.equal(got, fresh)
            assert run.summary().recomputed == {}


@contextmanager
def breaking(pipe: Any, where: str, calls: int) -> Iterator[None]:
    """A part of the pipeline raises at its n-th call."""
    left = iter([None] * (calls - 1))

    def count(*_: Any) -> None:
        if next(left, Stop) is Stop:
            raise Stop

    if where == "scheduler":
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *args, **kwargs: (count(), step(*args, **kwargs))[1]
        yield
        pipe.scheduler.step = step
        return
    block = pipe.transformer.transformer_blocks[1]
    module = block.norm1 if where == "layer" else pipe.transformer.proj_out_2
    hook = module.register_forward_hook(count)
    yield
    hook.remove()
