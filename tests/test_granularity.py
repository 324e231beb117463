"""Layers, blocks and whole models as what is reused, and generations that begin or change hands
in the middle."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from reference import (
    STEPS,
    Liveness,
    levels,
    places_of,
    polynomial_weights,
    same,
    sample,
    times,
    watched_layers,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from toys import TOYS, WIDTH, Attention, Block, Mlp, Toy, build
from zoo import all_models

import smoothcache as sc
from smoothcache.costs import MacCounter
from smoothcache.layers import identify

NOTHING_KEPT = "no value had been computed for this call"

every_toy = pytest.mark.parametrize("toy_name", TOYS)
coarse = pytest.mark.parametrize("granularity", ["block", "model"])
every_granularity = pytest.mark.parametrize("granularity", ["auto", "layer", "block", "model"])
predictors = pytest.mark.parametrize("predictor", ["hold", "taylor"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


def uniform(model: Any, granularity: Any, interval: int = 2, predictor: str = "hold") -> Any:
    return sc.Schedule.uniform(
        model,
        STEPS,
        interval,
        predictor=predictor,
        granularity=granularity,
        noise_levels=levels(),
    )


def paths(layers: Sequence[sc.CacheLayer]) -> list[str]:
    return [layer.path for layer in layers]


def steps(pattern: str) -> tuple[bool, ...]:
    """A row from text: # is a computed step, a dot a reused one."""
    return tuple(mark == "#" for mark in pattern)


class Reference:
    """A copy of a toy under a schedule of layers, blocks and models, told its steps by the test.

    Attributes:
        toy: The copy.
        computed: Layer calls that ran as planned.
        reused: Layer calls answered with a held output.
        recomputed: Layer calls that had nothing to reuse from the last step that was to compute.
    """

    def __init__(self, toy: Toy, schedule: sc.Schedule) -> None:
        self.toy = copy.deepcopy(toy)
        self.computed = self.reused = self.recomputed = 0
        self._schedule = schedule
        self._held: dict[tuple[str, int, int], list[tuple[int, list[Any], Any]]] = {}
        for layer in schedule.layers or ():
            module = self.toy.get_submodule(layer.path)
            row = schedule.rows[layer.path]
            module.forward = self._replacement(layer, row, module.forward)

    def begin(self, step: int, branch: int) -> None:
        self._step, self._branch = step, branch
        self._uses: dict[str, int] = {}

    def forget(self) -> None:
        self._held.clear()

    def _replacement(
        self, layer: sc.CacheLayer, row: sc.Row, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        order = sc.PREDICTORS[row.predictor].order
        places = places_of(row.predictor, self._schedule)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            use = self._uses[layer.path] = self._uses.get(layer.path, -1) + 1
            history = self._held.setdefault((layer.path, self._branch, use), [])
            streams = [x.clone() for x in pytree.tree_leaves((args, kwargs)) if _is_stream(x)]
            due = max(step for step in range(self._step + 1) if row.computed[step])
            if row.computed[self._step] or not history or history[-1][0] < due:
                self.computed += row.computed[self._step]
                self.recomputed += not row.computed[self._step]
                output = forward(*args, **kwargs)
                leaves, spec = pytree.tree_flatten(output)
                kept = [leaf.clone() - _base(layer, leaf, streams) for leaf in leaves]
                history.append((self._step, kept, spec))
                return output
            self.reused += 1
            known = history[-order - 1 :]
            weights = polynomial_weights([places[s] for s, _, _ in known], places[self._step])
            values = [
                sum(weight * leaf for weight, leaf in zip(weights, leaves, strict=True))
                for leaves in zip(*(leaves for _, leaves, _ in known), strict=True)
            ]
            leaves = [value + _base(layer, value, streams) for value in values]
            return pytree.tree_unflatten(leaves, known[-1][2])

        return replacement


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _base(layer: sc.CacheLayer, leaf: Any, streams: Sequence[Tensor]) -> Any:
    """What a block's output continues; nothing for any other layer."""
    if not layer.kind.endswith("block"):
        return 0
    return next(stream for stream in streams if stream.shape == leaf.shape)


def run_reference(toy: Toy, schedule: sc.Schedule, **options: Any) -> tuple[Any, Reference]:
    by_hand = Reference(toy, schedule)
    return sample(by_hand.toy, begin=by_hand.begin, **options), by_hand


def assert_agree(schedule: sc.Schedule, got: Any, expected: Any) -> None:
    """Bit for bit, but for the sum of an extrapolation, which may be rounded another way."""
    if all(row.predictor == "hold" for row in schedule.rows.values()):
        assert same(got, expected)
    else:
        torch.testing.assert_close(got, expected)


# ---------------------------------------------------------------------------- what is found


@every_toy
def test_blocks_and_models_are_found(toy: Toy) -> None:
    blocks = [sc.CacheLayer(f"blocks.{i}", "block", f"blocks.{i}") for i in range(2)]
    assert sc.find_layers(toy, granularity="block") == blocks
    assert sc.find_layers(toy, granularity="model") == [sc.CacheLayer("", "model", "")]
    assert sc.find_layers(toy) == sc.find_layers(toy, granularity="auto")
    parts = sc.find_layers(toy, granularity="layer")
    assert all(path.count(".") == 2 for path in paths(parts))


@every_toy
def test_auto_takes_the_layers_that_hold_the_weights(toy: Toy, toy_name: str) -> None:
    as_found = "block" if toy_name == "parallel-block" else "layer"
    assert sc.find_layers(toy) == sc.find_layers(toy, granularity=as_found)


@pytest.mark.parametrize("granularity", ["blok", "", None, 3, "Block", True])
def test_an_unknown_granularity_is_refused(granularity: Any) -> None:
    toy = build("single", depth=1)
    words = r"granularity must be one of auto, layer, block, model, got"
    for attempt in (
        lambda: sc.find_layers(toy, granularity=granularity),
        lambda: sc.observe_layers(toy, lambda i: sample(toy), granularity=granularity),
        lambda: sc.Schedule.uniform(toy, STEPS, 2, granularity=granularity),
        lambda: sc.calibrate(toy, lambda i: sample(toy), granularity=granularity),
    ):
        with pytest.raises(sc.InvalidArgumentError, match=words):
            attempt()
    assert type(toy) is Toy


def test_a_model_without_layers_of_its_own_is_pointed_to_blocks() -> None:
    class Raw(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.norm, self.inner, self.outer = (nn.Linear(dim, dim) for _ in range(3))

    model = nn.Module()
    model.blocks = nn.ModuleList(Raw(WIDTH) for _ in range(2))
    with pytest.raises(sc.LayersNotFoundError, match='granularity "block" or "auto"'):
        sc.find_layers(model, granularity="layer")
    assert paths(sc.find_layers(model)) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("block", ["transformer.blocks.0", "transformer_2.blocks.0"]),
        ("model", ["transformer", "transformer_2"]),
    ],
)
def test_two_denoisers(granularity: Any, expected: list[str]) -> None:
    pipe = Pipe(transformer=build("single", depth=1), transformer_2=build("dual", depth=1))
    layers = sc.find_layers(pipe, granularity=granularity)
    assert paths(layers) == expected
    assert {layer.kind for layer in layers} == {granularity}
    assert [layer.block for layer in layers] == expected


REFINERS = ["context_refiner", "token_refiner", "text_fusion", "txt_blocks", "text_blocks"]


