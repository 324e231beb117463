"""Under torch.compile: one graph for each pattern of steps, in any order, and nothing is lost.

``fullgraph=True`` raises where a graph breaks, so every test with it also says that none does.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.other_tools import zoo_model, zoo_sample
from support.pairwise import pairwise
from support.toys import CLASSES, TOKENS, WIDTH, Block, Toy, build
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import smoothcache as sc
from smoothcache.runtime.summary import NOT_FINITE

STEPS = 6
LEVELS = (0.95, 0.8, 0.6, 0.5, 0.3, 0.1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """Compiles from the beginning, says nothing, and never falls back to uncompiled code."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.compiler.reset()
    yield
    logger.setLevel(level)
    torch.compiler.reset()


class Counting:
    """A backend that runs graphs as they are, and knows what is in them."""

    def __init__(self) -> None:
        self.graphs: list[Counter[str]] = []
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        operations = [
            str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes
        ]
        self.graphs.append(Counter(operations))

        def run(*inputs: Any) -> Any:
            self.calls += 1
            return graph.forward(*inputs)

        return run


def uniform(model: Any, interval: int = 2, predictor: str = "hold", **options: Any) -> sc.Schedule:
    return sc.Schedule.uniform(model, STEPS, interval, predictor=predictor, **options)


def denoised(model: Any, seed: int = 0, *, batch: int = 1, calls: int = 1) -> Tensor:
    """What ``Toy.generate`` does, through something that may wrap the toy."""
    x = torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    y = torch.full((batch,), seed % CLASSES)
    for i in range(STEPS):
        t = torch.full((batch,), 1000 * (1 - i / STEPS))
        x = x - sum(model(x, t, (y + call) % CLASSES) for call in range(calls)) / (STEPS * calls)
    return x


def compiled(model: nn.Module, how: str, backend: Any, **options: Any) -> Any:
    options = {"fullgraph": True, **options, "backend": backend}
    if how == "wrapped":
        return torch.compile(model, **options)
    parts = model.get_submodule("blocks").children() if "blocks" in how else [model]
    for part in parts:
        if "forward" in how:
            part.forward = torch.compile(part.forward, **options)
        else:
            part.compile(**options)
    return model


def expected(model: Any, schedule: sc.Schedule, **options: Any) -> list[Tensor]:
    """Two generations, uncompiled."""
    with sc.cached(model, schedule):
        return [denoised(model, seed, **options) for seed in (0, 1)]


def close(a: list[Tensor], b: list[Tensor], atol: float = 1e-6) -> bool:
    return all(torch.allclose(x, y, atol=atol, rtol=1e-5) for x, y in zip(a, b, strict=True))


@pairwise(
    "how, order, fullgraph",
    ("wrapped", "in place", "blocks", "its forward", "forward of blocks"),
    ("EC", "CE", "CRE", "ECDE"),
    (True, False),
)
def test_one_graph_for_each_pattern_in_any_order(how: str, order: str, fullgraph: bool) -> None:
    """E enables, C compiles, R runs, D disables."""
    toy, backend = build("single", depth=1 + ("blocks" in how)), Counting()
    schedule = uniform(toy)
    plain, under_schedule = denoised(toy), expected(toy, schedule)
    before = {name: dict(vars(module)) for name, module in toy.named_modules()}
    model: Any = toy
    handle: Any = None
    for letter in order:
        if letter == "E":
            handle = sc.enable(model, schedule)
        elif letter == "C":
            model = compiled(toy, how, backend, fullgraph=fullgraph)
        elif letter == "R":
            denoised(model)
        else:
            denoised(model)
            handle.disable()
    known = len(backend.graphs) if order == "CRE" else 0
    first = denoised(model)
    graphs, asked = len(backend.graphs) - known, torch._dynamo.utils.curr_frame
    assert graphs <= schedule.patterns + 1
    assert all(map(torch.equal, [first, denoised(model, 1)], under_schedule))
    assert torch._dynamo.utils.curr_frame == asked  # nor does PyTorch ask itself whether to compile
    assert len(backend.graphs) - known == graphs  # nothing is compiled in a second generation
    assert handle.summary().reused == 2 * schedule.reused
    assert not handle.summary().recomputed
    handle.disable()
    assert torch.equal(denoised(model), plain)
    for name, module in toy.named_modules():
        left = dict(vars(module))
        for of_torch in ("_compiled_call_impl", "_is_torch_compile"):
            left.pop(of_torch, None)
        if "forward" in how:
            left.pop("forward", None)
        assert left == before[name]


