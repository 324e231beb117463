"""Layers that run now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.reference import STEPS, sample, times
from support.toys import TOKENS, Toy
from support.unusual_models import DroppingToy, assert_as_by_hand, calibrated, made, paths, uniform
from torch import Tensor

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


NOTHING_KEPT = "no value had been computed for this call"


class NowAndThenToy(Toy):
    """Runs its second block at some times only."""

    runs: Callable[[int], bool] = staticmethod(lambda step: True)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.blocks[0](self.x_embedder(x), self.condition(t, y))
        if self.runs(8 - round(float(t[0]) / 125)):
            h = self.blocks[1](h, c)
        out: Tensor = self.head(h)
        return out


RUNS: dict[str, Callable[[int], bool]] = {
    "the first half": lambda step: step < 4,
    "the second half": lambda step: step >= 4,
    "the last three": lambda step: step >= 5,
    "every other step": lambda step: step % 2 == 0,
    "every third step": lambda step: step % 3 == 0,
    "all but one that computes": lambda step: step != 4,
    "all but one that reuses": lambda step: step != 5,
}


@pytest.mark.parametrize("when", RUNS)
@pytest.mark.parametrize("granularity", ["auto", "block"])
@pytest.mark.parametrize("interval", [2, 4])
def test_a_layer_that_runs_in_some_steps_only(
    when: str, granularity: Any, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NowAndThenToy, "runs", staticmethod(RUNS[when]))
    toy = made(NowAndThenToy)
    schedule = uniform(toy, interval, granularity=granularity)
    assert_as_by_hand(toy, schedule, NOTHING_KEPT)


def test_a_layer_that_runs_in_some_steps_only_is_never_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(NowAndThenToy, "runs", staticmethod(RUNS["every other step"]))
    toy = made(NowAndThenToy)
    calibration = calibrated(toy, lambda i: sample(toy))
    assert paths(calibration.layers) == ["blocks.0.attn", "blocks.0.mlp"]
    assert calibration.provenance["left_out"] == "blocks.1.attn, blocks.1.mlp"


class RepeatingToy(Toy):
    """Runs its second block a number of times that differs between steps."""

    uses: tuple[int, ...] = (1,) * STEPS

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        h = self.blocks[0](h, c)
        for i in range(self.uses[8 - round(float(t[0]) / 125)]):
            h = self.blocks[1](h + i, c)
        out: Tensor = self.head(h)
        return out


@pytest.mark.parametrize(
    "uses", [(1, 2, 3, 1, 2, 3, 1, 2), (3, 2, 1, 3, 2, 1, 3, 2), (0, 1, 2, 2, 0, 1, 0, 3)], ids=str
)
@pytest.mark.parametrize("granularity", ["auto", "block"])
@pytest.mark.parametrize(("predictor", "interval"), [("hold", 2), ("hold", 4), ("taylor", 2)])
def test_a_layer_called_a_varying_number_of_times(
    uses: tuple[int, ...],
    granularity: Any,
    predictor: str,
    interval: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each use of a call reuses what the same use kept; one that kept nothing computes."""
    monkeypatch.setattr(RepeatingToy, "uses", uses)
    toy = made(RepeatingToy)
    schedule = uniform(toy, interval, granularity=granularity, predictor=predictor)
    assert_as_by_hand(toy, schedule, NOTHING_KEPT)


@pytest.mark.parametrize("why", ["it did not run", "its inputs had another shape"])
def test_what_found_no_use_at_the_last_step_is_not_held_beyond_it(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "it did not run":
        monkeypatch.setattr(NowAndThenToy, "runs", staticmethod(lambda step: step < STEPS - 1))
        toy = made(NowAndThenToy)
    else:
        last = times()[-1]
        monkeypatch.setattr(DroppingToy, "kept", staticmethod(lambda t: 3 if t == last else TOKENS))
        toy = made(DroppingToy)
    with sc.cached(toy, uniform(toy, 2)) as run:
        sample(toy)
        assert run.summary().finished == 1
        assert run.summary().held_bytes == 0
