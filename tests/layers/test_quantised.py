"""Quantised models."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.reference import ByHand, same, sample
from support.toys import build
from support.traces import unaltered
from support.unusual_models import every_toy, uniform
from torch import Tensor, nn
from zoo import all_models

import smoothcache as sc
from smoothcache.layers.modules import identify


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Packed(nn.Module):
    """A matrix of which only 4 bits a weight are kept, two in a byte."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.abs().max()) / 7
        levels = (linear.weight / self.scale).round().clamp(-8, 7).add(8).to(torch.uint8).flatten()
        self.weight = nn.Parameter(16 * levels[::2] + levels[1::2], requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.stack([self.weight // 16, self.weight % 16], dim=-1)
        weight = (levels.to(x.dtype) - 8).reshape(self.out_features, self.in_features) * self.scale
        return nn.functional.linear(x, weight, self.bias)


class Hidden(nn.Module):
    """A matrix whose weights are nowhere to be seen, as behind a kernel's own handle."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        object.__setattr__(self, "_handle", [linear])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._handle[0](x)
        return out


class Adapted(nn.Module):
    """A matrix with a correction of low rank beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, linear.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return out


def replaced(model: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(path, kind(module))
    return model.eval().requires_grad_(False)


def quantised(model: nn.Module) -> nn.Module:
    quantise = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantise is None:
        pytest.skip("this PyTorch has no quantize_dynamic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantise(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]


QUANTISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "dynamic": quantised,
    "packed": functools.partial(replaced, kind=Packed),
    "hidden": functools.partial(replaced, kind=Hidden),
}
every_quantisation = pytest.mark.parametrize("how", QUANTISED)


@every_toy
@every_quantisation
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_models_have_the_same_layers(toy_name: str, how: str) -> None:
    toy, quantised = build(toy_name, depth=2), QUANTISED[how](build(toy_name, depth=2))
    for granularity in ("auto", "layer", "block"):
        found = sc.find_layers(quantised, granularity=granularity)  # type: ignore[arg-type]
        assert found == sc.find_layers(toy, granularity=granularity)  # type: ignore[arg-type]
    plain = sample(quantised)  # type: ignore[arg-type]
    schedule = uniform(quantised, 3)
    with unaltered(quantised):
        with sc.cached(quantised, uniform(quantised, 1)):
            assert same(sample(quantised), plain)  # type: ignore[arg-type]
        with sc.cached(quantised, schedule) as run:
            got = sample(quantised)  # type: ignore[arg-type]
    assert torch.equal(got[0], plain[0]) and not same(got, plain)
    assert run.summary().reused >= schedule.reused
    assert run.summary().recomputed == {}


QUANTISED_ARCHITECTURES = (
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "LatteTransformer3DModel",
    "StableAudioDiTModel",
)


@pytest.mark.parametrize("name", QUANTISED_ARCHITECTURES)
@every_quantisation
@pytest.mark.filterwarnings("ignore")
def test_quantised_architectures_have_the_same_layers(name: str, how: str) -> None:
    model = all_models()[name].build()
    expected, identity = sc.find_layers(model), identify(model)
    quantised = QUANTISED[how](model)
    assert sc.find_layers(quantised) == expected
    assert identify(quantised) == identity


@pytest.mark.parametrize("toy_name", ["single", "dual", "in-place"])
def test_adapters_beside_the_matrices_change_no_kind(toy_name: str) -> None:
    """As PEFT puts them into a model, and so diffusers when it loads a LoRA."""
    adapted = replaced(build(toy_name, depth=1), Adapted)
    assert sc.find_layers(adapted) == sc.find_layers(build(toy_name, depth=1))


@pytest.mark.parametrize("toy_name", ["single", "dual", "in-place"])
def test_a_schedule_runs_with_adapters_that_came_later(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    schedule = replace(uniform(toy, 3), model=None)
    adapted: Any = replaced(build(toy_name, depth=2), Adapted)
    by_hand = ByHand(adapted, schedule)
    with unaltered(adapted), sc.cached(adapted, schedule) as run:
        assert same(sample(adapted), sample(by_hand.toy, begin=by_hand.begin))
    assert run.summary().reused == schedule.reused