@pairwise(
    "toy_name, predictor, granularity, has_gains",
    ("single", "dual", "shared", "instance-forward", "parallel-block", "in-place"),
    ("hold", "taylor", "taylor2-angle"),
    ("auto", "block", "model"),
    (False, True),
)
def test_any_model_predictor_and_granularity(
    toy_name: str, predictor: str, granularity: Any, has_gains: bool
) -> None:
    toy, backend = build(toy_name, depth=1), Counting()
    schedule = uniform(toy, 3, predictor, granularity=granularity, noise_levels=LEVELS)
    if has_gains:
        gains = tuple(0.5 + step / 10 for step in range(STEPS))
        rows = {path: replace(row, gains=gains) for path, row in schedule.rows.items()}
        plain, schedule = schedule, replace(schedule, rows=rows)
        assert predictor == "hold" or not close(expected(toy, plain), expected(toy, schedule))
    under_schedule = expected(toy, schedule)
    with sc.cached(toy, schedule):
        toy.compile(backend=backend, fullgraph=True)
        assert close([denoised(toy, seed) for seed in (0, 1)], under_schedule)
    # None for what is the same in the first step, which has not been seen yet.
    assert len(backend.graphs) <= schedule.patterns + 1


class TwiceBlock(Toy):
    """Its first block is used twice, for all tokens and for half of them."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.x_embedder(x), self.condition(t, y)
        for block in self.blocks:
            h = block(h, c)
            h = h + block(h[:, ::2], c).mean(dim=1, keepdim=True)
        return self.head(h)


def test_layers_in_a_block_that_is_used_twice() -> None:
    """Where the block is reused, it is not known which uses of its layers are to come."""
    torch.manual_seed(0)
    toy, backend = TwiceBlock(depth=1).eval().requires_grad_(False), Counting()
    block, mlp = (
        sc.CacheLayer("blocks.0", "block", "blocks.0"),
        sc.CacheLayer("blocks.0.mlp", "ffn", "blocks.0"),
    )
    rows = {block.path: sc.Row.uniform(STEPS, 2), mlp.path: sc.Row.uniform(STEPS, STEPS)}
    schedule = sc.Schedule(STEPS, rows, (block, mlp))
    under_schedule = expected(toy, schedule)
    with sc.cached(toy, schedule) as run:
        toy.compile(backend=backend, fullgraph=True)
        assert close([denoised(toy, seed) for seed in (0, 1)], under_schedule)
    with sc.cached(toy, schedule) as uncompiled:
        torch.compiler.reset()
        toy._compiled_call_impl = None
        for seed in (0, 1):
            denoised(toy, seed)
    assert run.summary().reused == uncompiled.summary().reused
    assert run.summary().computed == uncompiled.summary().computed


def test_blocks_and_the_layers_in_them() -> None:
    """Where a block is reused, its layers are told; that must not compile anything anew."""
    toy, backend = build("single", depth=2), Counting()
    layers = [*sc.find_layers(toy, granularity="block"), *sc.find_layers(toy)]
    schedule = uniform(toy, layers=layers)
    under_schedule = expected(toy, schedule)
    with sc.cached(toy, schedule):
        toy.compile(backend=backend, fullgraph=True)
        assert close([denoised(toy, seed) for seed in (0, 1)], under_schedule)
    assert len(backend.graphs) == schedule.patterns + 1


def test_a_forward_that_is_never_compiled_makes_no_compiled_model() -> None:
    """A part with ``torch.compiler.disable`` on its forward, in a model that nobody compiles."""
    toy = build("single", depth=1)

    class Norm(nn.LayerNorm):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    toy.blocks[0].norm1.__class__ = Norm
    schedule = uniform(toy)
    with sc.cached(toy, schedule, store="cpu") as run:  # which a compiled model refuses
        denoised(toy)
    assert run.summary().reused == schedule.reused


def test_a_reused_step_of_the_whole_model_runs_nothing_of_it() -> None:
    toy, backend = build("single", depth=2), Counting()
    schedule = uniform(toy, STEPS, granularity="model")
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    toy.head.register_forward_pre_hook(count)
    with sc.cached(toy, schedule):
        toy.compile(backend=backend, fullgraph=True)
        denoised(toy)
    assert calls == 1
    assert not any(graph["linear"] or graph["layer_norm"] for graph in backend.graphs)


def test_what_only_fed_a_reused_layer_is_dropped() -> None:
    seen: list[Counter[str]] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.append(
            Counter(
                str(node.target).split(".")[1]
                for node in graph.graph.nodes
                if "aten" in str(node.target)
            )
        )
        return graph.forward

    backend = aot_autograd(fw_compiler=look, inference_compiler=look)
    toy = build("single", depth=3)
    with torch.inference_mode(), sc.cached(toy, uniform(toy)):
        toy.compile(backend=backend, fullgraph=True)
        denoised(toy)
    _, reuse, compute = seen
    assert compute["native_layer_norm"] == 6
    assert not reuse["native_layer_norm"]
    # Of the embedders, the modulation (its gates are in use) and the head; no other.
    assert reuse["addmm"] + reuse["mm"] == 3 + 3 + 1
    assert reuse["add"] + reuse["mul"] < compute["add"] + compute["mul"]


def test_guidance_in_two_calls_and_another_batch() -> None:
    toy, backend = build("single", depth=1), Counting()
    schedule = uniform(toy, 3, "taylor")
    wanted = expected(toy, schedule, calls=2), expected(toy, schedule, calls=2, batch=3)
    with sc.cached(toy, schedule) as run:
        toy.compile(backend=backend, fullgraph=True)
        assert close([denoised(toy, seed, calls=2) for seed in (0, 1)], wanted[0])
        assert len(backend.graphs) == schedule.patterns + 1
        assert close([denoised(toy, seed, calls=2, batch=3) for seed in (0, 1)], wanted[1])
        assert close([denoised(toy, seed, calls=2) for seed in (0, 1)], wanted[0])
    assert run.summary().reused == 12 * schedule.reused
    assert run.summary().held_bytes == 0


def test_any_batch_size_has_one_graph_once_they_vary() -> None:
    toy, backend = build("single", depth=1), Counting()
    with sc.cached(toy, uniform(toy)):
        toy.compile(backend=backend, fullgraph=True)
        for batch in (2, 3):
            denoised(toy, batch=batch)
        graphs = len(backend.graphs)
        for batch in (4, 5):
            denoised(toy, batch=batch)
    assert len(backend.graphs) == graphs


def test_a_generation_broken_off_is_forgotten() -> None:
    toy = build("single", depth=1)
    schedule = uniform(toy)
    under_schedule = expected(toy, schedule)
    with sc.cached(toy, schedule) as run:
        toy.compile(backend="eager", fullgraph=True)
        denoised(toy)
        toy(torch.zeros(1, TOKENS, WIDTH), torch.tensor([1000.0]), torch.tensor([0]))
        run.reset()
        assert close([denoised(toy, seed) for seed in (0, 1)], under_schedule)


def test_compiled_in_the_middle_of_a_generation() -> None:
    toy = build("single", depth=1)
    schedule = uniform(toy, 3, "taylor")
    under_schedule = expected(toy, schedule)[0]

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if t.item() == 500:  # a step that reuses
            toy.compile(backend="eager", fullgraph=True)
        out: Tensor = toy(x, t, y)
        return out

    with sc.cached(toy, schedule) as run:
        assert close([denoised(model)], [under_schedule])
    assert run.summary().reused == schedule.reused


def test_slots_stay_where_they_are_and_go_when_disabled() -> None:
    toy = build("single", depth=1)
    handle = sc.enable(toy, uniform(toy, 2, "taylor"))
    toy.compile(backend="eager", fullgraph=True)
    layer = handle._layers.by_path["blocks.0.mlp"].compiled

    def addresses() -> list[int]:
        return [x.data_ptr() for uses in layer._slots.values() for s in uses for x in s._buffers()]

    def numbers() -> list[int]:
        return [id(x) for uses in layer._slots.values() for s in uses for x in s._tensors.values()]

    denoised(toy)
    first, held, known = addresses(), handle.summary().held_bytes, numbers()
    assert held == 2 * 2 * TOKENS * WIDTH * 4  # two layers, two values each
    denoised(toy, 1)
    assert addresses() == first and numbers() == known
    handle.disable()
    assert not addresses()
    assert handle.summary().held_bytes == 0


@pytest.mark.parametrize("predictor", ["hold", "taylor"])
def test_what_is_not_finite_is_not_reused(predictor: str) -> None:
    class Fails(Toy):
        def condition(self, t: Tensor, y: Tensor) -> Tensor:
            return super().condition(t, y) + torch.where(t == 500, torch.inf, 0.0)[:, None]

    torch.manual_seed(0)
    toy = Fails(depth=1).eval().requires_grad_(False)
    x, y = torch.randn(1, TOKENS, WIDTH), torch.tensor([0])
    times = [1000.0, 900.0, 500.0, 400.0, 300.0, 200.0]

    def outputs() -> list[Tensor]:
        return [toy(x, torch.tensor([t]), y) for t in times]

    with sc.cached(toy, uniform(toy, 2, predictor), check_finite=True) as run:
        toy.compile(backend="eager", fullgraph=True)
        got = outputs() + outputs()
    assert [bool(out.isfinite().all()) for out in got] == 2 * [True, True, False, True, True, True]
    assert run.summary().recomputed == {NOT_FINITE: 4}


def test_a_generation_that_was_not_finite_does_no_harm_to_the_next() -> None:
    """A kept value that weighs nothing is in the sum all the same, and 0 times infinity is NaN."""

    class Spoilt(Toy):
        def condition(self, t: Tensor, y: Tensor) -> Tensor:
            return super().condition(t, y) + self.spoils

        spoils = torch.zeros(())

    torch.manual_seed(0)
    toy = Spoilt(depth=1).eval().requires_grad_(False)
    schedule = uniform(toy, 2, "taylor")
    wanted = expected(toy, schedule)
    with sc.cached(toy, schedule):
        toy.compile(backend="eager", fullgraph=True)
        first = denoised(toy)
        toy.spoils.fill_(torch.inf)
        assert not denoised(toy).isfinite().any()
        toy.spoils.zero_()
        assert close([first, denoised(toy, 1)], wanted)


class FewerTokens(Toy):
    """Its blocks see fewer tokens in later steps, for inputs of one shape."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.x_embedder(x), self.condition(t, y)
        kept = h if self.all_tokens else h[:, ::2]
        for block in self.blocks:
            kept = block(kept, c)
        return self.head(kept.mean(dim=1, keepdim=True) + h)

    all_tokens = True


