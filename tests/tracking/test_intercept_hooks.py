"""Hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.reference import ByHand, same, sample
from support.toys import build
from support.traces import unaltered
from support.unusual_models import every_toy, uniform
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def doubled(_: nn.Module, args: Any, output: Any) -> Any:
    return pytree.tree_map(lambda leaf: 2 * leaf, output)


def shifted(_: nn.Module, args: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf + 0.25 if leaf.ndim > 2 else leaf, args)


def shifted_by_name(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return shifted(_, args), shifted(_, kwargs)


@every_toy
@pytest.mark.parametrize("where", ["blocks.0", "blocks.1.attn", "blocks.0.mlp", ""])
@pytest.mark.parametrize("interval", [1, 3])
def test_hooks_that_change_what_goes_in_and_out(toy_name: str, where: str, interval: int) -> None:
    """They run at a reuse as they do otherwise, on what is reused."""
    toy = build(toy_name, depth=2)
    if where == "blocks.0.mlp":
        where = {"parallel-block": "blocks.0.linear2", "dual": "blocks.0.ff"}.get(toy_name, where)
    module = toy.get_submodule(where)
    module.register_forward_hook(doubled)
    module.register_forward_pre_hook(shifted_by_name, with_kwargs=True)
    schedule = uniform(toy, interval, granularity="layer")
    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, begin=by_hand.begin)
    with unaltered(toy), sc.cached(toy, schedule) as run:
        assert same(sample(toy), expected)
    assert run.summary().reused >= schedule.reused
    assert run.summary().recomputed == {}


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_hooks_on_blocks_and_models(granularity: Any) -> None:
    toy = build("single", depth=2)
    for module in (toy, *toy.blocks):
        module.register_forward_hook(doubled)
        module.register_forward_pre_hook(shifted)
    schedule = uniform(toy, 3, granularity=granularity)
    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, begin=by_hand.begin)
    with unaltered(toy), sc.cached(toy, schedule) as run:
        assert same(sample(toy), expected)
    assert run.summary().reused == schedule.reused


def test_a_hook_that_fails_breaks_the_generation_off() -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy, 4)
    with sc.cached(toy, schedule):
        fresh = sample(toy)

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        if fails[0]:
            raise KeyError("mine")

    fails = [False]
    toy.blocks[1].mlp.register_forward_hook(fail)

    def generate(failing_step: int | None) -> list[Tensor]:
        def begin(step: int, branch: int) -> None:
            fails[0] = step == failing_step

        return sample(toy, begin=begin)

    with unaltered(toy), sc.cached(toy, schedule) as run:
        for failing_step in (0, 3, 4, 5):
            with pytest.raises(KeyError, match="mine"):
                generate(failing_step)
            assert run.summary().held_bytes == 0
            assert same(generate(None), fresh)
    assert (run.summary().finished, run.summary().broken_off) == (4, 4)
