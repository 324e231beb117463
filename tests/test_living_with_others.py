"""Others that alter a model too: hooks, offloading, adapters, compilers, wrappers, in any order."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import build_pipeline
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from toys import CLASSES, TOKENS, WIDTH, Attention, Block, Mlp, ParallelBlock, Toy, build
from zoo import all_models, noise

import smoothcache as sc
from smoothcache._intercept import is_intercepted
from smoothcache.layers import identify

diffusers = pytest.importorskip("diffusers")
diffusers_hooks = pytest.importorskip("diffusers.hooks")
group_offloading = pytest.importorskip("diffusers.hooks.group_offloading")
accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")

STEPS = 4
CPU = torch.device("cpu")
Undo = Callable[[], Any]
Put = Callable[[Toy], Undo]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


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


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


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


# ------------------------------------------------------------------- any order of doing and undoing

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


def the_toy(toy: Toy) -> nn.Module:
    return toy


def a_layer(toy: Toy) -> nn.Module:
    return toy.get_submodule("blocks.0.attn")


def a_block(toy: Toy) -> nn.Module:
    return toy.get_submodule("blocks.0")


Where = Callable[[Toy], nn.Module]


class CountingHook(accelerate_hooks.ModelHook):  # type: ignore[misc]
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


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


class Unchanged(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


def parametrized(path: str, name: str) -> Put:
    def put(toy: Toy) -> Undo:
        module = toy.get_submodule(path)
        parametrize.register_parametrization(module, name, Unchanged())
        return lambda: parametrize.remove_parametrizations(module, name)

    return put


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


# ---------------------------------------------------------------------------------- whole pipelines


def run_pipe(pipe: Any, seed: int = 0) -> Tensor:
    images = pipe(
        class_labels=[1],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return torch.as_tensor(images)


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload_of_pipe(pipe: Any) -> None:
    diffusers_hooks.apply_group_offloading(pipe.transformer, CPU, CPU, offload_type="leaf_level")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("offload", "order"),
    [
        pytest.param(model_offload, "AE"),
        (model_offload, "EA"),
        (group_offload_of_pipe, "AE"),
        (group_offload_of_pipe, "EA"),
    ],
)
def test_a_pipeline_with_offloading(offload: Callable[[Any], None], order: str) -> None:
    pipe = build_pipeline()
    schedule = uniform(pipe)
    plain = [run_pipe(pipe, seed) for seed in (0, 1, 2)]
    with sc.cached(pipe, schedule):
        under_schedule = [run_pipe(pipe, seed) for seed in (0, 1, 2)]
    handle = sc.enable(pipe, schedule) if order == "EA" else None
    offload(pipe)
    handle = handle or sc.enable(pipe, schedule)
    assert same([run_pipe(pipe, seed) for seed in (0, 1, 2)], under_schedule)
    assert handle.summary().reused == 3 * schedule.reused
    handle.disable()
    assert same([run_pipe(pipe, seed) for seed in (0, 1, 2)], plain)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_that_ends_its_offloading_while_enabled() -> None:
    pipe = build_pipeline()
    schedule = uniform(pipe)
    with sc.cached(pipe, schedule):
        under_schedule = run_pipe(pipe)
    model_offload(pipe)
    with sc.cached(pipe, schedule) as run:
        pipe.remove_all_hooks()
        assert torch.equal(run_pipe(pipe), under_schedule)
    assert run.summary().reused == schedule.reused


def test_a_pipeline_moved_and_cast_between_generations() -> None:
    pipe = build_pipeline()
    schedule = uniform(pipe)
    expected = []
    for dtype in (torch.float32, torch.bfloat16):
        with sc.cached(pipe.to(dtype), schedule):
            expected.append(run_pipe(pipe))
    pipe = build_pipeline()
    with sc.cached(pipe, schedule) as run:
        found = [run_pipe(pipe.to("cpu")), run_pipe(pipe.to(torch.bfloat16))]
    assert same(found, expected)
    assert run.summary().reused == 2 * schedule.reused


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_is_saved_and_loaded_while_enabled(tmp_path: Path) -> None:
    pipe = build_pipeline()
    plain = run_pipe(pipe)
    with sc.cached(pipe, uniform(pipe)) as run:
        under_schedule = run_pipe(pipe)
        pipe.save_pretrained(tmp_path)
        loaded = type(pipe).from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert not is_intercepted(loaded.transformer)
        assert type(loaded.transformer) is diffusers.DiTTransformer2DModel
        assert torch.equal(run_pipe(loaded), plain)
        assert torch.equal(run_pipe(pipe), under_schedule)
    assert run.summary().finished == 2
    assert identify(loaded) == identify(pipe)


# --------------------------------------------------------------------------- real models of the zoo

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


# ------------------------------------------------------------------------------ caches of diffusers


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


# ----------------------------------------------------------------------------------------- adapters


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


def denoised(model: Callable[..., Tensor], seed: int = 0, steps: int = STEPS) -> Tensor:
    """What ``Toy.generate`` does, through something that wraps the toy."""
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    y = torch.full((1,), seed % CLASSES)
    for i in range(steps):
        x = x - model(x, torch.full((1,), 1000 * (1 - i / steps)), y) / steps
    return x


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


# ------------------------------------------------------------------------------ precision and modes


class CastingToy(Toy):
    """Runs in the precision of its weights, and in single precision outside."""

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        hidden = self.t_embedder((t[:, None] / 1000).to(self.head.weight.dtype))
        return hidden + self.y_embedder(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x.to(self.head.weight.dtype), t, y).to(x.dtype)


def casting_toy() -> Toy:
    torch.manual_seed(0)
    return CastingToy(depth=2).eval().requires_grad_(False)


def test_casting_between_generations() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    toy = casting_toy()
    schedule = uniform(toy)
    expected = []
    for dtype in dtypes:
        with sc.cached(toy.to(dtype), schedule):
            expected.append(toy.generate(STEPS))
    toy = casting_toy()
    with sc.cached(toy, schedule) as run:
        found = [toy.to(dtype).generate(STEPS) for dtype in dtypes]
    assert same(found, expected)
    assert run.summary().reused == len(dtypes) * schedule.reused
    assert run.summary().recomputed == {}
    assert toy.half().generate(STEPS).dtype == torch.float32


def test_casting_in_the_middle_of_a_generation_computes_anew() -> None:
    toy = casting_toy()
    y = torch.zeros(1, dtype=torch.long)
    with sc.cached(toy, uniform(toy)) as run:
        for i in range(STEPS):
            dtype = torch.bfloat16 if i else torch.float32
            toy.to(dtype)(torch.zeros(1, TOKENS, WIDTH, dtype=dtype), torch.tensor([900.0 - i]), y)
    assert run.summary().reused == uniform(toy).reused // 2
    assert sum(run.summary().recomputed.values()) == uniform(toy).reused // 2


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
    "enabled": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "nothing": nullcontext,
}


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(dtype)
    return stack


def in_mode(mode: str, toy: Toy) -> Tensor:
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).float()
    with MODES[mode]():
        for i in range(STEPS):
            t = torch.full((1,), 1000 * (1 - i / STEPS), dtype=torch.float32)
            x = x - toy.denoise(x, t, torch.zeros(1, dtype=torch.long)) / STEPS
    return x.clone()


@pytest.mark.parametrize("toy_name", ["single", "dual", "in-place", "parallel-block"])
def test_modes_change_between_generations(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    schedule = uniform(toy)
    modes = [*MODES, *reversed(MODES), "no-grad", "autocast", "inference"]
    plain = {mode: in_mode(mode, toy) for mode in MODES}
    expected = {}
    for mode in MODES:
        with sc.cached(toy, uniform(toy, 1)):
            assert torch.equal(in_mode(mode, toy), plain[mode])
        with sc.cached(toy, schedule):
            expected[mode] = in_mode(mode, toy)
            assert not torch.equal(expected[mode], plain[mode])
    with sc.cached(toy, schedule) as run:
        for mode in modes:
            assert torch.equal(in_mode(mode, toy), expected[mode]), mode
    assert run.summary().reused % (len(modes) * schedule.reused) == 0
    assert run.summary().reused > 0 and run.summary().recomputed == {}


@pytest.mark.parametrize(
    "toy_name",
    [
        "single",
        "in-place",
        "parallel-block",
    ],
)
def test_values_of_inference_mode_serve_outside_of_it(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    schedule = uniform(toy)
    with sc.cached(toy, schedule):
        expected = denoised(toy)
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(1, dtype=torch.long)
    with sc.cached(toy, schedule) as run:
        for i in range(STEPS):
            with torch.inference_mode() if i % 2 == 0 else torch.no_grad():
                x = x - toy(x, torch.full((1,), 1000 * (1 - i / STEPS)), y) / STEPS
    assert torch.equal(x, expected)
    assert run.summary().reused == schedule.reused


class PreciseBlock(ParallelBlock):
    """Adds nothing, in single precision, whatever it is given."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x.float() + 0 * super().forward(x, c)


