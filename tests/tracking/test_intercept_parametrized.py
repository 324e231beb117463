"""Others that change the class of a layer."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator

import pytest
import torch
from support.other_tools import (
    ORDERS,
    Undo,
    a_layer,
    denoised,
    parametrized,
    play,
    unidentified,
    uniform,
)
from support.toys import WIDTH, Attention, Block, Mlp, Toy, build
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import smoothcache as sc
from smoothcache.layers.modules import identify
from smoothcache.tracking.intercept import is_intercepted

diffusers = pytest.importorskip("diffusers")
diffusers_hooks = pytest.importorskip("diffusers.hooks")
group_offloading = pytest.importorskip("diffusers.hooks.group_offloading")
accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


class RawMlp(Mlp):
    """A layer with a weight of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class RawBlock(Block):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.mlp = RawMlp(dim)


class RawToy(Toy):
    block = RawBlock


def raw_toy() -> Toy:
    torch.manual_seed(0)
    return RawToy(depth=2).eval().requires_grad_(False)


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_that_is_parametrized_itself(order: str) -> None:
    play(order, parametrized("blocks.0.mlp", "scale"), raw_toy, unidentified(raw_toy()))


@pytest.mark.parametrize("first", [0, 1])
def test_a_parametrized_layer_and_its_copy_share_a_class_but_no_schedule(first: int) -> None:
    toy = raw_toy()
    plain, schedule = denoised(toy), unidentified(toy)
    undo = parametrized("blocks.0.mlp", "scale")(toy)
    toys = [toy, copy.deepcopy(toy)]
    before = type(toys[0].blocks[0].mlp)
    assert type(toys[1].blocks[0].mlp) is before and before.__bases__ == (RawMlp,)
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
        third = copy.deepcopy(toy)
        assert torch.equal(denoised(third), plain)
    handles = [sc.enable(x, schedule) for x in toys]
    handles[first].disable()
    assert torch.equal(denoised(toys[first]), plain)
    assert torch.equal(denoised(toys[1 - first]), under_schedule)
    assert handles[1 - first].summary().reused == schedule.reused
    handles[1 - first].disable()
    assert torch.equal(denoised(toys[1 - first]), plain)
    assert before.__bases__ == (RawMlp,)
    undo()
    assert type(toy.blocks[0].mlp) is RawMlp


def test_a_layer_parametrized_while_enabled_can_be_enabled_again() -> None:
    toy = raw_toy()
    schedule = unidentified(toy)
    undo: Undo = tuple
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
        undo = parametrized("blocks.0.mlp", "scale")(toy)
    for _ in range(2):
        with sc.cached(toy, schedule) as run:
            assert torch.equal(denoised(toy), under_schedule)
        assert run.summary().reused == schedule.reused
        undo()
        undo = tuple


@pytest.mark.parametrize("order", ["AEDU", "AEUD", "EADU", "EAUD"])
def test_weight_norm(order: str) -> None:
    def put(toy: Toy) -> Undo:
        module = toy.get_submodule("blocks.0.attn.proj")
        parametrizations.weight_norm(module)
        return lambda: parametrize.remove_parametrizations(module, "weight")

    make = functools.partial(build, "single", depth=2)
    play(order, put, make, unidentified(make()), equal=close)


def test_a_parametrized_model_is_the_same_model() -> None:
    toy = build("single", depth=2)
    before = identify(toy)
    parametrizations.weight_norm(toy.get_submodule("blocks.0.attn.proj"))
    assert identify(toy) == before


def test_a_layer_that_is_exchanged_while_enabled_is_reported() -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy)
    handle = sc.enable(toy, schedule)
    old = a_layer(toy)
    toy.get_submodule("blocks.0").attn = Attention(WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        denoised(toy)
    assert handle.summary().never_ran == ("blocks.0.attn",)
    handle.disable()
    assert type(old) is Attention and not is_intercepted(old)


def test_a_layer_that_is_exchanged_between_generations_is_reported() -> None:
    toy = build("single", depth=2)
    handle = sc.enable(toy, uniform(toy))
    denoised(toy)
    toy.get_submodule("blocks.0").attn = Attention(WIDTH)
    with pytest.warns(sc.SmoothCacheWarning, match=r"blocks\.0\.attn"):
        denoised(toy)
    handle.disable()