@pytest.mark.parametrize("name", REFINERS)
def test_kinds_of_blocks_that_see_only_the_prompt(name: str) -> None:
    toy = build("single", depth=1)
    toy.add_module(name, nn.ModuleList(Block(WIDTH) for _ in range(2)))
    kinds = {x.path: x.kind for x in sc.find_layers(toy)}
    assert kinds["blocks.0.attn"] == "self_attn"
    assert kinds[f"{name}.1.attn"] == "refiner_self_attn"
    assert kinds[f"{name}.1.mlp"] == "refiner_ffn"
    kinds = {x.path: x.kind for x in sc.find_layers(toy, granularity="block")}
    assert kinds == {
        "blocks.0": "block",
        f"{name}.0": "refiner_block",
        f"{name}.1": "refiner_block",
    }


@pytest.mark.parametrize("name", [name for name, tiny in all_models().items() if tiny.refiners])
@pytest.mark.parametrize("granularity", ["auto", "block"])
@pytest.mark.filterwarnings("ignore")
def test_kinds_of_refiners_in_real_architectures(name: str, granularity: Any) -> None:
    tiny = all_models()[name]
    for layer in sc.find_layers(tiny.build(), granularity=granularity):
        refines = layer.block.startswith(tuple(f"{path}." for path in tiny.refiners))
        assert layer.kind.startswith("refiner_") == refines, layer


def test_the_residual_of_a_refiner_block_is_what_is_reused() -> None:
    class Refined(Toy):
        def __init__(self, depth: int = 1) -> None:
            super().__init__(depth)
            self.context_refiner = nn.ModuleList([Block(WIDTH)])

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(self.context_refiner[0](x, self.condition(t, y)), t, y)

    torch.manual_seed(0)
    toy = Refined().eval()
    schedule = uniform(toy, "block", 3)
    assert [x.kind for x in schedule.layers] == ["block", "refiner_block"]
    expected, by_hand = run_reference(toy, schedule)
    with sc.cached(toy, schedule) as run:
        assert same(sample(toy), expected)
    assert run.summary().reused == by_hand.reused == schedule.reused


def test_blocks_of_spatial_and_temporal_stacks() -> None:
    toy = build("single", depth=1)
    toy.temporal_blocks = nn.ModuleList([Block(WIDTH)])
    kinds = {x.path: x.kind for x in sc.find_layers(toy, granularity="block")}
    assert kinds == {"blocks.0": "spatial_block", "temporal_blocks.0": "temporal_block"}


# ------------------------------------------------------------------------ chosen by the caller


def test_select_sees_every_module_but_the_model_itself() -> None:
    toy = build("single", depth=1)
    seen: dict[str, nn.Module] = {}
    sc.find_layers(toy, select=lambda path, module: seen.setdefault(path, module) is toy.head)
    assert seen == {path: module for path, module in toy.named_modules() if path}


@pytest.mark.parametrize(
    ("path", "choice", "kind", "block"),
    [
        ("blocks.1.attn", True, "self_attn", "blocks.1"),
        ("blocks.1.mlp", True, "ffn", "blocks.1"),
        ("blocks.1.mlp.fc2", True, "ffn", "blocks.1"),
        ("blocks.1", True, "block", "blocks.1"),
        ("blocks.1", "block", "block", "blocks.1"),
        ("blocks.1", "late_block", "late_block", "blocks.1"),
        ("blocks.1", "self_attn", "self_attn", "blocks.1"),
        ("blocks.1.attn", "mine", "mine", "blocks.1"),
        ("blocks.1.attn", "block", "block", "blocks.1.attn"),
        ("head", True, "ffn", ""),
    ],
)
def test_select(path: str, choice: bool | str, kind: str, block: str) -> None:
    toy = build("single", depth=2)
    layers = sc.find_layers(toy, select=lambda name, module: choice if name == path else False)
    assert layers == [sc.CacheLayer(path, kind, block)]
    schedule = sc.Schedule.uniform(toy, STEPS, 2, layers=layers)
    with sc.cached(toy, schedule) as run:
        sample(toy)
    assert run.summary().reused == schedule.reused == STEPS // 2
    assert run.summary().recomputed == {}


@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_select_outranks_granularity(granularity: Any) -> None:
    toy = build("single", depth=2)
    layers = sc.find_layers(
        toy, granularity=granularity, select=lambda path, module: isinstance(module, Mlp)
    )
    assert paths(layers) == ["blocks.0.mlp", "blocks.1.mlp"]


def test_select_in_a_pipeline_sees_paths_of_each_denoiser() -> None:
    pipe = Pipe(transformer=build("single", depth=1), transformer_2=build("dual", depth=1))
    layers = sc.find_layers(pipe, select=lambda path, module: path == "blocks.0.attn")
    assert [(layer.path, layer.kind) for layer in layers] == [
        ("transformer.blocks.0.attn", "self_attn"),
        ("transformer_2.blocks.0.attn", "joint_attn"),
    ]


@pytest.mark.parametrize("inner", ["blocks.0.attn", "blocks.0.mlp.fc1"])
def test_a_choice_inside_another_is_refused(inner: str) -> None:
    toy = build("single", depth=2)
    words = rf"select chose '{inner}' inside 'blocks.0'.*choose one"
    with pytest.raises(sc.InvalidArgumentError, match=words):
        sc.find_layers(toy, select=lambda path, module: path in ("blocks.0", inner))
    neighbours = ("blocks.0", "blocks.1.attn")
    assert paths(sc.find_layers(toy, select=lambda path, module: path in neighbours)) == [
        *neighbours
    ]


def test_a_name_that_begins_like_another_is_not_inside_it() -> None:
    toy = build("single", depth=12)
    chosen = ("blocks.1", "blocks.10.attn", "blocks.11")
    assert paths(sc.find_layers(toy, select=lambda path, module: path in chosen)) == [*chosen]


@pytest.mark.parametrize("nothing", [False, None, "", 0])
def test_choosing_nothing_is_refused(nothing: Any) -> None:
    toy = build("single", depth=1)
    words = r"select chose no module of Toy; it is called with the path and the module"
    with pytest.raises(sc.LayersNotFoundError, match=words):
        sc.find_layers(toy, select=lambda path, module: nothing)
    with pytest.raises(sc.LayersNotFoundError, match=words):
        sc.observe_layers(toy, lambda i: sample(toy), select=lambda path, module: nothing)


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda x: nn.ModuleDict({"0": x[0]})])
def test_choosing_what_has_no_forward_is_refused(kind: Callable[[list[nn.Module]], Any]) -> None:
    toy = build("single", depth=1)
    toy.blocks = kind([toy.blocks[0]])
    words = r"'blocks', a Module(List|Dict) that has no forward and so is never called"
    with pytest.raises(sc.InvalidArgumentError, match=words):
        sc.find_layers(toy, select=lambda path, module: path == "blocks")


# -------------------------------------------------------------------------- confirmed by watching


def _bypassing(block: Any, x: Tensor) -> Tensor:
    out: Tensor = block.attn.proj(block.attn.qkv(x)[..., :WIDTH])
    return out


class BypassingBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, gate1, shift2, gate2 = self.modulation(c)[:, None].chunk(4, dim=-1)
        x = x + gate1 * _bypassing(self, self.norm1(x) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) + shift2)


class BypassingToy(Toy):
    """Its attention's parts are used by a function elsewhere, as by an attention processor."""

    block = BypassingBlock


@pytest.fixture
def bypassing() -> Toy:
    torch.manual_seed(0)
    return BypassingToy(depth=2).eval().requires_grad_(False)


def test_a_block_that_bypasses_its_layers_is_taken_as_a_whole(bypassing: Toy) -> None:
    as_found = sc.find_layers(bypassing)
    assert paths(as_found) == [f"blocks.{i}.{name}" for i in range(2) for name in ("attn", "mlp")]
    seen = sc.observe_layers(bypassing, lambda i: sample(bypassing))
    with MacCounter() as counter:
        output = bypassing.blocks[0](torch.zeros(1, 6, WIDTH), torch.zeros(1, WIDTH))
    assert seen == [
        sc.CacheLayer(f"blocks.{i}", "block", f"blocks.{i}", counter.total, output.nbytes)
        for i in range(2)
    ]
    with sc.cached(bypassing, sc.Schedule.uniform(bypassing, STEPS, 2, layers=seen)) as run:
        sample(bypassing)
    assert run.summary().never_ran == ()