class PreciseToy(Toy):
    block = PreciseBlock


def test_autocast_in_a_block_that_is_a_layer() -> None:
    torch.manual_seed(0)
    toy = PreciseToy(depth=2).eval().requires_grad_(False)
    schedule = uniform(toy)
    assert {layer.kind for layer in schedule.layers or ()} == {"block"}
    with torch.autocast("cpu", torch.bfloat16):
        plain = denoised(toy)
        with sc.cached(toy, schedule) as run:
            assert torch.equal(denoised(toy), plain)
    assert run.summary().reused == schedule.reused


def test_channels_last() -> None:
    name = "SanaTransformer2DModel"
    model = zoo_model(name)
    schedule = uniform(model)
    with sc.cached(model, schedule):
        expected = zoo_sample(name, model)
    with sc.cached(model, schedule) as run:
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(zoo_sample(name, model), expected)
    assert run.summary().reused == schedule.reused


# --------------------------------------------------------------------------------- copies and files


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


# ------------------------------------------------------------------------------------ torch.compile


def compiled(toy: Toy, how: str, backend: str, fullgraph: bool) -> Any:
    if how == "wrapped":
        return torch.compile(toy, backend=backend, fullgraph=fullgraph)
    for module in [toy] if how == "in place" else toy.get_submodule("blocks").children():
        module.compile(backend=backend, fullgraph=fullgraph)
    return toy


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """Compiles from the beginning, and says nothing."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch._dynamo
    logger.setLevel(level)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("how", "order", "backend"),
    [
        ("wrapped", "AE", "eager"),
        ("in place", "EA", "eager"),
        ("blocks", "AE", "aot_eager"),
        ("blocks", "EA", "eager"),
    ],
)
def test_compiled_toys(how: str, order: str, backend: str, dynamo: Any) -> None:
    toy = build("single", depth=1)
    schedule = uniform(toy)
    plain = denoised(toy)
    with sc.cached(toy, schedule):
        under_schedule = [denoised(toy, seed) for seed in (0, 1)]
    handle = sc.enable(toy, schedule) if order == "EA" else None
    model = compiled(toy, how, backend, fullgraph=False)
    handle = handle or sc.enable(model, schedule)
    found = [denoised(model, seed) for seed in (0, 1)]
    assert handle.summary().reused == 2 * schedule.reused
    handle.disable()
    found.append(denoised(model))
    for a, b in zip(found, [*under_schedule, plain], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if backend == "eager" else 1e-5)
    assert dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("how", ["in place", "blocks"])
def test_twenty_steps_are_not_compiled_one_by_one(how: str, dynamo: Any) -> None:
    toy = build("single", depth=1)
    schedule = uniform(toy, steps=20)
    model = compiled(toy, how, "eager", fullgraph=False)
    with (
        dynamo.config.patch(fail_on_recompile_limit_hit=True),
        sc.cached(model, schedule) as run,
    ):
        denoised(model, steps=20)
    assert run.summary().reused == schedule.reused


@pytest.mark.parametrize("how", ["wrapped", "blocks"])
def test_one_graph_is_right_or_refused(how: str, dynamo: Any) -> None:
    toy = build("single", depth=1)
    schedule = uniform(toy)
    plain = denoised(toy)
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
    model = compiled(toy, how, "eager", fullgraph=True)
    assert torch.equal(denoised(model), plain)
    handle = sc.enable(model, schedule)
    try:
        assert torch.equal(denoised(model), under_schedule)
        assert handle.summary().reused == schedule.reused
    except dynamo.exc.Unsupported:
        assert handle.summary().reused == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle.disable()
    assert torch.equal(denoised(model), plain)


def test_repeated_blocks_of_diffusers(dynamo: Any) -> None:
    name = "WanTransformer3DModel"
    model = zoo_model(name)
    schedule = uniform(model)
    plain = zoo_sample(name, model)
    with sc.cached(model, schedule):
        under_schedule = [zoo_sample(name, model, seed) for seed in (0, 1)]
    handle = sc.enable(model, schedule)
    model.compile_repeated_blocks(backend="eager")
    assert same([zoo_sample(name, model, seed) for seed in (0, 1)], under_schedule)
    assert handle.summary().reused == 2 * schedule.reused
    handle.disable()
    assert torch.equal(zoo_sample(name, model), plain)


# ----------------------------------------------------------------------------------------- wrappers


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("order", ["AE", "EA"])
@pytest.mark.parametrize("wrapper", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_data_parallel(wrapper: Callable[[nn.Module], nn.Module], order: str) -> None:
    toy = build("single", depth=2).requires_grad_(True)
    schedule = uniform(toy)
    plain = denoised(toy)
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
    handle = sc.enable(toy, schedule) if order == "EA" else None
    model = wrapper(toy)
    handle = handle or sc.enable(model, schedule)
    assert torch.equal(denoised(model), under_schedule)
    assert handle.summary().reused == schedule.reused
    assert torch.equal(denoised(copy.deepcopy(model)), plain)
    handle.disable()
    assert torch.equal(denoised(model), plain)
    assert [layer.path for layer in sc.find_layers(model)] == list(schedule.rows)


def sharded(toy: Toy, layers: bool) -> Toy:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    fully_shard = functools.partial(
        fsdp.fully_shard, mesh=torch.distributed.init_device_mesh("cpu", (1,))
    )
    for block in toy.get_submodule("blocks").children():
        if layers:
            fully_shard(block.attn)
            fully_shard(block.mlp)
        fully_shard(block)
    fully_shard(toy)
    return toy


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("order", ["AE", "EA"])
def test_fully_sharded(order: str, layers: bool) -> None:
    toy = build("single", depth=2)
    schedule = unidentified(toy)
    plain = denoised(toy)
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
    if order == "AE":
        sharded(toy, layers)
    handle = sc.enable(toy, schedule)
    if order == "EA":
        sharded(toy, layers)
    assert torch.equal(denoised(toy), under_schedule)
    assert handle.summary().reused == schedule.reused
    handle.disable()
    assert torch.equal(denoised(toy), plain)


@pytest.mark.usefixtures("alone")
def test_a_fully_sharded_model_is_the_same_model() -> None:
    toy = build("single", depth=2)
    before = identify(toy)
    assert identify(sharded(toy, layers=False)) == before


@pytest.mark.usefixtures("alone")
def test_sharded_while_enabled_and_enabled_again() -> None:
    toy = build("single", depth=2)
    schedule = unidentified(toy)
    with sc.cached(toy, schedule):
        under_schedule = denoised(sharded(toy, layers=True))
    with sc.cached(toy, schedule) as run:
        assert torch.equal(denoised(toy), under_schedule)
    assert run.summary().reused == schedule.reused


# ---------------------------------------------------------- others that change the class of a layer


class RawMlp(Mlp):
    """A layer with a weight of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class RawBlock(Block):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.mlp = RawMlp(dim)


