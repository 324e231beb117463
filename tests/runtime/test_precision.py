"""Precision and modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pytest
import torch
from support.other_tools import STEPS, denoised, same, uniform, zoo_model, zoo_sample
from support.toys import TOKENS, WIDTH, ParallelBlock, Toy, build
from torch import Tensor

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")
diffusers_hooks = pytest.importorskip("diffusers.hooks")
group_offloading = pytest.importorskip("diffusers.hooks.group_offloading")
accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class CastingToy(Toy):
    """Runs in the precision of its weights, and in single precision outside."""

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        hidden = self.t_embedder((t[:, None] / 1000).to(self.head.weight.dtype))
        return hidden + self.y_embedder(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x.to(self.head.weight.dtype), t, y).to(x.dtype)


def casting_toy() -> Toy:
    torch.manual_seed(0)
    return CastingToy(depth=2).eval().requires_grad_(False)


def test_casting_between_generations() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    toy = casting_toy()
    schedule = uniform(toy)
    expected = []
    for dtype in dtypes:
        with sc.cached(toy.to(dtype), schedule):
            expected.append(toy.generate(STEPS))
    toy = casting_toy()
    with sc.cached(toy, schedule) as run:
        found = [toy.to(dtype).generate(STEPS) for dtype in dtypes]
    assert same(found, expected)
    assert run.summary().reused == len(dtypes) * schedule.reused
    assert run.summary().recomputed == {}
    assert toy.half().generate(STEPS).dtype == torch.float32


def test_casting_in_the_middle_of_a_generation_computes_anew() -> None:
    toy = casting_toy()
    y = torch.zeros(1, dtype=torch.long)
    with sc.cached(toy, uniform(toy)) as run:
        for i in range(STEPS):
            dtype = torch.bfloat16 if i else torch.float32
            toy.to(dtype)(torch.zeros(1, TOKENS, WIDTH, dtype=dtype), torch.tensor([900.0 - i]), y)
    assert run.summary().reused == uniform(toy).reused // 2
    assert sum(run.summary().recomputed.values()) == uniform(toy).reused // 2


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
    "enabled": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "nothing": nullcontext,
}


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(dtype)
    return stack


def in_mode(mode: str, toy: Toy) -> Tensor:
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).float()
    with MODES[mode]():
        for i in range(STEPS):
            t = torch.full((1,), 1000 * (1 - i / STEPS), dtype=torch.float32)
            x = x - toy.denoise(x, t, torch.zeros(1, dtype=torch.long)) / STEPS
    return x.clone()


@pytest.mark.parametrize("toy_name", ["single", "dual", "in-place", "parallel-block"])
def test_modes_change_between_generations(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    schedule = uniform(toy)
    modes = [*MODES, *reversed(MODES), "no-grad", "autocast", "inference"]
    plain = {mode: in_mode(mode, toy) for mode in MODES}
    expected = {}
    for mode in MODES:
        with sc.cached(toy, uniform(toy, 1)):
            assert torch.equal(in_mode(mode, toy), plain[mode])
        with sc.cached(toy, schedule):
            expected[mode] = in_mode(mode, toy)
            assert not torch.equal(expected[mode], plain[mode])
    with sc.cached(toy, schedule) as run:
        for mode in modes:
            assert torch.equal(in_mode(mode, toy), expected[mode]), mode
    assert run.summary().reused % (len(modes) * schedule.reused) == 0
    assert run.summary().reused > 0 and run.summary().recomputed == {}


@pytest.mark.parametrize(
    "toy_name",
    [
        "single",
        "in-place",
        "parallel-block",
    ],
)
def test_values_of_inference_mode_serve_outside_of_it(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    schedule = uniform(toy)
    with sc.cached(toy, schedule):
        expected = denoised(toy)
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(1, dtype=torch.long)
    with sc.cached(toy, schedule) as run:
        for i in range(STEPS):
            with torch.inference_mode() if i % 2 == 0 else torch.no_grad():
                x = x - toy(x, torch.full((1,), 1000 * (1 - i / STEPS)), y) / STEPS
    assert torch.equal(x, expected)
    assert run.summary().reused == schedule.reused


class PreciseBlock(ParallelBlock):
    """Adds nothing, in single precision, whatever it is given."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x.float() + 0 * super().forward(x, c)


class PreciseToy(Toy):
    block = PreciseBlock


def test_autocast_in_a_block_that_is_a_layer() -> None:
    torch.manual_seed(0)
    toy = PreciseToy(depth=2).eval().requires_grad_(False)
    schedule = uniform(toy)
    assert {layer.kind for layer in schedule.layers or ()} == {"block"}
    with torch.autocast("cpu", torch.bfloat16):
        plain = denoised(toy)
        with sc.cached(toy, schedule) as run:
            assert torch.equal(denoised(toy), plain)
    assert run.summary().reused == schedule.reused


def test_channels_last() -> None:
    name = "SanaTransformer2DModel"
    model = zoo_model(name)
    schedule = uniform(model)
    with sc.cached(model, schedule):
        expected = zoo_sample(name, model)
    with sc.cached(model, schedule) as run:
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(zoo_sample(name, model), expected)
    assert run.summary().reused == schedule.reused
