"""Wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.reference import STEPS, sample, times
from support.toys import TOKENS, WIDTH, build
from support.traces import unaltered
from support.unusual_models import calibrated, paths, refused, uniform
from torch import nn

import smoothcache as sc
from smoothcache.layers.modules import identify


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Distributed(nn.parallel.DistributedDataParallel):
    """As seen from outside; it needs no process group."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class WithAdapters(nn.Module):
    """What PEFT makes of a model, as seen from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = module
        self.peft_config = {"default": SimpleNamespace(r=8)}

    def get_base_model(self) -> nn.Module:
        inner: nn.Module = self.base_model.model
        return inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "data parallel": nn.DataParallel,
    "compiled": compiled,
    "distributed": Distributed,
    "adapters": WithAdapters,
    "distributed, of adapters": lambda module: Distributed(WithAdapters(module)),
    "adapters, of compiled": lambda module: WithAdapters(compiled(module)),
    "data parallel, of distributed": lambda module: nn.DataParallel(Distributed(module)),
}


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrappers_are_looked_through(how: str) -> None:
    toy = build("single", depth=1)
    schedule = uniform(toy, 3)
    with sc.cached(toy, schedule):
        expected = sample(toy)
    torch.compiler.reset()
    wrapped = WRAPPERS[how](toy)
    keys = list(wrapped.state_dict())
    assert sc.find_layers(wrapped) == sc.find_layers(toy)
    assert identify(wrapped) == identify(toy)
    assert uniform(wrapped, 3) == schedule
    if "compiled" in how:
        return  # it takes long, and is run in test_apply.py
    caller: Any = SimpleNamespace(denoise=lambda x, t, y: wrapped(x, t, y))
    with unaltered(toy), sc.cached(wrapped, schedule) as run:
        assert list(wrapped.state_dict()) == keys
        torch.testing.assert_close(sample(caller), expected)
    assert run.summary().reused == schedule.reused
    assert run.summary().recomputed == {}


def test_a_base_model_that_is_no_module_is_not_looked_into() -> None:
    toy = build("single", depth=1)
    toy.peft_config = {}
    assert paths(sc.find_layers(toy)) == ["blocks.0.attn", "blocks.0.mlp"]
    toy.get_base_model = lambda: None
    assert paths(sc.find_layers(toy)) == ["blocks.0.attn", "blocks.0.mlp"]


class ManyDevices(nn.DataParallel):
    """As on a machine with two accelerators."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.device_ids = [0, 1]


@pytest.mark.parametrize("where", ["alone", "in a pipeline", "in a wrapper"])
def test_several_devices_in_one_process_are_refused(where: str) -> None:
    wrapped = ManyDevices(build("single", depth=1))
    model: Any = wrapped
    if where == "in a pipeline":
        model = SimpleNamespace(components={"transformer": wrapped})
    elif where == "in a wrapper":
        model = WithAdapters(wrapped)
    schedule = uniform(wrapped.module)
    ran: list[int] = []
    for attempt in (
        lambda: sc.find_layers(model),
        lambda: identify(model),
        lambda: sc.Schedule.uniform(model, STEPS, 2),
        lambda: sc.enable(model, schedule),
        lambda: sc.observe_layers(model, ran.append),
        lambda: calibrated(model, ran.append),
    ):
        words = r"DataParallel copies.*one process per device \(torchrun\)"
        with refused(wrapped, sc.InvalidArgumentError, words):
            attempt()
    assert ran == []
    wrapped.device_ids = [0]
    assert sc.find_layers(model) == sc.find_layers(wrapped.module)


class AnyArguments(nn.Module):
    """Hands on whatever it is given, as home-made wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def in_order(names: Sequence[str]) -> tuple[sc.Run, sc.Schedule]:
    wrapped = AnyArguments(build("keyword", depth=2))
    schedule = uniform(wrapped)
    x = torch.ones(1, TOKENS, WIDTH)
    with sc.cached(wrapped, schedule) as run:
        for time in times():
            given = {
                "hidden_states": x,
                "timestep": torch.tensor([time]),
                "class_labels": torch.tensor([1]),
            }
            wrapped(**{name: given[name] for name in names})
    return run, schedule


def test_a_wrapper_that_names_no_argument() -> None:
    run, schedule = in_order(["hidden_states", "timestep", "class_labels"])
    assert run.summary().reused == schedule.reused
    assert run.schedule.layers[0].path == "module.blocks.0.attn"


def test_a_wrapper_that_names_no_argument_in_any_order() -> None:
    run, schedule = in_order(["class_labels", "hidden_states", "timestep"])
    assert run.summary().reused == schedule.reused