def test_blocks_beside_those_that_are_bypassed_keep_their_layers(bypassing: Toy) -> None:
    bypassing.blocks.append(Block(WIDTH))
    seen = sc.observe_layers(bypassing, lambda i: sample(bypassing))
    assert paths(seen) == ["blocks.0", "blocks.1", "blocks.2.attn", "blocks.2.mlp"]


@pytest.mark.parametrize("granularity", ["layer", "auto"])
def test_layers_that_hold_the_work_are_kept(granularity: Any) -> None:
    toy = build("dual", depth=2)
    seen = sc.observe_layers(toy, lambda i: sample(toy), granularity=granularity)
    assert paths(seen) == paths(sc.find_layers(toy))


class Idle(Toy):
    """Its last block never runs."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        for block in list(self.blocks)[:-1]:
            h = block(h, c)
        out: Tensor = self.head(h)
        return out


@pytest.mark.parametrize("granularity", ["auto", "layer", "block"])
def test_what_never_ran_is_left_out(granularity: Any) -> None:
    toy = Idle(depth=3)
    seen = sc.observe_layers(toy, lambda i: sample(toy), granularity=granularity)
    expected = sc.find_layers(toy, granularity=granularity)
    assert paths(seen) == [x.path for x in expected if not x.path.startswith("blocks.2")]


def test_a_model_whose_layers_never_ran_is_refused() -> None:
    toy, other = build("single", depth=1), build("single", depth=1)
    before = [(type(module), dict(vars(module))) for module in toy.modules()]
    with pytest.raises(sc.LayersNotFoundError, match=r"ran none of the 2 layers.*very object"):
        sc.observe_layers(toy, lambda i: sample(other))
    assert [(type(module), dict(vars(module))) for module in toy.modules()] == before


@every_toy
@pytest.mark.parametrize(("granularity", "calls"), [("auto", 1), ("block", 2), ("model", 2)])
def test_the_macs_of_what_ran(toy: Toy, granularity: Any, calls: int) -> None:
    seen = sc.observe_layers(toy, lambda i: sample(toy, calls=calls), granularity=granularity)
    counted = dict.fromkeys(paths(seen), 0)
    with MacCounter() as counter:
        for path in counted:
            module = toy.get_submodule(path)
            module.forward = counting(counter, counted, path, module.forward)
        sample(toy, 1, calls=calls)
    assert {layer.path: layer.macs for layer in seen} == counted
    assert all(counted.values())


def counting(
    counter: MacCounter, into: dict[str, int], path: str, forward: Callable[..., Any]
) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        before = counter.total
        output = forward(*args, **kwargs)
        into[path] += counter.total - before
        return output

    return counted


@every_granularity
def test_the_first_sample_alone_is_watched(granularity: Any) -> None:
    toy = build("single", depth=2)
    ran: list[int] = []
    before = [(type(module), dict(vars(module))) for module in toy.modules()]

    def generate(i: int) -> Any:
        ran.append(i)
        return sample(toy, seed=i)

    sc.observe_layers(toy, generate, granularity=granularity)
    assert ran == [0]
    assert [(type(module), dict(vars(module))) for module in toy.modules()] == before


# --------------------------------------------------------------------------------- calibration


def calibrated(model: Any, generate: Callable[[int], Any], **options: Any) -> sc.Calibration:
    settings: dict[str, Any] = {"num_samples": 2, "max_gap": 3, "progress": False, **options}
    return sc.calibrate(model, generate, **settings)


def assert_equal_calibrations(a: sc.Calibration, b: sc.Calibration) -> None:
    assert np.array_equal(a.errors, b.errors, equal_nan=True)
    for name in ("layers", "total_macs", "timesteps", "model", "solver", "peak_bytes"):
        assert getattr(a, name) == getattr(b, name), name


@every_toy
@pytest.mark.parametrize("granularity", ["auto", "block", "model"])
def test_calibrating_at_a_granularity_is_calibrating_its_layers(toy: Toy, granularity: Any) -> None:
    by_name = calibrated(toy, lambda i: sample(toy), num_samples=1, granularity=granularity)
    layers = sc.find_layers(toy, granularity=granularity)
    assert paths(by_name.layers) == paths(layers)
    by_hand = calibrated(
        toy, lambda i: sample(toy), num_samples=1, layers=layers, granularity="model"
    )
    assert_equal_calibrations(by_name, by_hand)


def _only(*names: str) -> Callable[[str, nn.Module], bool]:
    return lambda path, module: path.rpartition(".")[2] in names


@pytest.mark.parametrize("names", [("attn",), ("mlp",), ("fc1", "fc2"), ("head",)], ids="-".join)
def test_layers_chosen_by_hand_are_those_observed(names: tuple[str, ...]) -> None:
    toy = build("single", depth=2)
    expected = sc.find_layers(toy, select=_only(*names))
    seen = sc.observe_layers(toy, lambda i: sample(toy), select=_only(*names))
    assert [(x.path, x.kind) for x in seen] == [(x.path, x.kind) for x in expected]


@pytest.mark.parametrize("names", [("attn",), ("mlp",), ("fc1", "fc2")], ids="-".join)
def test_exactly_the_given_layers_are_calibrated(names: tuple[str, ...]) -> None:
    toy = build("single", depth=2)
    chosen = sc.find_layers(toy, select=_only(*names))
    got = calibrated(toy, lambda i: sample(toy), layers=chosen)
    assert paths(got.layers) == paths(chosen)


def test_layers_asked_for_as_layers_are_calibrated_as_layers() -> None:
    """They run, and they are not bypassed: there is only more beside them."""
    toy = build("parallel-block", depth=2)
    got = calibrated(toy, lambda i: sample(toy), granularity="layer")
    assert paths(got.layers) == paths(sc.find_layers(toy, granularity="layer"))


@every_toy
@coarse
@pytest.mark.parametrize("calls", [1, 2])
def test_errors_of_blocks_and_models_are_those_of_the_definition(
    toy: Toy, granularity: Any, calls: int
) -> None:
    """E(t, k) = |L_t - L_(t-k)| / |L_t|, of all that a layer returns in a step."""
    got = calibrated(
        toy, lambda i: sample(toy, calls=calls), num_samples=1, granularity=granularity
    )
    outputs: dict[str, list[list[Tensor]]] = {path: [] for path in paths(got.layers)}

    def begin(step: int, branch: int) -> None:
        for recorded in outputs.values():
            recorded += [[]] if branch == 0 else []

    for path, recorded in outputs.items():
        module = toy.get_submodule(path)
        module.forward = recording(recorded, module.forward)
    sample(toy, calls=calls, begin=begin)
    for index, recorded in enumerate(outputs.values()):
        values = [torch.cat([x.double().flatten() for x in tensors]) for tensors in recorded]
        for gap, step in itertools.product((1, 2, 3), range(STEPS)):
            error = got.errors[0, index, gap - 1, step]
            if step < gap:
                assert np.isnan(error)
                continue
            expected = (values[step] - values[step - gap]).abs().sum() / values[step].abs().sum()
            np.testing.assert_allclose(error, float(expected), rtol=1e-4)


def recording(into: list[list[Tensor]], forward: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        into[-1] += [leaf.clone() for leaf in pytree.tree_leaves(output)]
        return output

    return recorded


@every_toy
@coarse
def test_a_plan_costs_what_it_says(toy: Toy, granularity: Any) -> None:
    calibration = calibrated(toy, lambda i: sample(toy, seed=i), granularity=granularity)
    schedule = sc.plan(calibration, alpha=100.0)
    assert schedule.reused
    with MacCounter() as uncached:
        sample(toy)
    with sc.cached(toy, schedule) as run, MacCounter() as counter:
        sample(toy)
    assert schedule.compute == pytest.approx(counter.total / uncached.total)
    assert run.summary().recomputed == {}


def test_calibration_falls_back_to_blocks_after_the_first_sample(bypassing: Toy) -> None:
    ran: list[int] = []
    seen: list[Any] = []

    def generate(i: int) -> Any:
        ran.append(i)
        seen.append(sample(bypassing, seed=i))
        return seen[-1]

    got = calibrated(bypassing, generate, num_samples=3)
    assert ran == [0, 0, 1, 2]
    assert same(seen, [sample(bypassing, seed=i) for i in ran])
    blocks = sc.find_layers(bypassing, granularity="block")
    expected = calibrated(
        bypassing, lambda i: sample(bypassing, seed=i), num_samples=3, layers=blocks
    )
    assert [layer.kind for layer in got.layers] == ["block", "block"]
    assert_equal_calibrations(got, expected)
    assert "left_out" not in got.provenance


def test_calibration_that_need_not_fall_back_runs_each_sample_once() -> None:
    toy = Idle(depth=3)
    ran: list[int] = []

    def generate(i: int) -> Any:
        ran.append(i)
        return sample(toy, seed=i)

    got = calibrated(toy, generate, num_samples=3)
    assert ran == [0, 1, 2]
    assert got.provenance["left_out"] == "blocks.2.attn, blocks.2.mlp"


def test_no_layers_at_all_are_refused_before_anything_runs() -> None:
    toy = build("single", depth=1)
    ran: list[int] = []
    with pytest.raises(sc.InvalidArgumentError, match=r"layers"):
        calibrated(toy, ran.append, layers=[])
    assert ran == []


def _twice(toy: Toy) -> list[sc.CacheLayer]:
    return [*sc.find_layers(toy), *sc.find_layers(toy)]


def _nested(toy: Toy) -> list[sc.CacheLayer]:
    return [*sc.find_layers(toy, granularity="block"), *sc.find_layers(toy)]


def _in_the_model(toy: Toy) -> list[sc.CacheLayer]:
    return [*sc.find_layers(toy, granularity="model"), *sc.find_layers(toy)]


@pytest.mark.parametrize("layers_of", [_twice, _nested, _in_the_model])
def test_layers_that_cannot_be_calibrated_together_are_refused_before_anything_runs(
    layers_of: Callable[[Toy], list[sc.CacheLayer]],
) -> None:
    toy = build("single", depth=2)
    ran: list[int] = []
    with pytest.raises(sc.InvalidArgumentError, match=r"blocks\.0"):
        calibrated(toy, ran.append, layers=layers_of(toy))
    assert ran == []


def test_layers_that_the_model_lacks_are_refused() -> None:
    toy, deeper = build("single", depth=1), build("single", depth=2)
    for attempt in (
        lambda: calibrated(toy, lambda i: sample(toy), layers=sc.find_layers(deeper)),
        lambda: sc.enable(
            toy,
            replace(sc.Schedule.uniform(toy, STEPS, 2, layers=sc.find_layers(deeper)), model=None),
        ),
    ):
        with pytest.raises(sc.ScheduleMismatchError, match=r"missing from the model.*blocks\.1"):
            attempt()
        assert type(toy) is Toy and type(toy.blocks[0].attn) is Attention


# ------------------------------------------------------------------------------------ schedules


@every_toy
@every_granularity
def test_uniform_schedules(toy: Toy, granularity: Any) -> None:
    layers = sc.find_layers(toy, granularity=granularity)
    schedule = sc.Schedule.uniform(
        toy, STEPS, 3, predictor="taylor", last=True, granularity=granularity
    )
    assert schedule.layers == tuple(layers)
    assert set(schedule.rows.values()) == {sc.Row(steps("#..#..##"), "taylor")}
    assert schedule.model == identify(toy)
    given = sc.Schedule.uniform(
        toy, STEPS, 3, predictor="taylor", last=True, layers=layers, granularity="model"
    )
    assert given == schedule


def test_uniform_schedules_of_chosen_layers() -> None:
    toy = build("single", depth=3)
    chosen = sc.find_layers(toy, select=lambda path, module: path == "blocks.1")
    schedule = sc.Schedule.uniform(toy, STEPS, 2, layers=chosen)
    expected, _ = run_reference(toy, schedule)
    with sc.cached(toy, schedule) as run:
        assert same(sample(toy), expected)
    assert run.summary().reused == STEPS // 2
    with pytest.raises(sc.InvalidArgumentError, match="at least one row"):
        sc.Schedule.uniform(toy, STEPS, 2, layers=[])


@every_toy
@coarse
def test_schedules_read_back_run_the_same(toy: Toy, granularity: Any, tmp_path: Any) -> None:
    schedule = uniform(toy, granularity, 3, "taylor")
    schedule.save(tmp_path / "schedule.json")
    loaded = sc.Schedule.load(tmp_path / "schedule.json")
    assert loaded == schedule
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    results = []
    for one in (schedule, loaded):
        with sc.cached(toy, one):
            results.append(sample(toy))
    assert same(*results)


def test_a_plan_for_the_model_reads_back(tmp_path: Any) -> None:
    toy = build("single", depth=1)
    calibration = calibrated(toy, lambda i: sample(toy, seed=i), granularity="model")
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = sc.Calibration.load(tmp_path / "calibration.safetensors")
    assert_equal_calibrations(calibration, loaded)
    assert loaded.layers[0].path == loaded.layers[0].block == ""
    schedule = sc.plan(loaded, alpha=100.0)
    schedule.save(tmp_path / "schedule.json")
    assert sc.Schedule.load(tmp_path / "schedule.json") == schedule
    assert "model" in str(schedule) and "model" in str(calibration)
    assert calibration.curve(gap=1, layer="").mean.shape == (STEPS,)


def test_a_schedule_of_another_granularity_than_the_layers_is_no_mismatch() -> None:
    """What a schedule covers is its own affair: a model is not searched again for its layers."""
    toy = build("single", depth=2)
    for granularity in ("layer", "block", "model"):
        with sc.cached(toy, uniform(toy, granularity)) as run:
            sample(toy)
        assert run.summary().never_ran == ()


# ------------------------------------------------------------------------------- a reused model


@every_toy
@predictors
def test_a_reused_step_of_the_model_runs_nothing(toy: Toy, predictor: str) -> None:
    schedule = uniform(toy, "model", 3, predictor)
    calls: list[str] = []
    macs: list[int] = []
    ran: list[bool] = []
    with sc.cached(toy, schedule) as run:
        for path, module in toy.named_modules():
            if path:
                module.register_forward_pre_hook(lambda *_, path=path: calls.append(path))
        counters = [MacCounter() for _ in range(STEPS)]

        def begin(step: int, branch: int) -> None:
            calls.clear()
            counters[step].__enter__()

        def after(step: int) -> None:
            counters[step].__exit__(None, None, None)
            macs.append(counters[step].total)
            ran.append(bool(calls))

        sample(toy, begin=begin, after=after)
    row = schedule.rows[""].computed
    assert tuple(ran) == row
    assert [bool(cost) for cost in macs] == list(row)
    assert (run.summary().computed, run.summary().reused) == (3, 5)


# ------------------------------------------------------------------------- outputs of any type


@dataclass
class Output(BaseOutput):
    """As the models of diffusers return it."""

    sample: Tensor
    extra: Any = None


@dataclass
class Plain:
    sample: Tensor
    note: str = "a"
    scale: float = 1.0
    nothing: None = None


@dataclass(frozen=True)
class Frozen:
    sample: Tensor
    more: tuple[Any, ...] = ()
    note: str = "a"


@dataclass(frozen=True, slots=True)
class Slotted:
    sample: Tensor
    note: str = "a"


@dataclass
class Derived:
    sample: Tensor
    twice: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.twice = 2 * self.sample


class Named(NamedTuple):
    sample: Tensor
    count: int


class MoreNamed(Named):
    pass


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "nothing first": lambda x: (None, x),
    "list": lambda x: [x, 2 * x],
    "dict": lambda x: {"sample": x, "flag": True},
    "ordered dict": lambda x: OrderedDict(sample=x, other=[None, x + 1]),
    "output": lambda x: Output(sample=x),
    "output of several": lambda x: Output(sample=x, extra=(x + 1, None)),
    "dataclass": lambda x: Plain(x, "b", 2.0),
    "frozen dataclass": lambda x: Frozen(x, (x + 1, None, 3), "b"),
    "slotted dataclass": lambda x: Slotted(x, "b"),
    "derived dataclass": lambda x: Derived(x),
    "named tuple": lambda x: Named(x, 3),
    "derived named tuple": lambda x: MoreNamed(x, 3),
    "nested": lambda x: {"a": (x, [Named(x + 1, 2)]), "b": None},
}
FALLING = [800.0, 600.0, 400.0, 200.0]
every_output = pytest.mark.parametrize("kind", OUTPUTS)


class Returning(nn.Module):
    """Scales what it is given by the time, and returns that in some form."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self._make = make

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self._make(self.weight * x * t)


