"""Confirmed by watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.block_models import BypassingToy, Idle, every_granularity, every_toy, paths
from support.reference import STEPS, sample
from support.toys import WIDTH, Block, Toy, build

import smoothcache as sc
from smoothcache.model.costs import MacCounter


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


@pytest.fixture
def bypassing() -> Toy:
    torch.manual_seed(0)
    return BypassingToy(depth=2).eval().requires_grad_(False)


def test_a_block_that_bypasses_its_layers_is_taken_as_a_whole(bypassing: Toy) -> None:
    as_found = sc.find_layers(bypassing)
    assert paths(as_found) == [f"blocks.{i}.{name}" for i in range(2) for name in ("attn", "mlp")]
    seen = sc.observe_layers(bypassing, lambda i: sample(bypassing))
    with MacCounter() as counter:
        output = bypassing.blocks[0](torch.zeros(1, 6, WIDTH), torch.zeros(1, WIDTH))
    assert seen == [
        sc.CacheLayer(f"blocks.{i}", "block", f"blocks.{i}", counter.total, output.nbytes)
        for i in range(2)
    ]
    with sc.cached(bypassing, sc.Schedule.uniform(bypassing, STEPS, 2, layers=seen)) as run:
        sample(bypassing)
    assert run.summary().never_ran == ()


def test_blocks_beside_those_that_are_bypassed_keep_their_layers(bypassing: Toy) -> None:
    bypassing.blocks.append(Block(WIDTH))
    seen = sc.observe_layers(bypassing, lambda i: sample(bypassing))
    assert paths(seen) == ["blocks.0", "blocks.1", "blocks.2.attn", "blocks.2.mlp"]


@pytest.mark.parametrize("granularity", ["layer", "auto"])
def test_layers_that_hold_the_work_are_kept(granularity: Any) -> None:
    toy = build("dual", depth=2)
    seen = sc.observe_layers(toy, lambda i: sample(toy), granularity=granularity)
    assert paths(seen) == paths(sc.find_layers(toy))


@pytest.mark.parametrize("granularity", ["auto", "layer", "block"])
def test_what_never_ran_is_left_out(granularity: Any) -> None:
    toy = Idle(depth=3)
    seen = sc.observe_layers(toy, lambda i: sample(toy), granularity=granularity)
    expected = sc.find_layers(toy, granularity=granularity)
    assert paths(seen) == [x.path for x in expected if not x.path.startswith("blocks.2")]


def test_a_model_whose_layers_never_ran_is_refused() -> None:
    toy, other = build("single", depth=1), build("single", depth=1)
    before = [(type(module), dict(vars(module))) for module in toy.modules()]
    with pytest.raises(sc.LayersNotFoundError, match=r"ran none of the 2 layers.*same object"):
        sc.observe_layers(toy, lambda i: sample(other))
    assert [(type(module), dict(vars(module))) for module in toy.modules()] == before


@every_toy
@pytest.mark.parametrize(("granularity", "calls"), [("auto", 1), ("block", 2), ("model", 2)])
def test_the_macs_of_what_ran(toy: Toy, granularity: Any, calls: int) -> None:
    seen = sc.observe_layers(toy, lambda i: sample(toy, calls=calls), granularity=granularity)
    counted = dict.fromkeys(paths(seen), 0)
    with MacCounter() as counter:
        for path in counted:
            module = toy.get_submodule(path)
            module.forward = counting(counter, counted, path, module.forward)
        sample(toy, 1, calls=calls)
    assert {layer.path: layer.macs for layer in seen} == counted
    assert all(counted.values())


def counting(
    counter: MacCounter, into: dict[str, int], path: str, forward: Callable[..., Any]
) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        before = counter.total
        output = forward(*args, **kwargs)
        into[path] += counter.total - before
        return output

    return counted


@every_granularity
def test_the_first_sample_alone_is_watched(granularity: Any) -> None:
    toy = build("single", depth=2)
    ran: list[int] = []
    before = [(type(module), dict(vars(module))) for module in toy.modules()]

    def generate(i: int) -> Any:
        ran.append(i)
        return sample(toy, seed=i)

    sc.observe_layers(toy, generate, granularity=granularity)
    assert ran == [0]
    assert [(type(module), dict(vars(module))) for module in toy.modules()] == before
