"""Guidance, in pipelines."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.generations import (
    STEPS,
    by_text,
    compare_with_by_hand,
    dit_pipe,
    hunyuan_pipe,
    lumina_pipe,
    run_dit,
    run_hunyuan,
    run_lumina,
    run_sd3,
    run_wan,
    sd3_pipe,
    wan_pipe,
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


@pytest.mark.parametrize("interval", [2, 3, STEPS])
def test_guidance_in_two_named_calls(interval: int) -> None:
    pipe = wan_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, interval)
    run, _ = compare_with_by_hand(pipe, schedule, run_wan, branch_of=by_text)
    assert run.summary().recomputed == {}
    assert run.summary().reused == 2 * 2 * schedule.reused


@pytest.mark.parametrize("start", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("stop", [0.7, 1.0])
@pytest.mark.parametrize("interval", [2, 4])
def test_guidance_in_two_named_calls_in_some_steps(
    start: float, stop: float, interval: int
) -> None:
    pipe = hunyuan_pipe(start, stop)
    schedule = sc.Schedule.uniform(pipe, STEPS, interval)
    compare_with_by_hand(pipe, schedule, run_hunyuan, branch_of=by_text)


@pytest.mark.parametrize("until", [0.2, 0.4, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("interval", [2, 4])
def test_guidance_in_two_unnamed_calls_that_ends_early(until: float, interval: int) -> None:
    """Timesteps rise here, from 0 to 1."""
    pipe = lumina_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, interval)
    generate = functools.partial(run_lumina, cfg_trunc_ratio=until)
    run, _ = compare_with_by_hand(pipe, schedule, generate, branch_of=by_text)
    assert run.summary().recomputed == {}


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.1, 0.6), (0.4, 0.9)])
@pytest.mark.parametrize("interval", [2, 4])
def test_a_further_call_beside_guidance_in_one_batch(
    start: float, stop: float, interval: int
) -> None:
    """The guidance that skips layers: in some steps a second call, without the batch's half."""
    pipe = sd3_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, interval)
    generate = functools.partial(
        run_sd3,
        skip_guidance_layers=[1],
        skip_layer_guidance_start=start,
        skip_layer_guidance_stop=stop,
    )
    compare_with_by_hand(pipe, schedule, generate, branch_of=by_text)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guidance_in_one_batch(guidance: float) -> None:
    pipe = dit_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    generate = functools.partial(run_dit, guidance=guidance)
    run, _ = compare_with_by_hand(pipe, schedule, generate)
    assert run.summary().recomputed == {}


@pytest.mark.parametrize("changes_at", range(1, STEPS))
def test_guidance_switched_off_by_a_callback(changes_at: int) -> None:
    """As the documentation of diffusers does it: the batch is halved in mid-run."""
    pipe = sd3_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)

    def off(pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if step + 1 == changes_at:
            pipe._guidance_scale = 0.0
            given = {name: value.chunk(2)[-1] for name, value in given.items()}
        return given

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    generate = functools.partial(
        run_sd3, callback_on_step_end=off, callback_on_step_end_tensor_inputs=names
    )
    by_hand = compare_with_by_hand(pipe, schedule, generate, branch_of=by_text)[1]
    assert (by_hand.recomputed == 0) is (changes_at == 3)