def outputs(model: nn.Module, predictor: str, times: Sequence[float]) -> tuple[list[Any], sc.Run]:
    """What a model that is computed at steps 0 and 1 returns at all of them."""
    layers = tuple(sc.find_layers(model, granularity="model"))
    row = sc.Row((True, True, *(False for _ in times[2:])), predictor)
    got = []
    with sc.cached(
        model, sc.Schedule(len(times), {"": row}, layers, noise_levels=levels(len(times)))
    ) as run:
        for time in times:
            got.append(model(torch.arange(1.0, 5.0).reshape(1, 4), torch.tensor([time])))
    return got, run


def as_plain(value: Any) -> Any:
    """An output as nested tuples, for comparison."""
    if isinstance(value, Tensor):
        return value.flatten().tolist()
    if hasattr(value, "__dataclass_fields__"):
        return [(name, as_plain(getattr(value, name))) for name in value.__dataclass_fields__]
    if isinstance(value, dict):
        return [(name, as_plain(item)) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return value


def scaled(make: Callable[[Tensor], Any], time: float) -> Any:
    return make(torch.arange(1.0, 5.0).reshape(1, 4) * time)


@every_output
@predictors
def test_outputs_of_any_type(kind: str, predictor: str) -> None:
    make = OUTPUTS[kind]
    got, run = outputs(Returning(make), predictor, FALLING)
    assert run.summary().reused == 2 and run.summary().held_bytes == 0
    expected = [800.0, 600.0, 600.0, 600.0] if predictor == "hold" else FALLING
    for value, time in zip(got, expected, strict=True):
        assert type(value) is type(scaled(make, time))
        assert as_plain(value) == as_plain(scaled(make, time))
    if isinstance(got[2], Output):
        assert got[2][0] is got[2].sample and got[2]["sample"] is got[2].sample


def spoil(value: Any) -> None:
    """Writes into every tensor of an output."""
    if isinstance(value, Tensor):
        value.fill_(-1.0)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            spoil(getattr(value, name))
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            spoil(item)


@every_output
@predictors
def test_any_output_may_be_written_into(kind: str, predictor: str) -> None:
    class Spoiled(Returning):
        def __call__(self, *args: Any) -> Any:
            output = super().__call__(*args)
            seen.append(as_plain(output))
            spoil(output)
            return output

    seen: list[Any] = []
    expected, _ = outputs(Returning(OUTPUTS[kind]), predictor, FALLING)
    outputs(Spoiled(OUTPUTS[kind]), predictor, FALLING)
    assert seen == [as_plain(value) for value in expected]


@pytest.mark.parametrize(
    "make",
    [lambda x: {"a": Plain(x), "b": x + 1}, lambda x: Output(x + 1, extra=Plain(x))],
    ids=["in a dict", "in an output"],
)
def test_a_dataclass_inside_another_output(make: Callable[[Tensor], Any]) -> None:
    got, _ = outputs(Returning(make), "taylor", FALLING)
    for value, time in zip(got, FALLING, strict=True):
        assert as_plain(value) == as_plain(scaled(make, time))


def test_a_tuple_of_dataclasses() -> None:
    got, _ = outputs(Returning(lambda x: (Plain(x),)), "hold", [800.0, 600.0, 400.0])
    assert as_plain(got[2]) == as_plain((Plain(torch.arange(1.0, 5.0) * 600),))


@dataclass
class HomeMade(OrderedDict):  # type: ignore[type-arg]
    """Like the outputs of diffusers, which register theirs with PyTorch; this one does not."""

    sample: Any = None

    def __post_init__(self) -> None:
        self["sample"] = self.sample


class MadeByHand(dict):  # type: ignore[type-arg]
    """A mapping whose items are attributes too, unknown to PyTorch."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


@pytest.mark.parametrize("make", [HomeMade, MadeByHand])
def test_an_output_that_is_a_mapping_with_attributes(make: Callable[..., Any]) -> None:
    got, run = outputs(Returning(lambda x: make(sample=x)), "taylor", FALLING)
    for value, time in zip(got, FALLING, strict=True):
        assert value.sample.flatten().tolist() == [k * time for k in range(1, 5)]
        assert value["sample"] is value.sample and type(value) is make
    assert run.summary().peak_bytes == 2 * got[0].sample.nbytes


def test_a_tensor_in_two_places_of_an_output_is_one() -> None:
    got, run = outputs(Returning(lambda x: (x, {"again": x}, x[:])), "hold", FALLING)
    for first, mapping, other in got:
        assert mapping["again"] is first is not other
    assert run.summary().peak_bytes == 2 * got[0][0].nbytes


def test_tensors_in_an_object_that_cannot_be_taken_apart_are_refused() -> None:
    model = Returning(lambda x: (x, SimpleNamespace(extra=[x + 1])))
    with pytest.raises(sc.ScheduleMismatchError, match=r"a SimpleNamespace with tensors in it"):
        outputs(model, "hold", FALLING)


@pytest.mark.parametrize(
    "make", [lambda x: None, lambda x: 3.0, lambda x: "text", lambda x: SimpleNamespace(sample=x)]
)
def test_an_output_without_tensors_is_refused(make: Callable[[Tensor], Any]) -> None:
    model = Returning(make)
    before = dict(vars(model))
    name = type(make(torch.zeros(1))).__name__
    with pytest.raises(sc.ScheduleMismatchError, match=rf"returned no tensor but {name}.*leave it"):
        outputs(model, "hold", [800.0, 600.0, 400.0])
    assert type(model) is Returning and vars(model) == before


def test_the_refusal_names_the_model() -> None:
    with pytest.raises(sc.ScheduleMismatchError, match=r"^'?(the model|Returning)"):
        outputs(Returning(lambda x: None), "hold", [800.0, 600.0, 400.0])


# ------------------------------------------------------------------------------ mixed schedules

BLOCK = steps("##.#..#.")
INNER = steps("#.#..#..")
LATER = steps("###.#..#")


def mixed(toy: Toy, outer: str, predictor: str = "hold") -> sc.Schedule:
    """Rows for blocks or the model, and others for layers inside of them."""
    outside = sc.find_layers(toy, granularity=outer)  # type: ignore[arg-type]
    inside = [x for x in sc.find_layers(toy, granularity="layer") if x not in outside]
    rows = {x.path: sc.Row(BLOCK, predictor) for x in outside}
    rows |= {x.path: sc.Row((INNER, LATER)[i % 2], predictor) for i, x in enumerate(inside)}
    return sc.Schedule(STEPS, rows, tuple(outside + inside), noise_levels=levels())


@every_toy
@coarse
@pytest.mark.parametrize("calls", [1, 2])
def test_mixed_schedules_are_never_stale(toy: Toy, granularity: str, calls: int) -> None:
    """A layer whose block skipped its computed step computes at its next one, and that counts."""
    schedule = mixed(toy, granularity)
    expected, by_hand = run_reference(toy, schedule, calls=calls)
    with sc.cached(toy, schedule) as run:
        got = [sample(toy, calls=calls) for _ in range(2)]
    assert same(got, [expected, expected])
    summary = run.summary()
    assert (summary.computed, summary.reused) == (2 * by_hand.computed, 2 * by_hand.reused)
    assert summary.recomputed == {NOTHING_KEPT: 2 * by_hand.recomputed}
    assert by_hand.recomputed > 0
    assert summary.held_bytes == 0 and summary.finished == 2


@every_toy
def test_the_model_the_blocks_and_the_layers_at_once(toy: Toy) -> None:
    schedule = mixed(toy, "block")
    layers = (sc.CacheLayer("", "model", ""), *(schedule.layers or ()))
    rows = {"": sc.Row(steps("##.##..#")), **schedule.rows}
    schedule = sc.Schedule(STEPS, rows, layers)
    expected, by_hand = run_reference(toy, schedule)
    with sc.cached(toy, schedule) as run:
        assert same(sample(toy), expected)
    assert run.summary().reused == by_hand.reused
    assert sum(run.summary().recomputed.values()) == by_hand.recomputed


@coarse
def test_mixed_schedules_read_back(granularity: str, tmp_path: Any) -> None:
    toy = build("single", depth=2)
    schedule = mixed(toy, granularity, "taylor2")
    schedule.save(tmp_path / "schedule.json")
    assert sc.Schedule.load(tmp_path / "schedule.json") == schedule


@every_toy
@coarse
def test_an_outer_row_that_computes_everything_changes_nothing(toy: Toy, granularity: str) -> None:
    schedule = mixed(toy, granularity)
    outer = paths(sc.find_layers(toy, granularity=granularity))  # type: ignore[arg-type]
    inner = {path: row for path, row in schedule.rows.items() if path not in outer}
    rows = {**dict.fromkeys(outer, sc.Row((True,) * STEPS)), **inner}
    results = []
    for paths_of in (rows, inner):
        layers = tuple(x for x in schedule.layers or () if x.path in paths_of)
        if not layers:
            pytest.skip("its blocks have no layers inside")
        with sc.cached(toy, sc.Schedule(STEPS, paths_of, layers)) as run:
            results.append(sample(toy))
        assert run.summary().recomputed == {}
    assert same(*results)


class SpoilingBlock(Block):
    """Its output is no number in some of its calls."""

    calls: int
    spoils: tuple[int, ...]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out = super().forward(x, c)
        self.calls += 1
        return out * float("nan") if self.calls in self.spoils else out


class TwiceToy(Toy):
    """Runs its one block twice."""

    block = SpoilingBlock

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        out = self.blocks[0](h, c)
        again: Tensor = self.blocks[0](h + 1, c)
        return out + again.nan_to_num()


def test_a_block_used_twice_whose_second_use_alone_must_compute() -> None:
    torch.manual_seed(0)
    toy = TwiceToy(depth=1).eval()
    block, attention, _ = _nested(toy)
    toy.blocks[0].calls, toy.blocks[0].spoils = 0, (2,)
    row = sc.Row(steps("#.#####"))
    schedule = sc.Schedule(7, {block.path: row, attention.path: row}, (block, attention))
    seen: list[tuple[Tensor, Tensor]] = []
    toy.blocks[0].attn.register_forward_hook(
        lambda _, args, output: seen.append((args[0].clone(), output.clone()))
    )
    with sc.cached(toy, schedule, check_finite=True) as run:
        for time in times(7):
            toy(torch.ones(1, 6, WIDTH), torch.tensor([time]), torch.tensor([0]))
    (_, first), (_, second), (given, second_again) = seen[:3]
    assert not torch.equal(first, second)
    # In step 1 the block is reused, then computed: its attention too, as it is not its first use.
    assert torch.equal(second_again, toy.blocks[0].attn(given))
    assert run.summary().recomputed == {
        "what had been computed was not finite": 1,
        "no value had been computed for this call": 1,
    }


# ------------------------------------------------------- the invariants, for blocks and for models


@every_toy
@coarse
@predictors
def test_1_computing_everything_changes_no_bit(toy: Toy, granularity: str, predictor: str) -> None:
    plain = sample(toy, calls=2)
    with sc.cached(toy, uniform(toy, granularity, 1, predictor)) as run:
        assert same(sample(toy, calls=2), plain)
    assert run.summary().reused == run.summary().peak_bytes == 0


@every_toy
@coarse
@pytest.mark.parametrize(("predictor", "interval", "calls"), [("hold", 2, 2), ("taylor", 3, 1)])
def test_2_a_computed_step_is_that_of_the_model(
    toy: Toy, granularity: str, predictor: str, interval: int, calls: int
) -> None:
    plain = copy.deepcopy(toy)
    schedule = uniform(toy, granularity, interval, predictor)
    with sc.cached(toy, schedule) as run:
        trajectory = sample(toy, calls=calls)
    x = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        outputs = [
            plain.denoise(x, torch.tensor([times()[step]]), torch.tensor([branch]))
            for branch in range(calls)
        ]
        after = x - sum(outputs) / (STEPS * calls)
        assert torch.equal(trajectory[step], after) == (step % interval == 0)
        x = trajectory[step]
    assert run.summary().reused == schedule.reused * calls
    assert run.summary().recomputed == {}


@every_toy
@coarse
@pytest.mark.parametrize(
    ("predictor", "interval", "calls"), [("hold", 2, 2), ("hold", 3, 1), ("taylor", 3, 2)]
)
def test_2_the_whole_run_is_what_reuse_by_hand_gives(
    toy: Toy, granularity: str, predictor: str, interval: int, calls: int
) -> None:
    schedule = uniform(toy, granularity, interval, predictor)
    expected, by_hand = run_reference(toy, schedule, calls=calls)
    with sc.cached(toy, schedule) as run:
        got = sample(toy, calls=calls)
    assert_agree(schedule, got, expected)
    assert run.summary().reused == by_hand.reused


@every_toy
@coarse
@pytest.mark.parametrize(("predictor", "interval"), [("hold", STEPS), ("taylor2", 2)])
def test_2_what_does_not_change_is_reused_without_error(
    toy: Toy, granularity: str, predictor: str, interval: int
) -> None:
    """Exactly for a model; the residual of a block is rounded once."""
    toy.condition = lambda t, y: torch.zeros(len(t), WIDTH)  # type: ignore[method-assign]
    x, y = torch.randn(2, 6, WIDTH), torch.tensor([0, 1])
    plain = toy.denoise(x, torch.zeros(2), y)
    with sc.cached(toy, uniform(toy, granularity, interval, predictor)) as run:
        for time in times():
            got = toy.denoise(x, torch.full((2,), time), y)
            if granularity == "model":
                assert torch.equal(got, plain)
            else:
                torch.testing.assert_close(got, plain)
    assert run.summary().reused


def traces(model: nn.Module) -> dict[str, Any]:
    """Class and attributes of every module, and what its containers hold."""
    return {
        path: (
            type(module),
            {
                name: list(value.items()) if isinstance(value, dict) else value
                for name, value in vars(module).items()
            },
        )
        for path, module in model.named_modules()
    }


class Stop(Exception):
    pass


@every_toy
@coarse
@pytest.mark.parametrize("how", ["to its end", "broken off"])
def test_3_removal_leaves_everything_as_it_was(toy: Toy, granularity: str, how: str) -> None:
    for module in toy.modules():
        module.register_forward_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None)
    before, keys, plain = traces(toy), list(toy.state_dict()), sample(toy)

    def stop(step: int) -> None:
        if how == "broken off" and step == 4:
            raise Stop

    try:
        with sc.cached(toy, uniform(toy, granularity)):
            assert list(toy.state_dict()) == keys
            assert all(isinstance(m, before[path][0]) for path, m in toy.named_modules())
            sample(toy, after=stop)
    except Stop:
        pass
    assert traces(toy) == before
    assert same(sample(toy), plain)


@every_toy
@coarse
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_3_a_copy_is_a_plain_model_of_its_own(
    toy: Toy, granularity: str, copied: Callable[[Toy], Toy]
) -> None:
    plain, classes = sample(toy), [type(module) for module in toy.modules()]
    schedule = uniform(toy, granularity)
    with sc.cached(toy, schedule):
        under_schedule = sample(toy)
        twin = copied(toy)
        assert [type(module) for module in twin.modules()] == classes
        assert same(sample(twin), plain)
        with sc.cached(twin, schedule):
            assert same(sample(twin), under_schedule)
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert same(sample(toy), under_schedule)
    assert same(sample(toy), plain)


@every_toy
@coarse
@pytest.mark.parametrize("other", [{"seed": 5}, {"batch": 3, "tokens": 9}, {"calls": 2}], ids=str)
def test_4_two_generations_equal_two_fresh_ones(
    toy: Toy, granularity: str, other: dict[str, int]
) -> None:
    schedule = uniform(toy, granularity, 3, "taylor")
    fresh = []
    for options in ({}, other):
        with sc.cached(toy, schedule):
            fresh.append(sample(toy, **options))  # type: ignore[arg-type]
    with sc.cached(toy, schedule) as run:
        together = [sample(toy), sample(toy, **other), sample(toy)]  # type: ignore[arg-type]
    assert same(together, [*fresh, fresh[0]])
    assert (run.summary().finished, run.summary().broken_off) == (3, 0)
    assert run.summary().recomputed == {}


@every_toy
@coarse
@pytest.mark.parametrize("after_steps", [2, 5])
@pytest.mark.parametrize("raises", [False, True])
def test_4_a_generation_broken_off_is_forgotten(
    toy: Toy, granularity: str, after_steps: int, raises: bool
) -> None:
    schedule = uniform(toy, granularity, 3)
    with sc.cached(toy, schedule):
        fresh = sample(toy, seed=1)

    def stop(step: int) -> None:
        if raises and step == after_steps - 1:
            raise Stop

    with sc.cached(toy, schedule) as run:
        try:
            sample(toy, timesteps=times()[:after_steps], after=stop)
        except Stop:
            pass
        assert same(sample(toy, seed=1), fresh)
    assert (run.summary().finished, run.summary().broken_off) == (1, 1)
    assert run.summary().recomputed == {}


@every_toy
@coarse
@pytest.mark.parametrize("num_steps", [STEPS - 1, STEPS + 1])
def test_4_another_number_of_steps_is_refused(toy: Toy, granularity: str, num_steps: int) -> None:
    before = traces(toy)
    with (
        pytest.raises(sc.ScheduleMismatchError, match=r"\b(7 steps|step 9)\b.*\b8\b.*plan"),
        sc.cached(toy, uniform(toy, granularity)),
    ):
        sample(toy, num_steps)
    assert traces(toy) == before


@every_toy
@coarse
@pytest.mark.parametrize(("predictor", "interval"), [("hold", 3), ("taylor", 2), ("taylor2", 3)])
def test_5_values_are_held_until_their_last_use(
    toy: Toy, granularity: str, predictor: str, interval: int
) -> None:
    schedule = uniform(toy, granularity, interval, predictor)
    per_step: list[list[tuple[str, int]]] = []
    with watched_layers(toy, schedule) as seen:

        def end_step(step: int) -> None:
            per_step.append(list(seen))
            seen.clear()

        sample(toy, after=end_step)
    expected = Liveness(per_step, schedule)
    held: list[int] = []
    with sc.cached(toy, schedule) as run:
        sample(toy, after=lambda step: held.append(run.summary().held_bytes))
    assert held == expected.after_step and held[-1] == 0
    assert run.summary().peak_bytes == expected.peak > 0


@pytest.mark.parametrize("toy_name", ["single", "dual", "in-place"])
@coarse
@predictors
def test_5_the_bytes_reported_are_the_tensors_alive(
    toy: Toy, granularity: str, predictor: str
) -> None:
    mine: list[Tensor] = []
    gaps: list[int] = []

    def alive() -> dict[int, Tensor]:
        return {id(x): x for x in gc.get_objects() if type(x) is Tensor}

    gc.collect()
    gc.freeze()
    try:
        with sc.cached(toy, uniform(toy, granularity, 3, predictor)) as run:
            before = set(alive())
            for time in times():
                x, t, y = torch.zeros(1, 6, WIDTH), torch.tensor([time]), torch.tensor([0])
                mine.extend((x, t, y, toy.denoise(x, t, y)))
                others = {id(x) for x in mine} | before
                kept = sum(x.nbytes for i, x in alive().items() if i not in others)
                gaps.append(kept - run.summary().held_bytes)
    finally:
        gc.unfreeze()
    assert gaps == [0] * STEPS


class NoReading(TorchDispatchMode):
    """Refuses every operator that hands a value on the device to the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


@every_toy
@coarse
def test_7_nothing_is_read_while_sampling(toy: Toy, granularity: str) -> None:
    with sc.cached(toy, uniform(toy, granularity, 3, "taylor")), NoReading():
        sample(toy, calls=2)


# ------------------------------------------------------------- two denoisers, one after the other


class Pipe:
    """As much of a pipeline as is needed: components, and a scheduler that lists its timesteps."""

    def __init__(self, **components: Any) -> None:
        self.scheduler = SimpleNamespace(timesteps=torch.arange(1000).flip(0))
        self.components = {**components, "scheduler": self.scheduler, "tokenizer": None}

    def generate(
        self, *, seed: int = 0, boundary: int = STEPS, start: int = 0, calls: int = 1
    ) -> Tensor:
        """Runs the steps from ``start`` on; from ``boundary`` on with the second denoiser."""
        self.scheduler.timesteps = torch.tensor(times())
        x = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(seed))
        for step, time in list(enumerate(times()))[start:]:
            toy = self.components["transformer" if step < boundary else "transformer_2"]
            y = torch.tensor([seed % 4])
            outputs = [toy.denoise(x, torch.tensor([time]), (y + i) % 4) for i in range(calls)]
            x = x - sum(outputs) / (STEPS * calls)
        return x


