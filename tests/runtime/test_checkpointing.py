"""Gradient checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from support.other_tools import uniform, zoo_model, zoo_sample
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize(
    "reentrant",
    [
        True,
        False,
    ],
)
def test_gradient_checkpointing_is_right_or_refused(reentrant: bool) -> None:
    name = "FluxTransformer2DModel"

    def gradients(checkpointed: bool) -> list[Tensor | None]:
        model = zoo_model(name).train().requires_grad_(True)
        if checkpointed:
            run = functools.partial(checkpoint, use_reentrant=reentrant)
            model.enable_gradient_checkpointing(run)
        with torch.enable_grad(), sc.cached(model, uniform(model, steps=3)):
            zoo_sample(name, model, steps=3).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(checkpointed=False)
    try:
        found = gradients(checkpointed=True)
    except (sc.SmoothCacheError, torch.utils.checkpoint.CheckpointError):
        return
    torch.testing.assert_close(found, expected)


def test_checkpointing_does_nothing_without_gradients() -> None:
    name = "FluxTransformer2DModel"
    model = zoo_model(name)
    schedule = uniform(model)
    with sc.cached(model, schedule):
        under_schedule = zoo_sample(name, model)
    model.train().enable_gradient_checkpointing()
    with sc.cached(model, schedule) as run:
        assert torch.equal(zoo_sample(name, model), under_schedule)
    assert run.summary().reused == schedule.reused
