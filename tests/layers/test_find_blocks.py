"""What is found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.block_models import Pipe, every_toy, paths, uniform
from support.reference import STEPS, run_by_hand, same, sample
from support.toys import WIDTH, Block, Toy, build
from torch import Tensor, nn
from zoo import all_models

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


@every_toy
def test_blocks_and_models_are_found(toy: Toy) -> None:
    blocks = [sc.CacheLayer(f"blocks.{i}", "block", f"blocks.{i}") for i in range(2)]
    assert sc.find_layers(toy, granularity="block") == blocks
    assert sc.find_layers(toy, granularity="model") == [sc.CacheLayer("", "model", "")]
    assert sc.find_layers(toy) == sc.find_layers(toy, granularity="auto")
    parts = sc.find_layers(toy, granularity="layer")
    assert all(path.count(".") == 2 for path in paths(parts))


@every_toy
def test_auto_takes_the_layers_that_hold_the_weights(toy: Toy, toy_name: str) -> None:
    as_found = "block" if toy_name == "parallel-block" else "layer"
    assert sc.find_layers(toy) == sc.find_layers(toy, granularity=as_found)


@pytest.mark.parametrize("granularity", ["blok", "", None, 3, "Block", True])
def test_an_unknown_granularity_is_refused(granularity: Any) -> None:
    toy = build("single", depth=1)
    words = r"granularity must be one of auto, layer, block, model, got"
    for attempt in (
        lambda: sc.find_layers(toy, granularity=granularity),
        lambda: sc.observe_layers(toy, lambda i: sample(toy), granularity=granularity),
        lambda: sc.Schedule.uniform(toy, STEPS, 2, granularity=granularity),
        lambda: sc.calibrate(toy, lambda i: sample(toy), granularity=granularity),
    ):
        with pytest.raises(sc.InvalidArgumentError, match=words):
            attempt()
    assert type(toy) is Toy


def test_a_model_without_layers_of_its_own_is_pointed_to_blocks() -> None:
    class Raw(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.norm, self.inner, self.outer = (nn.Linear(dim, dim) for _ in range(3))

    model = nn.Module()
    model.blocks = nn.ModuleList(Raw(WIDTH) for _ in range(2))
    with pytest.raises(sc.LayersNotFoundError, match='granularity "block" or "auto"'):
        sc.find_layers(model, granularity="layer")
    assert paths(sc.find_layers(model)) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("block", ["transformer.blocks.0", "transformer_2.blocks.0"]),
        ("model", ["transformer", "transformer_2"]),
    ],
)
def test_two_denoisers(granularity: Any, expected: list[str]) -> None:
    pipe = Pipe(transformer=build("single", depth=1), transformer_2=build("dual", depth=1))
    layers = sc.find_layers(pipe, granularity=granularity)
    assert paths(layers) == expected
    assert {layer.kind for layer in layers} == {granularity}
    assert [layer.block for layer in layers] == expected


REFINERS = ["context_refiner", "token_refiner", "text_fusion", "txt_blocks", "text_blocks"]


@pytest.mark.parametrize("name", REFINERS)
def test_kinds_of_blocks_that_see_only_the_prompt(name: str) -> None:
    toy = build("single", depth=1)
    toy.add_module(name, nn.ModuleList(Block(WIDTH) for _ in range(2)))
    kinds = {x.path: x.kind for x in sc.find_layers(toy)}
    assert kinds["blocks.0.attn"] == "self_attn"
    assert kinds[f"{name}.1.attn"] == "refiner_self_attn"
    assert kinds[f"{name}.1.mlp"] == "refiner_ffn"
    kinds = {x.path: x.kind for x in sc.find_layers(toy, granularity="block")}
    assert kinds == {
        "blocks.0": "block",
        f"{name}.0": "refiner_block",
        f"{name}.1": "refiner_block",
    }


@pytest.mark.parametrize("name", [name for name, tiny in all_models().items() if tiny.refiners])
@pytest.mark.parametrize("granularity", ["auto", "block"])
@pytest.mark.filterwarnings("ignore")
def test_kinds_of_refiners_in_real_architectures(name: str, granularity: Any) -> None:
    tiny = all_models()[name]
    for layer in sc.find_layers(tiny.build(), granularity=granularity):
        refines = layer.block.startswith(tuple(f"{path}." for path in tiny.refiners))
        assert layer.kind.startswith("refiner_") == refines, layer


def test_the_residual_of_a_refiner_block_is_what_is_reused() -> None:
    class Refined(Toy):
        def __init__(self, depth: int = 1) -> None:
            super().__init__(depth)
            self.context_refiner = nn.ModuleList([Block(WIDTH)])

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(self.context_refiner[0](x, self.condition(t, y)), t, y)

    torch.manual_seed(0)
    toy = Refined().eval()
    schedule = uniform(toy, "block", 3)
    assert [x.kind for x in schedule.layers] == ["block", "refiner_block"]
    expected, by_hand = run_by_hand(toy, schedule)
    with sc.cached(toy, schedule) as run:
        assert same(sample(toy), expected)
    assert run.summary().reused == by_hand.reused == schedule.reused


def test_blocks_of_spatial_and_temporal_stacks() -> None:
    toy = build("single", depth=1)
    toy.temporal_blocks = nn.ModuleList([Block(WIDTH)])
    kinds = {x.path: x.kind for x in sc.find_layers(toy, granularity="block")}
    assert kinds == {"blocks.0": "spatial_block", "temporal_blocks.0": "temporal_block"}
