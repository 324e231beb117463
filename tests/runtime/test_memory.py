"""Memory: what is kept is told before, stays below a limit, and may lie on the host."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.made_up import calibration_of
from support.toys import TOKENS, TOYS, WIDTH, Block, Toy, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import smoothcache as sc
from smoothcache.errors import InvalidArgumentError, SmoothCacheError
from smoothcache.planners._within_memory import within_bytes
from smoothcache.planners.uniform import plan_uniform
from smoothcache.runtime.call import Call
from smoothcache.runtime.host_memory import Parked
from smoothcache.runtime.reused_layer import ReusedLayer
from smoothcache.runtime.row_plan import RowPlan
from smoothcache.runtime.summary import Tally
from smoothcache.schedule.expected_cost import buffer_bytes, peak_bytes
from smoothcache.schedule.row import Row

STEPS = 7


def calibrated(toy: Toy, **options: Any) -> sc.Calibration:
    return sc.calibrate(
        toy, lambda i: toy.generate(STEPS, seed=i), num_samples=1, progress=False, **options
    )


def generated(toy: Toy, schedule: sc.Schedule, **options: Any) -> tuple[Tensor, Any]:
    with sc.cached(toy, schedule, **options) as run:
        out = toy.generate(STEPS, seed=1)
    return out, run.summary()


@pytest.mark.parametrize("predictor", ["hold", "taylor", "taylor2"])
@pytest.mark.parametrize("per", ["kind", "block"])
@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5])
def test_the_peak_is_what_the_schedule_says(alpha: float, per: Any, predictor: str) -> None:
    toy = build("single")
    schedule = sc.plan(calibrated(toy), alpha=alpha, per=per, predictor=predictor)
    _, summary = generated(toy, schedule)
    assert summary.peak_bytes == schedule.peak_bytes
    assert summary.held_bytes == 0


@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
@pytest.mark.parametrize("interval", [1, 2, 3, STEPS])
def test_the_peak_at_every_granularity(interval: int, granularity: Any) -> None:
    toy = build("single")
    calibration = calibrated(toy, granularity=granularity)
    schedule = plan_uniform(calibration, interval=interval)
    assert generated(toy, schedule)[1].peak_bytes == schedule.peak_bytes
    assert schedule.peak_bytes == (0 if interval == 1 else schedule.buffer_bytes)


def test_at_most_one_output_of_each_reused_layer_is_alive() -> None:
    toy = build("single")
    schedule = plan_uniform(calibrated(toy), interval=3)
    assert schedule.peak_bytes == sum(layer.nbytes or 0 for layer in schedule.layers or ())


def test_buffers_of_a_compiled_model_are_as_large_as_was_said() -> None:
    toy = build("single", depth=2)
    torch.compiler.reset()
    schedule = plan_uniform(calibrated(toy), interval=2, predictor="taylor")
    with sc.cached(toy, schedule) as run:
        toy.compile(backend="eager", fullgraph=True)
        toy.generate(STEPS)
        held = run.summary().held_bytes
    torch.compiler.reset()
    assert held == schedule.buffer_bytes


def test_observed_layers_know_their_bytes() -> None:
    toy = build("single", depth=1)
    layers = sc.observe_layers(toy, lambda i: toy.generate(2, batch=3))
    with torch.no_grad():
        output = toy.blocks[0].mlp(torch.zeros(3, 6, 16))
    assert {layer.nbytes for layer in layers} == {output.nbytes}


def test_bytes_are_not_known_without_a_run() -> None:
    schedule = sc.Schedule.uniform(build("single"), STEPS, 2)
    assert schedule.peak_bytes is None
    assert schedule.buffer_bytes is None
    assert sc.Schedule(3, {"attn": Row((True, False, True))}).peak_bytes is None


def test_bytes_survive_their_file(tmp_path: Path) -> None:
    schedule = sc.plan(calibrated(build("single")), alpha=0.1)
    schedule.save(tmp_path / "s.json")
    assert sc.Schedule.load(tmp_path / "s.json") == schedule
    again = sc.Schedule.load(tmp_path / "s.json").bind(sc.find_layers(build("single")))
    assert again.peak_bytes == schedule.peak_bytes is not None


def test_a_residual_is_kept_in_the_dtype_of_the_output() -> None:
    """Also where the input is wider, as that of a first block under autocast may be."""
    wide, narrow = torch.randn(1, 3, 4), torch.randn(1, 3, 4, dtype=torch.bfloat16)
    row = (True, False, False)
    layer = ReusedLayer(
        RowPlan("block", row, "taylor"), call := Call(), tally := Tally(), residual=True
    )
    for step in range(3):
        call.begin(step, 0)
        out = layer(lambda x: narrow, (wide,), {})
        assert out.dtype == torch.bfloat16
        assert tally.peak_bytes == narrow.nbytes


class Operations(TorchDispatchMode):
    """Counts the operations that make new tensors of floats, of the size of a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        of_tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_new = isinstance(out, Tensor) and all(
            x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() for x in of_tensors
        )
        if is_new and out.shape == (1, TOKENS, WIDTH):
            self.counted[func.__name__.split(".")[0]] += 1
        return out