@pytest.fixture
def turns() -> Pipe:
    """Two denoisers of different size, which take turns."""
    return Pipe(transformer=build("single", depth=2), transformer_2=build("dual", 1, depth=1))


def runs_at(path: str, boundary: int) -> range:
    return range(boundary, STEPS) if path.startswith("transformer_2") else range(boundary)


def test_the_layers_of_both_denoisers_are_counted(turns: Pipe) -> None:
    observed = sc.observe_layers(turns, lambda i: turns.generate(boundary=3, calls=2))
    measured = sc.calibrate(
        turns, lambda i: turns.generate(boundary=3, calls=2), 1, max_gap=1, progress=False
    )
    assert [(x.path, x.macs, x.nbytes) for x in observed] == [
        (x.path, x.macs, x.nbytes) for x in measured.layers
    ]
    assert all(layer.macs and layer.nbytes for layer in observed)


boundaries = pytest.mark.parametrize("boundary", [2, 5, 6])


@boundaries
@every_granularity
def test_errors_are_known_where_a_denoiser_ran(
    turns: Pipe, boundary: int, granularity: Any, tmp_path: Any
) -> None:
    got = calibrated(
        turns, lambda i: turns.generate(seed=i, boundary=boundary), granularity=granularity
    )
    assert paths(got.layers) == paths(sc.find_layers(turns, granularity=granularity))
    assert got.steps_run == tuple(runs_at(path, boundary) for path in paths(got.layers))
    for index, path in enumerate(paths(got.layers)):
        run = runs_at(path, boundary)
        for gap in (1, 2, 3):
            known = [step in run[gap:] for step in range(STEPS)]
            assert np.array_equal(~np.isnan(got.errors[:, index, gap - 1]), [known] * 2)
    got.save(tmp_path / "calibration.safetensors")
    loaded = sc.Calibration.load(tmp_path / "calibration.safetensors")
    assert_equal_calibrations(got, loaded)
    assert loaded.steps_run == got.steps_run
    assert sc.plan(loaded, alpha=0.1) == sc.plan(got, alpha=0.1)


