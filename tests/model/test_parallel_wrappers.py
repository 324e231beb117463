"""Wrappers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from support.other_tools import denoised, unidentified, uniform
from support.toys import Toy, build
from torch import nn

import smoothcache as sc
from smoothcache.layers.modules import identify

diffusers = pytest.importorskip("diffusers")
diffusers_hooks = pytest.importorskip("diffusers.hooks")
group_offloading = pytest.importorskip("diffusers.hooks.group_offloading")
accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("order", ["AE", "EA"])
@pytest.mark.parametrize("wrapper", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_data_parallel(wrapper: Callable[[nn.Module], nn.Module], order: str) -> None:
    toy = build("single", depth=2).requires_grad_(True)
    schedule = uniform(toy)
    plain = denoised(toy)
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
    handle = sc.enable(toy, schedule) if order == "EA" else None
    model = wrapper(toy)
    handle = handle or sc.enable(model, schedule)
    assert torch.equal(denoised(model), under_schedule)
    assert handle.summary().reused == schedule.reused
    assert torch.equal(denoised(copy.deepcopy(model)), plain)
    handle.disable()
    assert torch.equal(denoised(model), plain)
    assert [layer.path for layer in sc.find_layers(model)] == list(schedule.rows)


def sharded(toy: Toy, layers: bool) -> Toy:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    fully_shard = functools.partial(
        fsdp.fully_shard, mesh=torch.distributed.init_device_mesh("cpu", (1,))
    )
    for block in toy.get_submodule("blocks").children():
        if layers:
            fully_shard(block.attn)
            fully_shard(block.mlp)
        fully_shard(block)
    fully_shard(toy)
    return toy


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("order", ["AE", "EA"])
def test_fully_sharded(order: str, layers: bool) -> None:
    toy = build("single", depth=2)
    schedule = unidentified(toy)
    plain = denoised(toy)
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
    if order == "AE":
        sharded(toy, layers)
    handle = sc.enable(toy, schedule)
    if order == "EA":
        sharded(toy, layers)
    assert torch.equal(denoised(toy), under_schedule)
    assert handle.summary().reused == schedule.reused
    handle.disable()
    assert torch.equal(denoised(toy), plain)


@pytest.mark.usefixtures("alone")
def test_a_fully_sharded_model_is_the_same_model() -> None:
    toy = build("single", depth=2)
    before = identify(toy)
    assert identify(sharded(toy, layers=False)) == before


@pytest.mark.usefixtures("alone")
def test_sharded_while_enabled_and_enabled_again() -> None:
    toy = build("single", depth=2)
    schedule = unidentified(toy)
    with sc.cached(toy, schedule):
        under_schedule = denoised(sharded(toy, layers=True))
    with sc.cached(toy, schedule) as run:
        assert torch.equal(denoised(toy), under_schedule)
    assert run.summary().reused == schedule.reused
