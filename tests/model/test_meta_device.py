"""The meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.reference import times
from support.toys import TOKENS, WIDTH, Toy, build
from support.traces import unaltered
from support.unusual_models import calibrated, every_toy, made, refused, uniform
from torch import Tensor

import smoothcache as sc
from smoothcache.layers.modules import identify


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class AnyTimeToy(Toy):
    """Takes its timestep as a number."""

    def forward(self, x: Tensor, t: Any, y: Tensor) -> Tensor:
        return super().forward(x, torch.full((len(x),), float(t), device=x.device), y)


def on_meta(toy: Toy, times: Sequence[Any]) -> Tensor:
    x = torch.zeros(1, TOKENS, WIDTH, device="meta")
    y = torch.zeros(1, dtype=torch.long, device="meta")
    for time in times:
        x = x - toy(x, time, y)
    return x


@every_toy
def test_layers_are_found_on_the_meta_device(toy_name: str) -> None:
    toy, empty = build(toy_name, depth=2), build(toy_name, depth=2).to("meta")
    for granularity in ("auto", "layer", "block", "model"):
        found = sc.find_layers(empty, granularity=granularity)  # type: ignore[arg-type]
        assert found == sc.find_layers(toy, granularity=granularity)  # type: ignore[arg-type]
    assert identify(empty) == identify(toy)


def test_layers_are_observed_on_the_meta_device() -> None:
    toy, empty = made(AnyTimeToy), made(AnyTimeToy).to("meta")
    x, y = torch.zeros(1, TOKENS, WIDTH), torch.tensor([0])
    expected = sc.observe_layers(toy, lambda i: toy(x, 500.0, y))
    assert sc.observe_layers(empty, lambda i: on_meta(empty, times())) == expected


@pytest.mark.parametrize("granularity", ["auto", "block", "model"])
def test_calibrating_on_the_meta_device_is_refused(granularity: Any) -> None:
    toy = made(AnyTimeToy).to("meta")
    with refused(toy, sc.CalibrationError, r"on the meta device.*load its weights"):
        calibrated(toy, lambda i: on_meta(toy, times()), granularity=granularity)


def test_timesteps_on_the_meta_device_are_refused() -> None:
    toy = build("single", depth=2).to("meta")
    given = [torch.tensor([time], device="meta") for time in times()]
    words = r"timestep is on the meta device.*pass a number or a CPU tensor"
    with refused(toy, sc.SmoothCacheError, words):
        calibrated(toy, lambda i: on_meta(toy, given))
    with refused(toy, sc.ScheduleMismatchError, words), sc.cached(toy, uniform(toy)):
        on_meta(toy, given)


@pytest.mark.parametrize("granularity", ["auto", "block", "model"])
@pytest.mark.parametrize("predictor", sc.PREDICTORS)
def test_reuse_on_the_meta_device(granularity: Any, predictor: str) -> None:
    toy = made(AnyTimeToy).to("meta")
    schedule = uniform(toy, 3, granularity=granularity, predictor=predictor)
    with unaltered(toy), sc.cached(toy, schedule) as run:
        out = on_meta(toy, times())
    assert out.device.type == "meta" and out.shape == (1, TOKENS, WIDTH)
    assert run.summary().reused == schedule.reused
    assert run.summary().recomputed == {}


def test_checking_for_finite_values_on_the_meta_device() -> None:
    """There are none that could be otherwise."""
    toy = made(AnyTimeToy).to("meta")
    with sc.cached(toy, uniform(toy), check_finite=True) as run:
        on_meta(toy, times())
    assert run.summary().recomputed == {}
