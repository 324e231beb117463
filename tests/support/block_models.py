"""Models and helpers that several tests of granularity share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.reference import STEPS, levels, times
from support.toys import TOYS, WIDTH, Block, Toy
from torch import Tensor, nn

import smoothcache as sc

NOTHING_KEPT = "no value had been computed for this call"
every_toy = pytest.mark.parametrize("toy_name", TOYS)
coarse = pytest.mark.parametrize("granularity", ["block", "model"])
every_granularity = pytest.mark.parametrize("granularity", ["auto", "layer", "block", "model"])
predictors = pytest.mark.parametrize("predictor", ["hold", "taylor"])


def uniform(model: Any, granularity: Any, interval: int = 2, predictor: str = "hold") -> Any:
    return sc.Schedule.uniform(
        model,
        STEPS,
        interval,
        predictor=predictor,
        granularity=granularity,
        noise_levels=levels(),
    )


def paths(layers: Sequence[sc.CacheLayer]) -> list[str]:
    return [layer.path for layer in layers]


def steps(pattern: str) -> tuple[bool, ...]:
    """A row from text: # is a computed step, a dot a reused one."""
    return tuple(mark == "#" for mark in pattern)


def _bypassing(block: Any, x: Tensor) -> Tensor:
    out: Tensor = block.attn.proj(block.attn.qkv(x)[..., :WIDTH])
    return out


class BypassingBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, gate1, shift2, gate2 = self.modulation(c)[:, None].chunk(4, dim=-1)
        x = x + gate1 * _bypassing(self, self.norm1(x) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) + shift2)


class BypassingToy(Toy):
    """Its attention's parts are used by a function elsewhere, as by an attention processor."""

    block = BypassingBlock


class Idle(Toy):
    """Its last block never runs."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        for block in list(self.blocks)[:-1]:
            h = block(h, c)
        out: Tensor = self.head(h)
        return out


def calibrated(model: Any, generate: Callable[[int], Any], **options: Any) -> sc.Calibration:
    settings: dict[str, Any] = {"num_samples": 2, "max_gap": 3, "progress": False, **options}
    return sc.calibrate(model, generate, **settings)


def assert_equal_calibrations(a: sc.Calibration, b: sc.Calibration) -> None:
    assert np.array_equal(a.errors, b.errors, equal_nan=True)
    for name in ("layers", "total_macs", "timesteps", "model", "solver", "peak_bytes"):
        assert getattr(a, name) == getattr(b, name), name


def _nested(toy: Toy) -> list[sc.CacheLayer]:
    return [*sc.find_layers(toy, granularity="block"), *sc.find_layers(toy)]


def outputs(model: nn.Module, predictor: str, times: Sequence[float]) -> tuple[list[Any], sc.Run]:
    """What a model that is computed at steps 0 and 1 returns at all of them."""
    layers = tuple(sc.find_layers(model, granularity="model"))
    row = sc.Row((True, True, *(False for _ in times[2:])), predictor)
    got = []
    with sc.cached(
        model, sc.Schedule(len(times), {"": row}, layers, noise_levels=levels(len(times)))
    ) as run:
        for time in times:
            got.append(model(torch.arange(1.0, 5.0).reshape(1, 4), torch.tensor([time])))
    return got, run


class Pipe:
    """As much of a pipeline as is needed: components, and a scheduler that lists its timesteps."""

    def __init__(self, **components: Any) -> None:
        self.scheduler = SimpleNamespace(timesteps=torch.arange(1000).flip(0))
        self.components = {**components, "scheduler": self.scheduler, "tokenizer": None}

    def generate(
        self, *, seed: int = 0, boundary: int = STEPS, start: int = 0, calls: int = 1
    ) -> Tensor:
        """Runs the steps from ``start`` on; from ``boundary`` on with the second denoiser."""
        self.scheduler.timesteps = torch.tensor(times())
        x = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(seed))
        for step, time in list(enumerate(times()))[start:]:
            toy = self.components["transformer" if step < boundary else "transformer_2"]
            y = torch.tensor([seed % 4])
            outputs = [toy.denoise(x, torch.tensor([time]), (y + i) % 4) for i in range(calls)]
            x = x - sum(outputs) / (STEPS * calls)
        return x
