"""Models without a time."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support.reference import ByHand, same, sample
from support.toys import TOKENS, WIDTH, build
from support.unusual_models import calibrated, paths, refused, uniform
from torch import Tensor, nn

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Timeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.toy = build("single", depth=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.toy(x, torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.long))
        return out


def test_a_model_without_a_timestep() -> None:
    model = Timeless()
    x = torch.zeros(1, TOKENS, WIDTH)
    assert paths(sc.find_layers(model)) == ["toy.blocks.0.attn", "toy.blocks.0.mlp"]
    words = r"Timeless was called without a timestep, so the solver step is unknown"
    with refused(model, sc.ScheduleMismatchError, words), sc.cached(model, uniform(model)):
        model(x)
    handle = sc.enable(model, uniform(model))
    for _ in range(2):
        with pytest.raises(sc.ScheduleMismatchError, match=words):
            model(x)
    handle.disable()
    assert model(x).shape == x.shape
    with refused(model, sc.SmoothCacheError, words):
        calibrated(model, lambda i: model(x))
    with refused(model, sc.SmoothCacheError, words):
        sc.observe_layers(model, lambda i: model(x))


def test_a_model_without_a_timestep_cannot_be_calibrated() -> None:
    model = Timeless()
    with refused(model, sc.CalibrationError, r"without a timestep"):
        calibrated(model, lambda i: model(torch.zeros(1, TOKENS, WIDTH)))


def test_a_pipeline_without_a_denoiser() -> None:
    model = Timeless()
    pipe = SimpleNamespace(components={"transformer": model, "vae": nn.Linear(2, 2)})
    words = r"no component .* takes a timestep; pass the denoiser itself.*transformer, vae"
    for attempt in (
        lambda: sc.find_layers(pipe),
        lambda: sc.enable(pipe, uniform(model)),
        lambda: calibrated(pipe, lambda i: None),
    ):
        with refused(model, sc.LayersNotFoundError, words):
            attempt()


@pytest.mark.parametrize(
    "sigmas",
    [
        pytest.param([80.0, 57.6, 40.8, 28.4, 19.4, 12.9, 8.4, 5.3], id="to 80"),
        pytest.param([1000.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.1], id="in one leap"),
        pytest.param([14.6, 9.7, 6.2, 3.9, 2.3, 1.3, 0.7, 0.3], id="to 14.6"),
        pytest.param([1.09, 0.95, 0.7, 0.4, 0.1, -0.3, -0.8, -1.5], id="logarithms"),
    ],
)
def test_times_of_other_scales(sigmas: list[float]) -> None:
    """A model that is given the noise level itself, or its logarithm."""
    toy = build("single", depth=2)
    schedule = uniform(toy)
    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, begin=by_hand.begin, timesteps=sigmas)
    with sc.cached(toy, schedule) as run:
        assert same(sample(toy, timesteps=sigmas), expected)
    assert run.summary().finished == 1
