"""Two denoisers, one trajectory."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from support.generations import (
    STEPS,
    by_text,
    compare_with_by_hand,
    interrupting_after,
    run_wan,
    wan_pipe,
    wan_transformer,
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


@pytest.mark.parametrize("boundary", [0.3, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("interval", [2, 3])
def test_two_denoisers_take_turns(boundary: float, interval: int) -> None:
    """As in Wan 2.2, with guidance in two calls of each."""
    pipe = wan_pipe(transformer_2=wan_transformer(1), boundary_ratio=boundary)
    schedule = sc.Schedule.uniform(pipe, STEPS, interval)
    assert {path.split(".")[0] for path in schedule.rows} == {"transformer", "transformer_2"}
    _run, by_hand = compare_with_by_hand(
        pipe, schedule, functools.partial(run_wan, guidance_scale_2=2.0), branch_of=by_text
    )
    first_of_second = sum(float(t) >= 1000 * boundary for t in pipe.scheduler.timesteps)
    late = (-first_of_second) % interval
    assert by_hand.recomputed == 2 * 2 * len(schedule.rows) // 2 * (late > 0)


def test_two_denoisers_and_what_broke_off_in_the_second() -> None:
    pipe = wan_pipe(transformer_2=wan_transformer(1), boundary_ratio=0.85)
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    with sc.cached(pipe, schedule):
        fresh = run_wan(pipe)
    with sc.cached(pipe, schedule) as run:
        for last in range(STEPS):
            run_wan(pipe, seed=1, callback_on_step_end=interrupting_after(last))
            assert torch.equal(run_wan(pipe), fresh)
    assert run.summary().broken_off == STEPS - 1
