"""Nothing to be found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.reference import STEPS, same, sample
from support.toys import Mlp, build
from support.traces import unaltered
from support.unusual_models import calibrated, every_toy, refused, uniform
from torch import Tensor, nn

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Bare(nn.Module):
    """Has the signature of a denoiser, and whatever parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.ran = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.ran += 1
        return x * t[:, None, None]

    def denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self(x, t, y)
        return out


WITHOUT_BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "nothing": Bare,
    "an empty list": lambda: Bare(blocks=nn.ModuleList()),
    "an empty dictionary": lambda: Bare(blocks=nn.ModuleDict()),
    "an empty sequence": lambda: Bare(blocks=nn.Sequential()),
    "empty lists in a list": lambda: Bare(blocks=nn.ModuleList(nn.ModuleList() for _ in range(3))),
    "empty dictionaries": lambda: Bare(blocks=nn.ModuleDict({"a": nn.ModuleDict()})),
    "a convolution": lambda: Bare(net=nn.Conv2d(3, 3, 3)),
    "a list of matrices": lambda: Bare(blocks=nn.ModuleList(nn.Linear(4, 4) for _ in range(3))),
    "an embedder alone": lambda: Bare(t_embedder=Mlp(8)),
    "a parameter": lambda: Bare(holder=nn.ParameterList([torch.zeros(3, 3)])),
}
without_blocks = pytest.mark.parametrize("kind", WITHOUT_BLOCKS)


@without_blocks
@pytest.mark.parametrize("granularity", ["auto", "layer", "block"])
def test_models_without_blocks_are_refused(kind: str, granularity: Any) -> None:
    model = WITHOUT_BLOCKS[kind]()
    words = r"Bare has no (block|attention).*(pass the denoiser itself|use the granularity)"
    ran: list[int] = []
    for attempt in (
        lambda: sc.find_layers(model, granularity=granularity),
        lambda: sc.Schedule.uniform(model, STEPS, 2, granularity=granularity),
        lambda: sc.observe_layers(model, ran.append, granularity=granularity),
        lambda: sc.calibrate(model, ran.append, granularity=granularity, progress=False),
    ):
        with refused(model, sc.LayersNotFoundError, words):
            attempt()
    assert ran == []


@without_blocks
def test_models_without_blocks_can_be_reused_whole(kind: str) -> None:
    model = WITHOUT_BLOCKS[kind]()
    schedule = uniform(model, granularity="model")
    with sc.cached(model, schedule) as run:
        sample(model)  # type: ignore[arg-type]
    assert run.summary().reused == model.ran == STEPS // 2
    calibration = calibrated(model, lambda i: sample(model), granularity="model")  # type: ignore[arg-type]
    assert calibration.errors.shape == (1, 1, 2, STEPS)


@every_toy
def test_empty_lists_beside_the_blocks_change_nothing(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    layers, blocks = (sc.find_layers(toy, granularity=x) for x in ("auto", "block"))  # type: ignore[arg-type]
    plain = sample(toy)
    for owner in (toy, *toy.blocks):
        owner.add_module("none_of_it", nn.ModuleList())
        owner.add_module("nothing", nn.ModuleDict())
        owner.add_module("empty", nn.Sequential())
        owner.add_module("missing", None)
    assert sc.find_layers(toy) == layers
    assert sc.find_layers(toy, granularity="block") == blocks
    with unaltered(toy), sc.cached(toy, uniform(toy)) as run:
        sample(toy)
    assert run.summary().never_ran == ()
    assert same(sample(toy), plain)