def made_at_each_step(toy: Toy, schedule: sc.Schedule) -> list[Counter[str]]:
    """Which operations make new tensors of that size, step by step."""
    counts = []
    with sc.cached(toy, schedule):
        x, y = torch.randn(1, TOKENS, WIDTH), torch.zeros(1, dtype=torch.long)
        for step in range(schedule.num_steps):
            with Operations() as operations:
                toy(x, torch.tensor([1000.0 - step]), y)
            counts.append(operations.counted)
    return counts


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_nothing_is_made_but_kept_values_and_what_is_handed_out(
    granularity: Any, inference: bool
) -> None:
    toy = build("single")
    with torch.inference_mode(inference), torch.no_grad():
        plain, *_ = made_at_each_step(toy, sc.Schedule.uniform(toy, 4, 1))
        layers = sc.find_layers(toy, granularity=granularity)
        schedule = sc.Schedule.uniform(toy, 8, 3, layers=layers)
        _, middle, last, computed, *_ = made_at_each_step(toy, schedule)
    number = len(layers)
    assert computed - plain == {"clone": number}  # what is kept; of a block, made in that copy
    assert not plain - computed
    added = {"add": number} if granularity == "block" else {}
    assert {**added, "clone": number}.items() <= middle.items()  # what is handed out, as the layer
    assert middle - plain == {"clone": number}  # would have made it itself
    assert not last["clone"] and not last - plain  # at its last use the value itself


class Moody(Toy):
    """Its block begins to write into its input, unseen by PyTorch, when it is told to."""

    class block(Block):
        writes = False

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            out: Tensor = super().forward(x, c)
            if self.writes:
                x.data.copy_(out)
            return out


@pytest.mark.parametrize("inference", [False, True])
def test_what_a_block_adds_is_right_though_it_begins_to_write_into_its_input(
    inference: bool,
) -> None:
    torch.manual_seed(0)
    toy = Moody(depth=1).eval().requires_grad_(False)
    layers = sc.find_layers(toy, granularity="block")
    x, y = torch.randn(1, TOKENS, WIDTH), torch.zeros(1, dtype=torch.long)
    outputs = []
    schedule = sc.Schedule.uniform(toy, 4, 2, layers=layers)
    with torch.inference_mode(inference), sc.cached(toy, schedule) as run:
        for step in range(4):
            toy.blocks[0].writes = step >= 2
            outputs.append(toy(x, torch.tensor([1000.0 - step]), y))
    assert run.summary().reused == 2
    torch.testing.assert_close(outputs[3], outputs[2])


def layers_with(nbytes: list[int], macs: list[int]) -> list[sc.CacheLayer]:
    pairs = enumerate(zip(nbytes, macs, strict=True))
    return [sc.CacheLayer(f"b.{i}", "ffn", "b", macs=m, nbytes=n) for i, (n, m) in pairs]