@every_granularity
@pytest.mark.parametrize(("boundary", "calls"), [(2, 1), (3, 2), (6, 1)])
def test_a_plan_for_two_denoisers(turns: Pipe, boundary: int, granularity: Any, calls: int) -> None:
    generate = functools.partial(turns.generate, boundary=boundary, calls=calls)
    calibration = calibrated(turns, lambda i: generate(seed=i), granularity=granularity)
    with MacCounter() as uncached:
        plain = generate()
    for schedule in (
        sc.plan(calibration, alpha=100.0),
        sc.plan(calibration, alpha=100.0, max_gap=1, predictor="taylor"),
    ):
        for path, row in schedule.rows.items():
            run_at = runs_at(path, boundary)
            assert row.computed[run_at[0]]
            assert all(row.computed[step] for step in range(STEPS) if step not in run_at)
        with sc.cached(turns, schedule) as run, MacCounter() as counter:
            got = generate()
            generate(seed=1)
        summary = run.summary()
        assert schedule.compute == pytest.approx(counter.total / (2 * uncached.total), rel=0.01)
        assert summary.recomputed == {}
        assert summary.reused == 2 * calls * schedule.reused
        assert (summary.finished, summary.held_bytes) == (2, 0)
        assert torch.equal(got, plain) == (not schedule.reused)


