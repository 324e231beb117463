"""Adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.other_tools import denoised, unidentified, uniform, zoo_model, zoo_sample
from support.toys import Block, Toy, build
from torch import Tensor, nn

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


def linears(model: nn.Module, part: str = "") -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and part in path
    ]


def lora(model: nn.Module, targets: list[str] | None = None) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=targets or linears(model), init_lora_weights=False)


def with_adapter(model: nn.Module, targets: list[str] | None = None, seed: int = 1) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    return peft.inject_adapter_in_model(lora(model, targets), model)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param("FluxTransformer2DModel", ""),
        pytest.param("WanVACETransformer3DModel", ""),
        pytest.param("WanTransformer3DModel", "attn"),
        ("WanTransformer3DModel", "ffn"),
        pytest.param("SanaWMTransformer3DModel", "plucker"),
        pytest.param("BriaFiboTransformer2DModel", "caption"),
        pytest.param("mmdit-flux-reference", "mlp"),
        pytest.param("original-dit", ""),
        ("raw-linears", ""),
        ("parallel-block", ""),
    ],
)
def test_the_layers_are_the_same_with_adapters(name: str, part: str) -> None:
    model = zoo_model(name)
    plain = [(layer.path, layer.kind) for layer in sc.find_layers(model)]
    adapted = with_adapter(zoo_model(name), linears(model, part))
    assert [(layer.path, layer.kind) for layer in sc.find_layers(adapted)] == plain


@pytest.mark.parametrize(
    "name",
    [
        "WanTransformer3DModel",
        "original-dit",
    ],
)
def test_a_model_with_adapters_is_the_same_model(name: str) -> None:
    assert identify(with_adapter(zoo_model(name))) == identify(zoo_model(name))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "FluxTransformer2DModel"])
def test_adapters_come_and_go_while_enabled(name: str) -> None:
    pytest.importorskip("peft")
    schedule = uniform(zoo_model(name))

    def add(model: nn.Module, *adapters: str) -> None:
        targets = linears(zoo_model(name), "attn") + linears(zoo_model(name), "ff")
        for adapter in adapters:
            torch.manual_seed(len(adapter))
            model.add_adapter(lora(model, targets), adapter_name=adapter)
            model.set_adapter(adapter)

    def expected(*adapters: str) -> Tensor:
        fresh = zoo_model(name)
        add(fresh, *adapters)
        with sc.cached(fresh, schedule):
            return zoo_sample(name, fresh)

    plain, one, other = expected(), expected("a"), expected("a", "bb")
    assert not torch.equal(plain, one) and not torch.equal(one, other)
    model = zoo_model(name)
    uncached = zoo_sample(name, model)
    handle = sc.enable(model, schedule)
    changes: list[tuple[Callable[[], Any], Tensor]] = [
        (lambda: None, plain),
        (lambda: add(model, "a"), one),
        (lambda: add(model, "bb"), other),
        (lambda: model.set_adapter("a"), one),
        (model.disable_adapters, plain),
        (model.enable_adapters, one),
        (lambda: model.set_adapter("bb"), other),
        (model.fuse_lora, other),
        (model.unfuse_lora, other),
        (lambda: model.delete_adapters(["a"]), other),
        (lambda: model.delete_adapters(["bb"]), plain),
    ]
    for count, (change, wanted) in enumerate(changes, 1):
        change()
        torch.testing.assert_close(zoo_sample(name, model), wanted)
        assert handle.summary().reused == count * schedule.reused
    handle.disable()
    torch.testing.assert_close(zoo_sample(name, model), uncached)
    add(model, "a")
    with sc.cached(model, schedule) as run:
        torch.testing.assert_close(zoo_sample(name, model), one)
    assert run.summary().reused == schedule.reused


@pytest.mark.parametrize(
    "planned",
    ["with", "without"],
)
def test_a_module_wrapped_by_peft(planned: str) -> None:
    peft = pytest.importorskip("peft")

    def wrapped(toy: Toy) -> nn.Module:
        torch.manual_seed(1)
        return peft.get_peft_model(toy, lora(toy))  # type: ignore[no-any-return]

    toy = build("single", depth=2)
    schedule = uniform(wrapped(build("single", depth=2)) if planned == "with" else toy)
    model = wrapped(toy)
    plain = denoised(model)
    with sc.cached(model, schedule) as run:
        under_schedule = denoised(model)
        with model.disable_adapter():
            without = denoised(model)
    assert run.summary().reused == 2 * schedule.reused
    assert torch.equal(denoised(model), plain)
    bare = build("single", depth=2)
    with sc.cached(bare, uniform(bare)):
        assert torch.equal(without, denoised(bare))
        enabled_first = wrapped(bare)
        assert torch.equal(denoised(enabled_first), under_schedule)


class AttentionOfTorch(Block):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)  # type: ignore[assignment]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm1(x) + c[:, None]
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class AttentionOfTorchToy(Toy):
    block = AttentionOfTorch


@pytest.mark.parametrize("order", ["AE", "EA"])
def test_an_adapter_around_a_layer_itself(order: str) -> None:
    def make() -> Toy:
        torch.manual_seed(0)
        return AttentionOfTorchToy(depth=2).eval().requires_grad_(False)

    targets = ["blocks.0.attn"]
    schedule = unidentified(make())
    reference = with_adapter(make(), targets)
    with sc.cached(reference, schedule):
        expected = denoised(reference)
    toy = make()
    plain = denoised(with_adapter(make(), targets))
    if order == "AE":
        with_adapter(toy, targets)
    handle = sc.enable(toy, schedule)
    if order == "EA":
        with_adapter(toy, targets)
    assert torch.equal(denoised(toy), expected)
    assert handle.summary().reused == schedule.reused
    handle.disable()
    assert torch.equal(denoised(toy), plain)