@given(
    nbytes=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    macs=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    limit=st.integers(0, 300),
    predictor=st.sampled_from(["hold", "taylor", "taylor2"]),
    data=st.data(),
)
def test_a_limit_drops_what_gains_least_for_its_bytes(
    nbytes: list[int], macs: list[int], limit: int, predictor: str, data: st.DataObject
) -> None:
    layers = layers_with(nbytes, macs)
    rows = {
        layer.path: Row(
            (True, *data.draw(st.lists(st.booleans(), min_size=5, max_size=5))), predictor
        )
        for layer in layers
    }
    limited = within_bytes(rows, layers, limit)
    kept = [x for x in layers if limited[x.path] == rows[x.path]]
    dropped = [x for x in layers if limited[x.path] != rows[x.path]]

    def gain(layer: sc.CacheLayer) -> float:
        used = buffer_bytes(rows[layer.path], layer) or 1
        return (layer.macs or 0) * rows[layer.path].computed.count(False) / used

    def total(of: list[sc.CacheLayer]) -> int:
        return sum(buffer_bytes(rows[x.path], x) or 0 for x in of)

    assert total(kept) <= limit
    assert (peak_bytes(limited, layers) or 0) <= total(kept)
    assert all(all(limited[x.path].computed) for x in dropped)
    for x in dropped:  # beside what gains as much or more, there is no room for it
        assert total([x, *(y for y in kept if gain(y) >= gain(x))]) > limit


def test_a_plan_within_a_limit_keeps_to_it() -> None:
    toy = build("single")
    calibration = calibrated(toy)
    free = sc.plan(calibration, alpha=0.3)
    assert free.buffer_bytes is not None
    limit = free.buffer_bytes // 2
    half = sc.plan(calibration, alpha=0.3, max_bytes=limit)
    assert 0 < generated(toy, half)[1].peak_bytes <= limit
    assert free.compute is not None and half.compute is not None
    assert free.compute < half.compute < 1
    assert half.provenance["max_bytes"] == str(limit)
    assert sc.plan(calibration, alpha=0.3, max_bytes=free.buffer_bytes).rows == free.rows
    assert sc.plan(calibration, alpha=0.3, max_bytes=0).is_all_compute


@pytest.mark.parametrize("bad", [-1, 1.5, "1 GB"])
def test_a_limit_is_a_number_of_bytes(bad: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="max_bytes"):
        sc.plan(calibrated(build("single")), alpha=0.3, max_bytes=bad)


def test_a_limit_needs_the_bytes() -> None:
    with pytest.raises(InvalidArgumentError, match="calibrate again"):
        sc.plan(calibration_of(), alpha=0.3, max_bytes=1000)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("predictor", ["hold", "taylor2"])
def test_on_the_host_the_same_is_kept(name: str, predictor: str) -> None:
    toy = build(name)
    schedule = sc.Schedule.uniform(toy, STEPS, 3, predictor=predictor)
    wanted, on_device = generated(toy, schedule)
    out, on_host = generated(toy, schedule, store="cpu")
    assert torch.equal(out, wanted)
    assert on_host == on_device


def test_values_on_the_host_are_brought_back_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int]] = []

    def noted(name: str) -> Any:
        do = getattr(Parked, name)

        def run(value: Parked) -> Any:
            events.append((name, id(value)))
            return do(value)

        return run

    for name in ("prefetch", "fetch"):
        monkeypatch.setattr(Parked, name, noted(name))
    toy = build("single", depth=3)
    generated(toy, sc.Schedule.uniform(toy, STEPS, STEPS), store="cpu")
    fetched = [i for i, (name, _) in enumerate(events) if name == "fetch"]
    assert len(fetched) == 6 * (STEPS - 1)
    for i in fetched:
        begun = [j for j in range(i) if events[j] == ("prefetch", events[i][1])]
        assert begun  # by the layer before, or the call
    order = [value for name, value in events if name == "fetch"][:6]
    for value, following in pairwise(order):
        assert events.index(("prefetch", following)) < events.index(("fetch", value))


def test_what_is_fetched_is_a_copy() -> None:
    value = torch.arange(3.0)
    parked = Parked(value)
    parked.fetch().zero_()
    assert torch.equal(parked.fetch(), torch.arange(3.0))
    assert parked.nbytes == value.nbytes


def test_a_store_is_one_of_two() -> None:
    toy = build("single")
    with pytest.raises(InvalidArgumentError, match="'disk'"):
        sc.enable(toy, sc.Schedule.uniform(toy, STEPS, 2), store="disk")  # type: ignore[arg-type]


def test_a_compiled_model_keeps_nothing_on_the_host() -> None:
    toy = build("single", depth=1)
    toy.compile(backend="eager")
    with (
        pytest.raises(SmoothCacheError, match="store='cpu'"),
        sc.cached(toy, sc.Schedule.uniform(toy, STEPS, 2), store="cpu"),
    ):
        toy.generate(STEPS)
    torch.compiler.reset()
