"""Modules in two places."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.reference import STEPS, ByHand, same, sample
from support.toys import Toy
from support.traces import unaltered
from support.unusual_models import made, paths, refused, uniform

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def shared_block() -> Toy:
    toy: Toy = made(Toy, depth=3)
    toy.blocks[2] = toy.blocks[0]
    return toy


def shared_layers() -> Toy:
    toy: Toy = made(Toy, depth=3)
    toy.blocks[2].attn = toy.blocks[0].attn
    toy.blocks[1].mlp = toy.blocks[0].mlp
    return toy


def shared_weights() -> Toy:
    toy: Toy = made(Toy, depth=3)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1"):
        first = toy.blocks[0].get_submodule(name)
        toy.blocks[1].get_submodule(name).weight = first.weight
    return toy


def shared_list() -> Toy:
    toy: Toy = made(Toy, depth=3)
    toy.same_blocks = toy.blocks
    return toy


SHARING: dict[str, tuple[Callable[[], Toy], list[str]]] = {
    "a block": (shared_block, [f"blocks.{i}.{x}" for i in (0, 1) for x in ("attn", "mlp")]),
    "weights": (shared_weights, [f"blocks.{i}.{x}" for i in range(3) for x in ("attn", "mlp")]),
    "a list": (shared_list, [f"blocks.{i}.{x}" for i in range(3) for x in ("attn", "mlp")]),
}


@pytest.mark.parametrize("what", SHARING)
@pytest.mark.parametrize("granularity", ["auto", "block"])
@pytest.mark.parametrize("interval", [2, 3])
def test_modules_in_two_places(what: str, granularity: Any, interval: int) -> None:
    """One layer, with a value for each of its uses."""
    build_toy, expected = SHARING[what]
    toy = build_toy()
    assert paths(sc.find_layers(toy)) == expected
    schedule = uniform(toy, interval, granularity=granularity)
    by_hand = ByHand(toy, schedule)
    with sc.cached(toy, uniform(toy, 1, granularity=granularity)):
        assert same(sample(toy), sample(copy.deepcopy(toy)))
    with unaltered(toy), sc.cached(toy, schedule) as run:
        assert same(sample(toy), sample(by_hand.toy, begin=by_hand.begin))
    assert run.summary().reused == (STEPS - len(range(0, STEPS, interval))) * (
        3 if granularity == "block" else 6
    )
    assert run.summary().never_ran == ()


def test_layers_in_two_blocks_run_as_they_should() -> None:
    toy = shared_layers()
    distinct = {id(toy.get_submodule(layer.path)): layer for layer in reversed(sc.find_layers(toy))}
    schedule = uniform(toy, 3, layers=list(distinct.values()))
    assert len(schedule.rows) == 4
    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, begin=by_hand.begin)
    for one in (schedule, uniform(toy, 3)):
        with unaltered(toy), warnings.catch_warnings():
            warnings.simplefilter("ignore", sc.SmoothCacheWarning)
            with sc.cached(toy, one) as run:
                assert same(sample(toy), expected)
        assert run.summary().reused == 5 * 6


def test_layers_in_two_blocks_are_found_once() -> None:
    toy = shared_layers()
    layers = sc.find_layers(toy)
    assert len({id(toy.get_submodule(x.path)) for x in layers}) == len(layers)
    with sc.cached(toy, uniform(toy)) as run:
        sample(toy)
    assert run.summary().never_ran == ()


def test_two_rows_for_one_module_are_refused() -> None:
    toy, untied = shared_block(), made(Toy, depth=3)
    layers = tuple(sc.find_layers(untied))
    rows = {x.path: sc.Row.uniform(STEPS, 2 + x.path.startswith("blocks.2")) for x in layers}
    with refused(toy, sc.ScheduleMismatchError, r"blocks\.0.*blocks\.2"):
        sc.enable(toy, sc.Schedule(STEPS, rows, layers))
