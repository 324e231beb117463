"""Chosen by the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.block_models import Pipe, paths
from support.reference import STEPS, sample
from support.toys import Mlp, Toy, build
from torch import nn

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


def test_select_sees_every_module_but_the_model_itself() -> None:
    toy = build("single", depth=1)
    seen: dict[str, nn.Module] = {}
    sc.find_layers(toy, select=lambda path, module: seen.setdefault(path, module) is toy.head)
    assert seen == {path: module for path, module in toy.named_modules() if path}


@pytest.mark.parametrize(
    ("path", "choice", "kind", "block"),
    [
        ("blocks.1.attn", True, "self_attn", "blocks.1"),
        ("blocks.1.mlp", True, "ffn", "blocks.1"),
        ("blocks.1.mlp.fc2", True, "ffn", "blocks.1"),
        ("blocks.1", True, "block", "blocks.1"),
        ("blocks.1", "block", "block", "blocks.1"),
        ("blocks.1", "late_block", "late_block", "blocks.1"),
        ("blocks.1", "self_attn", "self_attn", "blocks.1"),
        ("blocks.1.attn", "mine", "mine", "blocks.1"),
        ("blocks.1.attn", "block", "block", "blocks.1.attn"),
        ("head", True, "ffn", ""),
    ],
)
def test_select(path: str, choice: bool | str, kind: str, block: str) -> None:
    toy = build("single", depth=2)
    layers = sc.find_layers(toy, select=lambda name, module: choice if name == path else False)
    assert layers == [sc.CacheLayer(path, kind, block)]
    schedule = sc.Schedule.uniform(toy, STEPS, 2, layers=layers)
    with sc.cached(toy, schedule) as run:
        sample(toy)
    assert run.summary().reused == schedule.reused == STEPS // 2
    assert run.summary().recomputed == {}


@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_select_outranks_granularity(granularity: Any) -> None:
    toy = build("single", depth=2)
    layers = sc.find_layers(
        toy, granularity=granularity, select=lambda path, module: isinstance(module, Mlp)
    )
    assert paths(layers) == ["blocks.0.mlp", "blocks.1.mlp"]


def test_select_in_a_pipeline_sees_paths_of_each_denoiser() -> None:
    pipe = Pipe(transformer=build("single", depth=1), transformer_2=build("dual", depth=1))
    layers = sc.find_layers(pipe, select=lambda path, module: path == "blocks.0.attn")
    assert [(layer.path, layer.kind) for layer in layers] == [
        ("transformer.blocks.0.attn", "self_attn"),
        ("transformer_2.blocks.0.attn", "joint_attn"),
    ]


@pytest.mark.parametrize("inner", ["blocks.0.attn", "blocks.0.mlp.fc1"])
def test_a_choice_inside_another_is_refused(inner: str) -> None:
    toy = build("single", depth=2)
    words = rf"select chose '{inner}' inside 'blocks.0'.*choose one"
    with pytest.raises(sc.InvalidArgumentError, match=words):
        sc.find_layers(toy, select=lambda path, module: path in ("blocks.0", inner))
    neighbours = ("blocks.0", "blocks.1.attn")
    assert paths(sc.find_layers(toy, select=lambda path, module: path in neighbours)) == [
        *neighbours
    ]


def test_a_name_that_begins_like_another_is_not_inside_it() -> None:
    toy = build("single", depth=12)
    chosen = ("blocks.1", "blocks.10.attn", "blocks.11")
    assert paths(sc.find_layers(toy, select=lambda path, module: path in chosen)) == [*chosen]


@pytest.mark.parametrize("nothing", [False, None, "", 0])
def test_choosing_nothing_is_refused(nothing: Any) -> None:
    toy = build("single", depth=1)
    words = r"select returned True for no module of Toy; it is called with each path and module"
    with pytest.raises(sc.LayersNotFoundError, match=words):
        sc.find_layers(toy, select=lambda path, module: nothing)
    with pytest.raises(sc.LayersNotFoundError, match=words):
        sc.observe_layers(toy, lambda i: sample(toy), select=lambda path, module: nothing)


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda x: nn.ModuleDict({"0": x[0]})])
def test_choosing_what_has_no_forward_is_refused(kind: Callable[[list[nn.Module]], Any]) -> None:
    toy = build("single", depth=1)
    toy.blocks = kind([toy.blocks[0]])
    words = r"'blocks', but Module(List|Dict) has no forward and is never called"
    with pytest.raises(sc.InvalidArgumentError, match=words):
        sc.find_layers(toy, select=lambda path, module: path == "blocks")
