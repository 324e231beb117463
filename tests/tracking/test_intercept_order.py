"""Any order of doing and undoing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.other_tools import (
    CPU,
    ORDERS,
    STEPS,
    CountingHook,
    Put,
    Undo,
    a_layer,
    parametrized,
    play,
    same,
    samples,
    unidentified,
    uniform,
)
from support.toys import Toy, build
from torch import Tensor, nn

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


def the_toy(toy: Toy) -> nn.Module:
    return toy


def a_block(toy: Toy) -> nn.Module:
    return toy.get_submodule("blocks.0")


Where = Callable[[Toy], nn.Module]


def accelerate_hook(where: Where) -> Put:
    def put(toy: Toy) -> Undo:
        module = where(toy)
        accelerate_hooks.add_hook_to_module(module, CountingHook())
        return lambda: accelerate_hooks.remove_hook_from_module(module)

    return put


def accelerate_hooks_everywhere(toy: Toy) -> Undo:
    for module in toy.modules():
        accelerate_hooks.add_hook_to_module(module, CountingHook(), append=True)
    return lambda: accelerate_hooks.remove_hook_from_submodules(toy)


def sequential_offload(toy: Toy) -> Undo:
    accelerate.cpu_offload(toy, CPU)
    assert {parameter.device.type for parameter in toy.parameters()} == {"meta"}
    return lambda: accelerate_hooks.remove_hook_from_submodules(toy)


def offload_with_hook(toy: Toy) -> Undo:
    _, hook = accelerate.cpu_offload_with_hook(toy, CPU)
    return hook.remove  # type: ignore[no-any-return]


def dispatch(toy: Toy) -> Undo:
    accelerate.dispatch_model(toy, {"": "cpu"}, force_hooks=True)

    def undo() -> None:
        accelerate_hooks.remove_hook_from_submodules(toy)
        del toy.hf_device_map

    return undo


class PlainHook(diffusers_hooks.ModelHook):  # type: ignore[misc]
    pass


class ForwardHook(diffusers_hooks.ModelHook):  # type: ignore[misc]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs)


def registry(module: nn.Module) -> Any:
    return diffusers_hooks.HookRegistry.check_if_exists_or_initialize(module)


def diffusers_hook(where: Where, kind: type = PlainHook) -> Put:
    def put(toy: Toy) -> Undo:
        hooks = registry(where(toy))
        hooks.register_hook(kind(), "a hook of a test")
        return lambda: hooks.remove_hook("a hook of a test")

    return put


def group_offload(**options: Any) -> Put:
    def put(toy: Toy) -> Undo:
        diffusers_hooks.apply_group_offloading(toy, CPU, CPU, **options)

        def undo() -> None:
            for module in toy.modules():
                hook = registry(module).get_hook("group_offloading")
                if hook is not None:
                    hook.group.onload_()
            registry(toy).remove_hook("group_offloading", recurse=True)

        for module in toy.modules():
            registry(module)
        return undo

    return put


def own_forward(where: Where, *, delete: bool) -> Put:
    def put(toy: Toy) -> Undo:
        module = where(toy)
        old = module.forward

        @functools.wraps(old)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return old(*args, **kwargs)

        module.forward = forward  # type: ignore[method-assign]

        def undo() -> None:
            if delete:
                del module.forward
            else:
                module.forward = old  # type: ignore[method-assign]

        return undo

    return put


def hooks_of_torch(toy: Toy) -> Undo:
    handles: list[Any] = []
    for module in toy.modules():
        handles += [
            module.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True),
            module.register_forward_hook(lambda *_: None),
            module.register_forward_hook(lambda *_: None, always_call=True),
            module.register_full_backward_hook(lambda *_: None),
            module.register_full_backward_pre_hook(lambda *_: None),
        ]
    return lambda: [handle.remove() for handle in handles]


OTHERS: dict[str, Put] = {
    "accelerate-hook-on-model": accelerate_hook(the_toy),
    "accelerate-hook-on-layer": accelerate_hook(a_layer),
    "accelerate-hooks-everywhere": accelerate_hooks_everywhere,
    "sequential-offload": sequential_offload,
    "offload-with-hook": offload_with_hook,
    "dispatch": dispatch,
    "diffusers-hook-on-model": diffusers_hook(the_toy),
    "diffusers-hook-on-layer": diffusers_hook(a_layer),
    "diffusers-forward-on-model": diffusers_hook(the_toy, ForwardHook),
    "diffusers-forward-on-layer": diffusers_hook(a_layer, ForwardHook),
    "group-offload-of-blocks": group_offload(offload_type="block_level", num_blocks_per_group=1),
    "group-offload-of-leaves": group_offload(offload_type="leaf_level"),
    "own-forward-on-model": own_forward(the_toy, delete=False),
    "own-forward-on-layer": own_forward(a_layer, delete=False),
    "own-forward-deleted": own_forward(a_layer, delete=True),
    "hooks-of-torch": hooks_of_torch,
    "parametrized-inside-a-layer": parametrized("blocks.0.attn.qkv", "weight"),
}


# These put no forward on a module that is intercepted.
@pytest.fixture
def offloaded_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that a group of diffusers has offloaded are NaN, so that using them shows."""

    def tensors(group: Any) -> list[Tensor]:
        inside = [x for m in group.modules for x in (*m.parameters(), *m.buffers())]
        return [*inside, *group.parameters, *group.buffers]

    def offload(group: Any) -> None:
        kept = vars(group).setdefault("kept", {})
        for tensor in tensors(group):
            if tensor not in kept:
                kept[tensor] = tensor.data
                tensor.data = torch.full_like(tensor, torch.nan)

    def onload(group: Any) -> None:
        for tensor in tensors(group):
            tensor.data = group.kept.pop(tensor, tensor.data)

    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", offload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload)