class RawToy(Toy):
    block = RawBlock


def raw_toy() -> Toy:
    torch.manual_seed(0)
    return RawToy(depth=2).eval().requires_grad_(False)


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_that_is_parametrized_itself(order: str) -> None:
    play(order, parametrized("blocks.0.mlp", "scale"), raw_toy, unidentified(raw_toy()))


@pytest.mark.parametrize("first", [0, 1])
def test_a_parametrized_layer_and_its_copy_share_a_class_but_no_schedule(first: int) -> None:
    toy = raw_toy()
    plain, schedule = denoised(toy), unidentified(toy)
    undo = parametrized("blocks.0.mlp", "scale")(toy)
    toys = [toy, copy.deepcopy(toy)]
    before = type(toys[0].blocks[0].mlp)
    assert type(toys[1].blocks[0].mlp) is before and before.__bases__ == (RawMlp,)
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
        third = copy.deepcopy(toy)
        assert torch.equal(denoised(third), plain)
    handles = [sc.enable(x, schedule) for x in toys]
    handles[first].disable()
    assert torch.equal(denoised(toys[first]), plain)
    assert torch.equal(denoised(toys[1 - first]), under_schedule)
    assert handles[1 - first].summary().reused == schedule.reused
    handles[1 - first].disable()
    assert torch.equal(denoised(toys[1 - first]), plain)
    assert before.__bases__ == (RawMlp,)
    undo()
    assert type(toy.blocks[0].mlp) is RawMlp


