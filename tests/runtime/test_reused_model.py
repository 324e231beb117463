"""A reused model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.block_models import every_toy, predictors, uniform
from support.reference import STEPS, sample
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


@every_toy
@predictors
def test_a_reused_step_of_the_model_runs_nothing(toy: Toy, predictor: str) -> None:
    schedule = uniform(toy, "model", 3, predictor)
    calls: list[str] = []
    macs: list[int] = []
    ran: list[bool] = []
    with sc.cached(toy, schedule) as run:
        for path, module in toy.named_modules():
            if path:
                module.register_forward_pre_hook(lambda *_, path=path: calls.append(path))
        counters = [MacCounter() for _ in range(STEPS)]

        def begin(step: int, branch: int) -> None:
            calls.clear()
            counters[step].__enter__()

        def after(step: int) -> None:
            counters[step].__exit__(None, None, None)
            macs.append(counters[step].total)
            ran.append(bool(calls))

        sample(toy, begin=begin, after=after)
    row = schedule.rows[""].computed
    assert tuple(ran) == row
    assert [bool(cost) for cost in macs] == list(row)
    assert (run.summary().computed, run.summary().reused) == (3, 5)
