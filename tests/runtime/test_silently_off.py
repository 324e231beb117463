"""Runs that the schedule took no part in, or was refused in without reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.reference import STEPS, sample, times
from support.toys import WIDTH, build
from torch import Tensor, nn

import smoothcache as sc
from smoothcache.layers.modules import identify
from smoothcache.tracking.intercept import intercept, release


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def uniform(model: Any) -> sc.Schedule:
    return sc.Schedule.uniform(model, STEPS, 2)


def test_another_object_runs() -> None:
    model, other = build("single"), build("single")
    with pytest.warns(sc.SmoothCacheWarning, match="no generation was seen"):
        with sc.cached(model, uniform(model)):
            sample(other)
    run = sc.enable(model, uniform(model))
    sample(other)
    with pytest.warns(sc.SmoothCacheWarning, match="no generation was seen"):
        run.disable()


def test_a_denoiser_exchanged_after_a_generation() -> None:
    model, other = build("single"), build("single")
    pipe = SimpleNamespace(components={"transformer": model})
    run = sc.enable(pipe, uniform(pipe))
    sample(model)
    pipe.components["transformer"] = other
    sample(other)
    with pytest.warns(sc.SmoothCacheWarning, match="replaced while enabled"):
        run.disable()


def test_blocks_without_their_denoiser_are_noticed_at_once() -> None:
    model = build("single")
    run = sc.enable(model, uniform(model))
    path = (run.schedule.layers or ())[0].path
    layer: Any = model.get_submodule(path)
    with pytest.warns(sc.SmoothCacheWarning, match="wrap the function"):
        layer(torch.ones(1, 4, WIDTH))
    with pytest.warns(sc.SmoothCacheWarning, match="no generation was seen"):
        run.disable()


def test_no_word_if_the_block_raises_or_the_model_ran() -> None:
    model = build("single")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError), sc.cached(model, uniform(model)):
            raise ZeroDivisionError
        with sc.cached(model, uniform(model)):
            sample(model)


def test_a_thread_whose_request_was_cancelled_begins_elsewhere() -> None:
    model = build("single")
    run = sc.enable(model, uniform(model))

    def request(timesteps: list[float]) -> None:
        with torch.no_grad():
            sample(model, timesteps=timesteps)

    with ThreadPoolExecutor(1) as a, ThreadPoolExecutor(1) as b:
        a.submit(request, times()[:2]).result(60)
        b.submit(request, times()).result(60)
        a.submit(request, times()[1:]).result(60)
        run.reset()
        b.submit(request, times()[1:]).result(60)
    run.reset()
    run.disable()


def test_how_weights_are_stored_is_no_part_of_the_identity() -> None:
    plain, stored = build("single"), build("single")
    plain.config = {"depth": 2}  # type: ignore[assignment]
    stored.config = {  # type: ignore[assignment]
        "depth": 2,
        "quantization_config": {"quant_method": "torchao"},
        "torch_dtype": "bfloat16",
        "device_map": "cpu",
        "diffusers_version": "0.1",
        "_name_or_path": "elsewhere",
    }
    assert identify(plain) == identify(stored)
    stored.config = {"depth": 3}  # type: ignore[assignment]
    assert identify(plain) != identify(stored)


def test_a_schedule_of_one_denoiser_serves_a_pipeline_with_a_second() -> None:
    model, control = build("single"), build("single", depth=1)
    schedule = uniform(SimpleNamespace(components={"transformer": model}))
    pipe = SimpleNamespace(components={"transformer": model, "controlnet": control})
    with sc.cached(pipe, schedule) as run:
        sample(model)
    assert run.summary().reused > 0


def test_weights_loaded_in_mid_generation_are_not_answered_with_older_values() -> None:
    model = build("single")
    run = sc.enable(model, uniform(model))
    sample(model, timesteps=times()[:3])
    assert run.summary().held_bytes > 0
    model.load_state_dict(model.state_dict())
    assert run.summary().held_bytes == 0
    run.reset()
    run.disable()


def test_a_property_with_the_name_of_an_adapter_s_method_stays_a_property() -> None:
    """As PEFT's layers have it: ``disable_adapters`` says whether they are off."""

    class Adapted(nn.Module):
        @property
        def disable_adapters(self) -> bool:
            return False

        def forward(self, x: Tensor) -> Tensor:
            return x if self.disable_adapters else 2 * x

    module = Adapted()
    intercept(module, lambda forward, args, kwargs: forward(*args, **kwargs))
    assert module.disable_adapters is False
    assert torch.equal(module(torch.ones(2)), 2 * torch.ones(2))
    release(module)