def test_a_layer_parametrized_while_enabled_can_be_enabled_again() -> None:
    toy = raw_toy()
    schedule = unidentified(toy)
    undo: Undo = tuple
    with sc.cached(toy, schedule):
        under_schedule = denoised(toy)
        undo = parametrized("blocks.0.mlp", "scale")(toy)
    for _ in range(2):
        with sc.cached(toy, schedule) as run:
            assert torch.equal(denoised(toy), under_schedule)
        assert run.summary().reused == schedule.reused
        undo()
        undo = tuple


@pytest.mark.parametrize("order", ["AEDU", "AEUD", "EADU", "EAUD"])
def test_weight_norm(order: str) -> None:
    def put(toy: Toy) -> Undo:
        module = toy.get_submodule("blocks.0.attn.proj")
        parametrizations.weight_norm(module)
        return lambda: parametrize.remove_parametrizations(module, "weight")

    make = functools.partial(build, "single", depth=2)
    play(order, put, make, unidentified(make()), equal=close)


def test_a_parametrized_model_is_the_same_model() -> None:
    toy = build("single", depth=2)
    before = identify(toy)
    parametrizations.weight_norm(toy.get_submodule("blocks.0.attn.proj"))
    assert identify(toy) == before


def test_a_layer_that_is_exchanged_while_enabled_is_reported() -> None:
    toy = build("single", depth=2)
    schedule = uniform(toy)
    handle = sc.enable(toy, schedule)
    old = a_layer(toy)
    toy.get_submodule("blocks.0").attn = Attention(WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        denoised(toy)
    assert handle.summary().never_ran == ("blocks.0.attn",)
    handle.disable()
    assert type(old) is Attention and not is_intercepted(old)


def test_a_layer_that_is_exchanged_between_generations_is_reported() -> None:
    toy = build("single", depth=2)
    handle = sc.enable(toy, uniform(toy))
    denoised(toy)
    toy.get_submodule("blocks.0").attn = Attention(WIDTH)
    with pytest.warns(sc.SmoothCacheWarning, match=r"blocks\.0\.attn"):
        denoised(toy)
    handle.disable()


# --------------------------------------------------------------------------- gradient checkpointing


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
