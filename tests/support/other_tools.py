"""Models and helpers that several tests of living with others share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.toys import CLASSES, TOKENS, WIDTH, Toy
from torch import Tensor, nn
from torch.nn.utils import parametrize
from zoo import all_models, noise

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")
diffusers_hooks = pytest.importorskip("diffusers.hooks")
group_offloading = pytest.importorskip("diffusers.hooks.group_offloading")
accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")
STEPS = 4
CPU = torch.device("cpu")
Undo = Callable[[], Any]
Put = Callable[[Toy], Undo]


def uniform(model: Any, interval: int = 2, steps: int = STEPS) -> sc.Schedule:
    return sc.Schedule.uniform(model, steps, interval)


def unidentified(model: Any) -> sc.Schedule:
    """A schedule that fits every model with such layers."""
    planned = uniform(model)
    return sc.Schedule(STEPS, planned.rows, planned.layers)


def samples(toy: Toy) -> list[Tensor]:
    return [toy.generate(STEPS, seed=seed) for seed in (0, 1)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def traces(model: nn.Module) -> dict[str, Any]:
    """What a test of removal compares; a forward on the instance may be put back by anyone."""
    return {
        path: (
            type(module),
            sorted(set(vars(module)) - {"forward"}),
            {k: len(v) for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)},
        )
        for path, module in model.named_modules()
    }


# A puts the other thing on the model, U takes it away; E enables, D disables.
ORDERS = (
    "AEDU",
    "AEUD",
    "EADU",
    "EAUD",
    "AEUADU",
    "AEUAUD",
    "EADEUD",
    "EADEDU",
    "AEDEUD",
    "EAUAUD",
    "EAUADU",
)


def is_enabled(order: str) -> bool:
    return order.count("E") > order.count("D")


def play(
    order: str,
    put: Put,
    make: Callable[[], Toy],
    schedule: sc.Schedule,
    *,
    equal: Callable[[list[Tensor], list[Tensor]], bool] = same,
) -> None:
    """Does and undoes in an order; after each step two samples must be as without the other."""
    toy, clean = make(), make()
    plain = samples(clean)
    with sc.cached(clean, schedule):
        under_schedule = samples(clean)
    assert not equal(plain, under_schedule)
    handle: sc.Run | None = None
    undo: Undo = tuple
    undo_clean: Undo = tuple
    for done, letter in enumerate(order, 1):
        if letter == "A":
            undo, undo_clean = put(toy), put(clean)
        elif letter == "U":
            undo(), undo_clean()
        elif letter == "E":
            handle = sc.enable(toy, schedule)
        else:
            assert handle is not None
            handle.disable()
            handle = None
        before = handle.summary().reused if handle else 0
        found = samples(toy)
        assert equal(found, under_schedule if handle else plain), order[:done]
        if handle:
            assert handle.summary().reused - before == 2 * schedule.reused, order[:done]
            assert handle.summary().recomputed == {}
    assert traces(toy) == traces(clean)


def a_layer(toy: Toy) -> nn.Module:
    return toy.get_submodule("blocks.0.attn")


class CountingHook(accelerate_hooks.ModelHook):  # type: ignore[misc]
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


class Unchanged(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


def parametrized(path: str, name: str) -> Put:
    def put(toy: Toy) -> Undo:
        module = toy.get_submodule(path)
        parametrize.register_parametrization(module, name, Unchanged())
        return lambda: parametrize.remove_parametrizations(module, name)

    return put


ZOO = all_models()


def zoo_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = ZOO[name].build().eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # gates and last projections may start at zero
            parameter.normal_(std=0.1)
    return model


def zoo_sample(name: str, model: nn.Module, seed: int = 0, steps: int = STEPS) -> Tensor:
    x = noise(1, *ZOO[name].shape, seed=seed)
    for i in range(steps):
        x = x - ZOO[name].call(model, x, torch.full((1,), 1000 * (1 - i / steps))) / steps
    return x


def denoised(model: Callable[..., Tensor], seed: int = 0, steps: int = STEPS) -> Tensor:
    """What ``Toy.generate`` does, through something that wraps the toy."""
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    y = torch.full((1,), seed % CLASSES)
    for i in range(steps):
        x = x - model(x, torch.full((1,), 1000 * (1 - i / steps)), y) / steps
    return x
