"""Caches of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.other_tools import traces, uniform, zoo_model, zoo_sample

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


def pyramid() -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1001),
        current_timestep_callback=lambda: 500,
    )


def first_block() -> Any:
    return diffusers.FirstBlockCacheConfig(threshold=0.1)


def taylor_seer() -> Any:
    return diffusers.TaylorSeerCacheConfig()


@pytest.mark.parametrize("config", [pyramid, first_block, taylor_seer])
def test_a_cache_of_diffusers_is_refused_while_enabled(config: Callable[[], Any]) -> None:
    name = "FluxTransformer2DModel"
    model = zoo_model(name)
    schedule = uniform(model)
    with sc.cached(model, schedule):
        under_schedule = zoo_sample(name, model)
    before = traces(model)
    with sc.cached(model, schedule) as run:
        with pytest.raises(sc.AlreadyCachedError, match="disable"):
            model.enable_cache(config())
        assert torch.equal(zoo_sample(name, model), under_schedule)
    assert run.summary().reused == schedule.reused
    assert traces(model) == before
    model.enable_cache(config())
    with pytest.raises(sc.AlreadyCachedError, match=r"disable_cache\(\)"):
        sc.enable(model, schedule)
    model.disable_cache()
