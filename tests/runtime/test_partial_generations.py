"""Generations that begin in the middle."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.block_models import Pipe, calibrated, every_granularity
from support.reference import STEPS, times
from support.toys import Toy, build

import smoothcache as sc
from smoothcache.model.costs import MacCounter


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


@pytest.mark.parametrize("start", [1, 3, 6])
@every_granularity
def test_image_to_image_is_calibrated_for_the_steps_that_it_runs(
    start: int, granularity: Any
) -> None:
    pipe = Pipe(transformer=build("single", depth=2))
    generate = functools.partial(pipe.generate, start=start)
    calibration = calibrated(pipe, lambda i: generate(seed=i), granularity=granularity)
    assert calibration.timesteps == tuple(times()[start:])
    assert calibration.num_steps == STEPS - start
    with MacCounter() as uncached:
        plain = generate()
    for schedule in (
        sc.plan(calibration, alpha=100.0),
        sc.Schedule.uniform(pipe, STEPS - start, 2, granularity=granularity),
    ):
        with sc.cached(pipe, schedule) as run, MacCounter() as counter:
            got = generate()
            again = generate()
        assert torch.equal(got, again)
        assert torch.equal(got, plain) == (not schedule.reused)
        assert run.summary().recomputed == {}
        assert run.summary().finished == 2
        assert run.summary().reused == 2 * schedule.reused
        if schedule.compute is not None:
            measured = counter.total / (2 * uncached.total)
            assert schedule.compute == pytest.approx(measured, rel=0.01)


def test_image_to_image_of_another_strength_is_refused() -> None:
    pipe = Pipe(transformer=build("single", depth=2))
    calibration = calibrated(pipe, lambda i: pipe.generate(seed=i, start=3))
    schedule = sc.plan(calibration, alpha=100.0)
    for start in (0, 1, 2, 4, 5):
        handle = sc.enable(pipe, schedule)
        with pytest.raises(sc.ScheduleMismatchError, match=r"plan"):
            pipe.generate(start=start)
        handle.disable()
    with sc.cached(pipe, schedule) as run:
        pipe.generate(start=3)
    assert run.summary().finished == 1