@pytest.mark.usefixtures("offloaded_is_nan")
@pytest.mark.parametrize(
    ("other", "order"),
    [pytest.param(other, order) for other, order in itertools.product(OTHERS, ORDERS)],
)
def test_any_order(other: str, order: str) -> None:
    make = functools.partial(build, "single", depth=2)
    play(order, OTHERS[other], make, unidentified(make()))


@pytest.mark.parametrize(
    ("other", "order"),
    [
        pytest.param(other, order)
        for other, order in itertools.product(
            ("accelerate-hook-on-model", "diffusers-hook-on-layer"), ORDERS
        )
    ],
)
def test_any_order_on_a_model_that_has_a_forward_of_its_own(other: str, order: str) -> None:
    make = functools.partial(build, "instance-forward", depth=2)
    play(order, OTHERS[other], make, uniform(make()))


@pytest.mark.usefixtures("offloaded_is_nan")
@pytest.mark.parametrize("order", ["AEDU", "EADU", "EAUD"])
@pytest.mark.parametrize(
    "other", ["group-offload-of-blocks", "group-offload-of-leaves", "sequential-offload"]
)
def test_offloading_a_model_whose_blocks_are_the_layers(other: str, order: str) -> None:
    make = functools.partial(build, "parallel-block", depth=2)
    play(order, OTHERS[other], make, uniform(make()))


@pytest.mark.parametrize("order", ["AE", "EA"])
@pytest.mark.parametrize("where", [the_toy, a_block, a_layer])
def test_hooks_are_called_as_often_as_what_they_are_on_runs(where: Where, order: str) -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy)
    hook = CountingHook()
    if order == "EA":
        handle = sc.enable(toy, schedule)
    accelerate_hooks.add_hook_to_module(where(toy), hook)
    if order == "AE":
        handle = sc.enable(toy, schedule)
    toy.generate(STEPS)
    computed = sum(schedule.rows["blocks.0.attn"].computed)
    assert hook.calls in ({STEPS, computed} if where is a_layer else {STEPS})
    handle.disable()


@pytest.mark.parametrize("where", [the_toy, a_layer])
def test_a_hook_is_replaced_while_enabled(where: Where) -> None:
    toy = build("single", depth=2)
    accelerate_hooks.add_hook_to_module(where(toy), CountingHook())
    with sc.cached(toy, uniform(toy)) as run:
        accelerate_hooks.add_hook_to_module(where(toy), CountingHook())
        toy.generate(STEPS)
    assert run.summary().reused == uniform(toy).reused


@pytest.mark.parametrize("where", [the_toy, a_layer])
def test_a_hook_is_appended_while_enabled(where: Where) -> None:
    toy = build("single", depth=2)
    accelerate_hooks.add_hook_to_module(where(toy), CountingHook())
    with sc.cached(toy, uniform(toy)) as run:
        accelerate_hooks.add_hook_to_module(where(toy), CountingHook(), append=True)
        toy.generate(STEPS)
    assert run.summary().reused == uniform(toy).reused


@pytest.mark.parametrize("where", [the_toy, a_layer])
@pytest.mark.parametrize("removed", ["first", "second"])
def test_one_of_two_hooks_is_removed(where: Where, removed: str) -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy)
    with sc.cached(toy, schedule):
        under_schedule = samples(toy)
    hooks = registry(where(toy))
    hooks.register_hook(PlainHook(), "first")
    with sc.cached(toy, schedule) as run:
        hooks.register_hook(ForwardHook(), "second")
        hooks.remove_hook(removed)
        assert same(samples(toy), under_schedule)
    assert run.summary().reused == 2 * schedule.reused


def test_offloading_to_disk(tmp_path: Path) -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy)
    with sc.cached(toy, schedule):
        under_schedule = samples(toy)
    places = {name: "cpu" for name, _ in toy.named_children()} | {"blocks": "disk"}
    for order in ("AED", "EAD"):
        model = build("single", depth=2)
        handle = sc.enable(model, schedule) if order == "EAD" else None
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
        assert a_layer(model).get_parameter("qkv.weight").is_meta
        handle = handle or sc.enable(model, schedule)
        assert same(samples(model), under_schedule)
        assert handle.summary().reused == 2 * schedule.reused
        handle.disable()
        assert not is_intercepted(model)


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """Wraps the forward of a model in autocast, until it unwraps it."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("order", ["AEUD", "EAUD", "AEDU", "EADU"])
def test_prepared_by_an_accelerator(order: str, accelerator: Any) -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy)
    plain, under_schedule = {}, {}
    for is_prepared in (False, True):
        if is_prepared:
            accelerator.prepare(toy)
        plain[is_prepared] = samples(toy)
        with sc.cached(toy, schedule):
            under_schedule[is_prepared] = samples(toy)
    toy = build("single", depth=2)
    handle: sc.Run | None = None
    is_prepared = False
    for letter in order:
        if letter in "AU":
            is_prepared = letter == "A"
            if is_prepared:
                accelerator.prepare(toy)
            else:
                accelerator.unwrap_model(toy, keep_fp32_wrapper=False)
        elif letter == "E":
            handle = sc.enable(toy, schedule)
        elif handle is not None:
            handle.disable()
            handle = None
        before = handle.summary().reused if handle else 0
        assert same(samples(toy), (under_schedule if handle else plain)[is_prepared]), letter
        assert not handle or handle.summary().reused - before == 2 * schedule.reused