def test_other_shapes_inside_the_model_are_computed() -> None:
    """What was computed at step 4 fits nothing that is kept, so step 5 computes as well."""
    torch.manual_seed(0)
    toy = FewerTokens(depth=1).eval().requires_grad_(False)
    schedule = uniform(toy)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        toy.all_tokens = t.item() > 400
        out: Tensor = toy(x, t, y)
        return out

    row = sc.Row((True, False, True, False, True, True))
    with sc.cached(toy, sc.Schedule(STEPS, dict.fromkeys(schedule.rows, row), schedule.layers)):
        wanted = denoised(model)
    with sc.cached(toy, schedule) as run:
        toy.compile(backend="eager", fullgraph=True)
        assert close([denoised(model)], [wanted])
    assert sum(run.summary().recomputed.values()) == 2


class Overwriting:
    """A backend whose graphs return the same tensors each time, as CUDA graphs do.

    Whenever any graph runs, what all of them returned before is overwritten.
    """

    def __init__(self) -> None:
        self._returned: list[Tensor] = []
        self.backend = aot_autograd(fw_compiler=self._compile, inference_compiler=self._compile)

    def _compile(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        own: list[Any] = []

        def replay(*inputs: Any) -> Any:
            outputs = [x.clone() if isinstance(x, Tensor) else x for x in graph.forward(*inputs)]
            for old in self._returned:
                old.fill_(torch.nan if old.is_floating_point() else -1)
            if not own:
                own.extend(outputs)
            for place, value in zip(own, outputs, strict=True):
                if isinstance(value, Tensor):
                    place.resize_(value.shape).copy_(value)
            self._returned = [x for x in own if isinstance(x, Tensor)]
            return tuple(own)

        replay._boxed_call = False  # type: ignore[attr-defined]
        return replay


@pairwise(
    "granularity, predictor, how",
    ("layer", "block", "model"),
    ("hold", "taylor2"),
    ("in place", "blocks"),
)
def test_nothing_is_kept_where_the_next_replay_writes(
    how: str, granularity: Any, predictor: str
) -> None:
    toy = build("single", depth=1 + (how == "blocks"))
    schedule = uniform(toy, 3, predictor, granularity=granularity)
    with torch.no_grad():
        under_schedule = expected(toy, schedule)
        with sc.cached(toy, schedule):
            compiled(toy, how, Overwriting().backend)
            assert close([denoised(toy, seed) for seed in (0, 1)], under_schedule)


@pytest.mark.parametrize("predictor", ["hold", "taylor"])
def test_what_graphs_write_into_is_known_to_stay_where_it_is(predictor: str) -> None:
    """CUDA graphs are not used for a graph that writes into any other input."""
    written: list[tuple[set[int], set[int]]] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        about: Any = torch._guards.TracingContext.get().fw_metadata
        written.append((set(about.mutated_inp_runtime_indices), set(about.static_input_indices)))
        return graph.forward

    toy = build("single", depth=1)
    with torch.no_grad(), sc.cached(toy, uniform(toy, 2, predictor)):
        toy.compile(backend=aot_autograd(fw_compiler=look, inference_compiler=look), fullgraph=True)
        denoised(toy)
    assert [len(inputs) for inputs, _ in written] == [0, 0, 2]  # nothing, reuse, compute
    assert all(inputs <= static for inputs, static in written)


@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")  # torch, of itself
@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("wrapped", None),
        ("blocks", None),
        ("in place", "reduce-overhead"),
        ("wrapped", "max-autotune"),
    ],
)
def test_inductor(how: str, mode: str | None) -> None:
    toy = build("single", depth=1 + (how == "blocks"))
    schedule = uniform(toy, 2, "taylor")
    with torch.inference_mode():
        under_schedule = expected(toy, schedule)
        model = compiled(toy, how, "inductor", mode=mode)
        with sc.cached(model, schedule):
            assert close([denoised(model, seed) for seed in (0, 1)], under_schedule, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "how", "order"),
    [
        ("DiTTransformer2DModel", "wrapped", "CE"),
        ("WanTransformer3DModel", "repeated blocks", "EC"),
        ("SD3Transformer2DModel", "wrapped", "EC"),
    ],
)
def test_models_of_diffusers(name: str, how: str, order: str) -> None:
    def generated(model: Any, seed: int) -> Tensor:
        return zoo_sample(name, model, seed, STEPS)

    model: Any = zoo_model(name)
    if how == "wrapped":  # two blocks are enough, and compile in half the time
        del model.transformer_blocks[1:-1]
    backend, schedule = Counting(), uniform(model, 2, "taylor")
    with torch.no_grad():
        plain = generated(model, 0)
        with sc.cached(model, schedule):
            under_schedule = [generated(model, seed) for seed in (0, 1)]
        used, handle = model, sc.enable(model, schedule) if order == "EC" else None
        if how == "wrapped":
            used = torch.compile(model, backend=backend, fullgraph=True)
        else:
            model.compile_repeated_blocks(backend=backend, fullgraph=True)
        handle = handle or sc.enable(used, schedule)
        found = [generated(used, 0)]
        graphs = len(backend.graphs)
        found.append(generated(used, 1))
        assert close(found, under_schedule, atol=1e-5)
        assert len(backend.graphs) == graphs
        if how == "wrapped":
            assert graphs <= schedule.patterns + 1
        assert handle.summary().reused == 2 * schedule.reused
        handle.disable()
        assert torch.allclose(generated(used, 0), plain, atol=1e-5)


@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
def test_calibration_of_a_compiled_model(how: str) -> None:
    toy = build("single", depth=1)
    plain = sc.calibrate(toy, lambda i: denoised(toy, i), num_samples=1, progress=False)
    model = compiled(toy, how, "eager")
    again = sc.calibrate(model, lambda i: denoised(model, i), num_samples=1, progress=False)
    assert (again.errors[~torch.tensor(again.errors).isnan().numpy()] >= 0).any()
    assert str(again) == str(plain)


def test_a_copy_of_a_compiled_cached_model_is_plain() -> None:
    toy = build("single", depth=1)
    plain = denoised(toy)
    with sc.cached(toy, uniform(toy)):
        toy.compile(backend="eager", fullgraph=True)
        denoised(toy)
        twin = copy.deepcopy(toy)
    assert torch.equal(denoised(twin), plain)


def test_the_blocks_of_a_toy_are_one_class() -> None:
    assert isinstance(build("single").blocks[0], Block)  # that "blocks" compiles one code for all