@pytest.mark.parametrize("boundary", [1, STEPS - 1])
def test_a_denoiser_that_runs_at_one_step(turns: Pipe, boundary: int) -> None:
    """There is nothing to reuse in it, and the other one is calibrated all the same."""
    generate = functools.partial(turns.generate, boundary=boundary)
    schedule = sc.plan(calibrated(turns, lambda i: generate(seed=i)), alpha=100.0)
    assert schedule.reused
    with sc.cached(turns, schedule) as run:
        generate()
    assert run.summary().recomputed == {}


def test_a_boundary_that_moves_is_never_stale(turns: Pipe) -> None:
    """Begun a step late, the second denoiser has nothing yet that it could reuse."""
    calibration = calibrated(turns, lambda i: turns.generate(seed=i, boundary=4))
    schedule = sc.plan(calibration, alpha=100.0)
    second = [path for path in schedule.rows if path.startswith("transformer_2")]
    assert {schedule.rows[path].computed for path in second} == {steps("#####..#")}
    fresh = []
    for boundary in (3, 5):
        with sc.cached(turns, schedule):
            fresh.append(turns.generate(boundary=boundary))
    with sc.cached(turns, schedule) as run:
        assert same([turns.generate(boundary=boundary) for boundary in (3, 5)], fresh)
    assert run.summary().recomputed == {NOTHING_KEPT: len(second)}
    assert (run.summary().finished, run.summary().held_bytes) == (2, 0)


