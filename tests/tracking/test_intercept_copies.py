"""Copies and files."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.other_tools import ZOO, CountingHook, denoised, uniform, zoo_model, zoo_sample
from support.toys import Toy, build
from torch import nn

import smoothcache as sc
from smoothcache.tracking.intercept import is_intercepted

diffusers = pytest.importorskip("diffusers")
diffusers_hooks = pytest.importorskip("diffusers.hooks")
group_offloading = pytest.importorskip("diffusers.hooks.group_offloading")
accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("hooked", "toy_name", "copied"),
    [
        ("not", "single", copy.deepcopy),
        ("not", "single", saved_and_loaded),
        ("not", "instance-forward", copy.deepcopy),
        ("not", "instance-forward", saved_and_loaded),
        ("before", "single", copy.deepcopy),
        ("before", "instance-forward", copy.deepcopy),
        ("after", "single", copy.deepcopy),
        pytest.param("after", "instance-forward", copy.deepcopy),
    ],
)
def test_copies_of_an_enabled_model(
    hooked: str, toy_name: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    toy = build(toy_name, depth=2)
    plain = denoised(toy)
    schedule = uniform(toy)
    if hooked == "before":
        accelerate_hooks.add_hook_to_module(toy, CountingHook())
    handle = sc.enable(toy, schedule)
    if hooked == "after":
        accelerate_hooks.add_hook_to_module(toy, CountingHook())
    under_schedule = denoised(toy)
    twin = copied(toy)
    assert [type(module) for module in twin.modules()] == [
        type(module) for module in build(toy_name, depth=2).modules()
    ]
    assert not any(is_intercepted(module) for module in twin.modules())
    assert torch.equal(denoised(twin), plain)
    with sc.cached(twin, schedule) as run:
        assert torch.equal(denoised(twin), under_schedule)
    assert run.summary().reused == schedule.reused
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(denoised(toy), under_schedule)
    assert handle.summary().reused == 2 * schedule.reused
    handle.disable()
    assert torch.equal(denoised(toy), plain)


def test_a_copy_keeps_the_hooks_from_before_and_after() -> None:
    class Doubling:
        def __init__(self, module: nn.Module) -> None:
            self.old = module.forward

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * self.old(*args, **kwargs)

    toy = build("single", depth=2)
    toy.forward = Doubling(toy)  # type: ignore[method-assign]
    handle = sc.enable(toy, uniform(toy))
    toy.forward = Doubling(toy)  # type: ignore[method-assign]
    twin = copy.deepcopy(toy)
    handle.disable()
    assert torch.equal(denoised(twin), denoised(toy))


class LockedToy(Toy):
    """Has something that can neither be copied nor pickled, and says so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_copies_of_a_model_that_says_how_to_copy_it(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    toy = LockedToy(depth=2).eval()
    plain = denoised(toy)
    with sc.cached(toy, uniform(toy)):
        twin = copied(toy)
    assert type(twin) is LockedToy
    assert torch.equal(denoised(twin), plain)


def test_a_model_made_by_the_class_of_an_enabled_one() -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy)
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
        other = type(toy)(depth=2).eval().requires_grad_(False)
    other.load_state_dict(toy.state_dict())
    assert torch.equal(denoised(other), denoised(toy))
    with sc.cached(other, schedule) as run:
        assert torch.equal(denoised(other), under_schedule)
    assert run.summary().reused == schedule.reused


@pytest.mark.filterwarnings("ignore")
def test_weights_are_saved_and_loaded_while_enabled(tmp_path: Path) -> None:
    name = "WanTransformer3DModel"
    model = zoo_model(name)
    schedule = uniform(model)
    plain = zoo_sample(name, model)
    before = copy.deepcopy(model.state_dict())
    with sc.cached(model, schedule) as run:
        under_schedule = zoo_sample(name, model)
        assert list(model.state_dict()) == list(before)
        model.save_pretrained(tmp_path)
        loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path).eval()
        assert torch.equal(zoo_sample(name, loaded), plain)
        torch.manual_seed(1)
        other = ZOO[name].build().state_dict()
        model.load_state_dict(other)
        assert not torch.equal(zoo_sample(name, model), under_schedule)
        model.load_state_dict(before)
        assert torch.equal(zoo_sample(name, model), under_schedule)
    assert run.summary().reused == 3 * schedule.reused


@pytest.mark.filterwarnings("ignore")
def test_a_model_loaded_by_the_class_of_an_enabled_one(tmp_path: Path) -> None:
    name = "WanTransformer3DModel"
    model = zoo_model(name)
    schedule = uniform(model)
    with sc.cached(model, schedule):
        under_schedule = zoo_sample(name, model)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
    with sc.cached(loaded, schedule) as run:
        assert torch.equal(zoo_sample(name, loaded), under_schedule)
    assert run.summary().reused == schedule.reused
