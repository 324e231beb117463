"""Real models of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from support.other_tools import CPU, same, uniform, zoo_model, zoo_sample
from torch import Tensor, nn

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


class Streamed(group_offloading.ModuleGroup):  # type: ignore[misc]
    """A group whose weights are NaN until a copy, that was begun on a stream, is waited for."""

    away = False

    @property
    def offload_device(self) -> torch.device:
        """Where diffusers looks whether the weights are away."""
        return CPU if self.away else torch.device("meta")

    @offload_device.setter
    def offload_device(self, device: torch.device) -> None:
        pass

    def _init_cpu_param_dict(self) -> dict[Tensor, Tensor]:
        parts = [x for m in self.modules for x in (*m.parameters(), *m.buffers())]
        return {tensor: tensor.data for tensor in (*parts, *self.parameters, *self.buffers)}

    def offload_(self) -> None:
        self.away = True
        for tensor in self.cpu_param_dict:
            tensor.data = torch.full_like(tensor, torch.nan)

    def onload_(self) -> None:
        def arrive() -> None:
            for tensor, value in self.cpu_param_dict.items():
                tensor.data = value

        if self.stream is not None:
            self.stream.synchronize()
        if self.stream is not None and self.non_blocking:
            self.stream.under_way.append(arrive)
        else:
            arrive()
        self.away = False


class Stream:
    def __init__(self) -> None:
        self.under_way: list[Callable[[], None]] = []

    def synchronize(self) -> None:
        while self.under_way:
            self.under_way.pop(0)()


def offload_with_prefetching(model: nn.Module, kind: str) -> None:
    config = group_offloading.GroupOffloadingConfig(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=group_offloading.GroupOffloadingType(kind),
        non_blocking=True,
        record_stream=False,
        low_cpu_mem_usage=True,
        num_blocks_per_group=1,
        stream=Stream(),
    )
    group_offloading._apply_group_offloading(model, config)


@pytest.mark.parametrize("order", ["AE", "EA"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "FluxTransformer2DModel"])
def test_prefetching_of_offloaded_groups(
    name: str, kind: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_offloading, "ModuleGroup", Streamed)
    model = zoo_model(name)
    schedule = uniform(model)
    plain = zoo_sample(name, model)
    with sc.cached(model, schedule):
        under_schedule = [zoo_sample(name, model, seed) for seed in (0, 1)]
    handle = sc.enable(model, schedule) if order == "EA" else None
    offload_with_prefetching(model, kind)
    handle = handle or sc.enable(model, schedule)
    assert same([zoo_sample(name, model, seed) for seed in (0, 1)], under_schedule)
    assert handle.summary().reused == 2 * schedule.reused
    handle.disable()
    assert torch.equal(zoo_sample(name, model), plain)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "FluxTransformer2DModel"])
def test_projections_are_fused_while_enabled(name: str) -> None:
    model = zoo_model(name)
    schedule = uniform(model)
    with sc.cached(model, schedule):
        under_schedule = zoo_sample(name, model)
    with sc.cached(model, schedule) as run:
        model.fuse_qkv_projections()
        torch.testing.assert_close(zoo_sample(name, model), under_schedule)
    assert run.summary().reused == schedule.reused


@pytest.mark.parametrize(
    "name",
    [x for x in ("WanTransformer3DModel", "CogVideoXTransformer3DModel")]
    + ["FluxTransformer2DModel"],
)
def test_the_layers_are_the_same_with_fused_projections(name: str) -> None:
    model = zoo_model(name)
    plain = [(layer.path, layer.kind) for layer in sc.find_layers(model)]
    model.fuse_qkv_projections()
    assert [(layer.path, layer.kind) for layer in sc.find_layers(model)] == plain


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "FluxTransformer2DModel"])
def test_layerwise_casting(name: str) -> None:
    def cast(model: nn.Module) -> None:
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    found = []
    for order in ("AE", "EA"):
        model = zoo_model(name)
        schedule = uniform(model)
        handle = sc.enable(model, schedule) if order == "EA" else None
        cast(model)
        handle = handle or sc.enable(model, schedule)
        found.append(zoo_sample(name, model))
        assert handle.summary().reused == schedule.reused
        handle.disable()
        found.append(zoo_sample(name, model))
        assert model.get_submodule(schedule.layers[0].path)  # type: ignore[index]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