def wan(**options: Any) -> Any:
    torch.manual_seed(0)
    transformers = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=layers,
        ).eval()
        for layers in (2, 1)
    ]
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=transformers[0],
        transformer_2=transformers[1],
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_wan(pipe: Any, seed: int = 0) -> Tensor:
    prompts = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(9))
    latents: Tensor = pipe(
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        num_inference_steps=STEPS,
        height=32,
        width=32,
        num_frames=5,
        guidance_scale=3.0,
        guidance_scale_2=2.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames
    return latents


@every_granularity
def test_calibrating_wan_with_two_transformers(granularity: Any) -> None:
    """Each step calls one of them twice, with the prompt and without."""
    pipe = wan(boundary_ratio=0.85)
    calibration = calibrated(
        pipe, lambda i: run_wan(pipe, i), num_samples=1, granularity=granularity
    )
    boundary = sum(float(t) >= 850 for t in pipe.scheduler.timesteps)
    assert 1 < boundary < STEPS - 1
    assert calibration.steps_run == tuple(runs_at(x, boundary) for x in paths(calibration.layers))
    assert calibration.solver == "UniPCMultistepScheduler"
    schedule = sc.plan(calibration, alpha=100.0)
    with MacCounter() as uncached:
        run_wan(pipe)
    with sc.cached(pipe, schedule) as run, MacCounter() as counter:
        run_wan(pipe)
    assert schedule.compute == pytest.approx(counter.total / uncached.total, rel=0.01)
    assert run.summary().recomputed == {}
    assert run.summary().reused >= 2 * schedule.reused > 0


# ----------------------------------------------------------- generations that begin in the middle


@pytest.mark.parametrize("start", [1, 3, 6])
@every_granularity
def test_image_to_image_is_calibrated_for_the_steps_that_it_runs(
    start: int, granularity: Any
) -> None:
    pipe = Pipe(transformer=build("single", depth=2))
    generate = functools.partial(pipe.generate, start=start)
    calibration = calibrated(pipe, lambda i: generate(seed=i), granularity=granularity)
    assert calibration.timesteps == tuple(times()[start:])
    assert calibration.num_steps == STEPS - start
    with MacCounter() as uncached:
        plain = generate()
    for schedule in (
        sc.plan(calibration, alpha=100.0),
        sc.Schedule.uniform(pipe, STEPS - start, 2, granularity=granularity),
    ):
        with sc.cached(pipe, schedule) as run, MacCounter() as counter:
            got = generate()
            again = generate()
        assert torch.equal(got, again)
        assert torch.equal(got, plain) == (not schedule.reused)
        assert run.summary().recomputed == {}
        assert run.summary().finished == 2
        assert run.summary().reused == 2 * schedule.reused
        if schedule.compute is not None:
            measured = counter.total / (2 * uncached.total)
            assert schedule.compute == pytest.approx(measured, rel=0.01)


def test_image_to_image_of_another_strength_is_refused() -> None:
    pipe = Pipe(transformer=build("single", depth=2))
    calibration = calibrated(pipe, lambda i: pipe.generate(seed=i, start=3))
    schedule = sc.plan(calibration, alpha=100.0)
    for start in (0, 1, 2, 4, 5):
        handle = sc.enable(pipe, schedule)
        with pytest.raises(sc.ScheduleMismatchError, match=r"plan"):
            pipe.generate(start=start)
        handle.disable()
    with sc.cached(pipe, schedule) as run:
        pipe.generate(start=3)
    assert run.summary().finished == 1
