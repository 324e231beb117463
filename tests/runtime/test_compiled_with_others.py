"""Torch.compile."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.other_tools import denoised, same, uniform, zoo_model, zoo_sample
from support.toys import Toy, build

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


def compiled(toy: Toy, how: str, backend: str, fullgraph: bool) -> Any:
    if how == "wrapped":
        return torch.compile(toy, backend=backend, fullgraph=fullgraph)
    for module in [toy] if how == "in place" else toy.get_submodule("blocks").children():
        module.compile(backend=backend, fullgraph=fullgraph)
    return toy


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """Compiles from the beginning, and says nothing."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch._dynamo
    logger.setLevel(level)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("how", "order", "backend"),
    [
        ("wrapped", "AE", "eager"),
        ("in place", "EA", "eager"),
        ("blocks", "AE", "aot_eager"),
        ("blocks", "EA", "eager"),
    ],
)
def test_compiled_toys(how: str, order: str, backend: str, dynamo: Any) -> None:
    toy = build("single", depth=1)
    schedule = uniform(toy)
    plain = denoised(toy)
    with sc.cached(toy, schedule):
        under_schedule = [denoised(toy, seed) for seed in (0, 1)]
    handle = sc.enable(toy, schedule) if order == "EA" else None
    model = compiled(toy, how, backend, fullgraph=False)
    handle = handle or sc.enable(model, schedule)
    found = [denoised(model, seed) for seed in (0, 1)]
    assert handle.summary().reused == 2 * schedule.reused
    handle.disable()
    found.append(denoised(model))
    for a, b in zip(found, [*under_schedule, plain], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if backend == "eager" else 1e-5)
    assert dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("how", ["in place", "blocks"])
def test_twenty_steps_are_not_compiled_one_by_one(how: str, dynamo: Any) -> None:
    toy = build("single", depth=1)
    schedule = uniform(toy, steps=20)
    model = compiled(toy, how, "eager", fullgraph=False)
    with (
        dynamo.config.patch(fail_on_recompile_limit_hit=True),
        sc.cached(model, schedule) as run,
    ):
        denoised(model, steps=20)
    assert run.summary().reused == schedule.reused


@pytest.mark.parametrize("how", ["wrapped", "blocks"])
def test_one_graph(how: str, dynamo: Any) -> None:
    toy = build("single", depth=1)
    schedule = uniform(toy)
    plain = denoised(toy)
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
    model = compiled(toy, how, "eager", fullgraph=True)
    assert torch.equal(denoised(model), plain)
    handle = sc.enable(model, schedule)
    assert torch.equal(denoised(model), under_schedule)
    assert handle.summary().reused == schedule.reused
    handle.disable()
    assert torch.equal(denoised(model), plain)


def test_repeated_blocks_of_diffusers(dynamo: Any) -> None:
    name = "WanTransformer3DModel"
    model = zoo_model(name)
    schedule = uniform(model)
    plain = zoo_sample(name, model)
    with sc.cached(model, schedule):
        under_schedule = [zoo_sample(name, model, seed) for seed in (0, 1)]
    handle = sc.enable(model, schedule)
    model.compile_repeated_blocks(backend="eager")
    assert same([zoo_sample(name, model, seed) for seed in (0, 1)], under_schedule)
    assert handle.summary().reused == 2 * schedule.reused
    handle.disable()
    assert torch.equal(zoo_sample(name, model), plain)
