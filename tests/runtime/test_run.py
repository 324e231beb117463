"""What happens at a reuse, and to generations that are not quite as planned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.pairwise import pairwise
from support.reference import STEPS, ByHand, levels, same, sample, times
from support.toys import TOYS, WIDTH, Attention, Block, Mlp, SharedLayerToy, Toy, build
from torch import Tensor, nn

import smoothcache as sc
from smoothcache.runtime.call import Call
from smoothcache.runtime.reused_layer import ReusedLayer
from smoothcache.runtime.row_plan import RowPlan
from smoothcache.runtime.summary import Tally

every_toy = pytest.mark.parametrize("toy_name", TOYS)
every_predictor = pytest.mark.parametrize("predictor", sc.PREDICTORS)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy() -> Toy:
    return build("single", depth=2)


def uniform(model: Any, interval: int = 2, predictor: str = "hold") -> sc.Schedule:
    return sc.Schedule.uniform(model, STEPS, interval, predictor=predictor, noise_levels=levels())


def answers(predictor: str, computed: list[bool], value: Callable[[int], Any]) -> list[Any]:
    """What a layer under a schedule returns at each step."""
    layer = ReusedLayer(RowPlan("layer", computed, predictor), call := Call(), Tally())
    got = []
    for step in range(len(computed)):
        layer.expire(step)
        call.begin(step, 0)
        got.append(layer(lambda *_, step=step: value(step), (), {}))
    return got


UNEVEN = [True, True, False, True, False, False, False, True, False, True, False]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_extrapolation_is_exact_for_polynomials(order: int) -> None:
    name = {0: "hold", 1: "taylor", 2: "taylor2"}[order]
    base = torch.randn(3, 4, dtype=torch.float64)

    def value(step: int) -> Tensor:
        return sum(base.roll(k) * step**k for k in range(order + 1)) + torch.zeros_like(base)

    for step, got in enumerate(answers(name, UNEVEN, value)):
        if sum(UNEVEN[: step + 1]) > order or UNEVEN[step]:
            torch.testing.assert_close(got, value(step))


def test_hold_is_the_last_computed_value() -> None:
    got = answers("hold", UNEVEN, lambda step: torch.tensor([float(step)]))
    assert [int(x) for x in got] == [0, 1, 1, 3, 3, 3, 3, 7, 7, 9, 9]


def test_taylor_before_it_has_two_values_holds() -> None:
    got = answers(
        "taylor2", [True, False, True, False, True, False], lambda s: torch.ones(1) * s * s
    )
    assert [round(float(x), 4) for x in got] == [0, 0, 4, 6, 16, 25]


@every_predictor
def test_outputs_of_any_structure(predictor: str) -> None:
    def value(step: int) -> Any:
        x = torch.full((2,), float(step))
        return {"a": (x, None), "b": [x + 1, "text", torch.tensor([step])]}

    for got in answers(predictor, [True, True, False, False], value)[2:]:
        assert list(got) == ["a", "b"]
        assert isinstance(got["a"], tuple) and got["a"][1] is None
        assert got["b"][1] == "text"
        assert torch.equal(got["a"][0] + 1, got["b"][0])
        assert got["b"][2].dtype == torch.int64 and int(got["b"][2]) == 1


@every_predictor
def test_what_a_reuse_gives_may_be_written_into(predictor: str) -> None:
    row = [True, True, False, False, False]
    layer = ReusedLayer(RowPlan("layer", row, predictor), call := Call(), Tally())
    got = []
    for step in range(5):
        call.begin(step, 0)
        output = layer(lambda *_, step=step: torch.full((2,), float(step)), (), {})
        got.append(output.clone())
        output.fill_(100.0)
    expected = [0, 1, 1, 1, 1] if predictor == "hold" else [0, 1, 2, 3, 4]
    assert [float(x[0]) for x in got] == expected


@every_predictor
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(predictor: str, dtype: torch.dtype) -> None:
    for got in answers(predictor, UNEVEN, lambda step: torch.full((2,), float(step), dtype=dtype)):
        assert got.dtype == dtype


def test_a_layer_called_twice_has_two_values() -> None:
    toy = build("shared", depth=1)
    layers = tuple(sc.find_layers(toy))
    rows = {x.path: sc.Row.uniform(STEPS, STEPS) for x in layers}
    with sc.cached(toy, sc.Schedule(STEPS, rows, layers)) as run:
        trajectory = sample(toy)
    assert isinstance(toy, SharedLayerToy)
    assert run.summary().reused == (STEPS - 1) * 3  # attention once, feed-forward twice
    assert not same(trajectory, sample(toy))


@every_toy
@pytest.mark.parametrize(
    "give", [lambda x: x, lambda x: x.clone(), lambda x: x.to(torch.float64).float()]
)
def test_guidance_in_two_calls(toy_name: str, give: Callable[[Tensor], Tensor]) -> None:
    """With the same tensor for both calls or with copies, each call reuses its own values."""
    toy = build(toy_name, depth=2)
    schedule = uniform(toy, 3)
    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, calls=2, begin=by_hand.begin)
    with sc.cached(toy, schedule) as run:
        got = sample(toy, calls=2, give=give)
        again = sample(toy, calls=2, give=give)
    summary = run.summary()
    assert same(got, again)
    assert summary.finished == 2
    if not summary.recomputed:
        assert same(got, expected)
    # With copies the first step could be two generations, so step 1 is computed; once is enough.
    assert sum(summary.recomputed.values()) in (0, summary.reused // 4)


def test_latents_modified_between_the_two_calls(toy: Toy) -> None:
    schedule = uniform(toy, 4)
    x = torch.randn(1, 6, WIDTH)
    with sc.cached(toy, schedule) as run:
        for time in times():
            for branch in range(2):
                toy.denoise(x, torch.tensor([time]), torch.tensor([branch]))
                x.mul_(0.9)
    assert run.summary().finished == 1
    assert 0 < sum(run.summary().recomputed.values()) <= 2 * 4


@every_toy
def test_guidance_in_two_calls_in_the_middle_only(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    schedule = uniform(toy, 2)

    def calls(step: int) -> int:
        return 2 if 3 <= step < 6 else 1

    by_hand = ByHand(toy, schedule)
    expected = sample(by_hand.toy, calls=calls, begin=by_hand.begin)
    with sc.cached(toy, schedule) as run:
        got = sample(toy, calls=calls)
        assert run.summary().held_bytes == 0
    assert same(got, expected)
    assert sum(run.summary().recomputed.values()) == by_hand.recomputed > 0


def test_guidance_that_pauses_does_not_reuse_what_is_too_old(toy: Toy) -> None:
    schedule = uniform(toy, 3)  # computes steps 0, 3, 6
    with sc.cached(toy, schedule) as run:
        sample(toy, calls=lambda step: 1 if step == 3 else 2)
    # The second call was absent at step 3: it has nothing for step 4, and then for step 5 it has.
    assert sum(run.summary().recomputed.values()) == len(schedule.rows)


def test_guidance_in_one_batch_in_some_steps_only(toy: Toy) -> None:
    """Each batch size has values of its own, for as long as the schedule says."""
    schedule = uniform(toy, 4)  # computes steps 0 and 4
    by_hand = ByHand(toy, schedule)

    def batches(
        model: Toy, begin: Callable[[int, int], None] = lambda step, branch: None
    ) -> list[Tensor]:
        x, outputs = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(0)), []
        for step, time in enumerate(times()):
            n = 1 if step in (2, 3, 6) else 2
            begin(step, n)
            out = model.denoise(x.repeat(n, 1, 1), torch.full((n,), time), torch.arange(n))
            outputs.append(out)
            x = x - out.mean(dim=0, keepdim=True) / STEPS
        return outputs

    def begin(step: int, branch: int) -> None:
        if step == 4:  # all that was kept before is too old from here on
            by_hand.outputs.clear()
        by_hand.begin(step, branch)

    expected = batches(by_hand.toy, begin)
    with sc.cached(toy, schedule) as run:
        assert same(batches(toy), expected)
    assert run.summary().recomputed == {
        "no value had been computed for this call": 2 * len(schedule.rows)
    }
    assert sum(run.summary().recomputed.values()) == by_hand.recomputed


class AnyTimeToy(Toy):
    """Takes a timestep of any kind."""

    def forward(self, x: Tensor, t: Any, y: Tensor) -> Tensor:
        return super().forward(x, torch.as_tensor(t).float().reshape(-1).expand(len(x)), y)


@pytest.mark.parametrize(
    "kind",
    [
        float,
        int,
        torch.tensor,
        lambda t: torch.tensor([t]),
        lambda t: torch.tensor([int(t)]),
        lambda t: torch.tensor(t / 1000, dtype=torch.bfloat16),
        lambda t: torch.tensor([1 - t / 1000], dtype=torch.float16),
        lambda t: torch.full((2,), t, dtype=torch.float64),
    ],
)
def test_timesteps_of_any_kind(kind: Callable[[float], Any]) -> None:
    torch.manual_seed(0)
    toy = AnyTimeToy(depth=2).eval()
    x, y = torch.randn(2, 6, WIDTH), torch.tensor([0, 1])
    schedule = uniform(toy)
    with sc.cached(toy, schedule) as run:
        for _ in range(2):
            for time in times():
                toy(x, kind(time), y)
    assert run.summary().finished == 2
    assert run.summary().reused == 2 * schedule.reused
    assert not run.summary().recomputed


def test_a_call_without_a_timestep_says_so(toy: Toy) -> None:
    class Timeless(Toy):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.long))

    model = Timeless(depth=1)
    with (
        pytest.raises(sc.ScheduleMismatchError, match="Timeless was called without a timestep"),
        sc.cached(model, uniform(model)),
    ):
        model(torch.zeros(1, 6, WIDTH))


def test_a_batch_at_several_timesteps_is_refused(toy: Toy) -> None:
    with (
        pytest.raises(sc.ScheduleMismatchError, match="at different timesteps"),
        sc.cached(toy, uniform(toy)),
    ):
        toy(torch.zeros(2, 6, WIDTH), torch.tensor([900.0, 100.0]), torch.tensor([0, 1]))


@pairwise(
    "toy_name, predictor, mode",
    TOYS,
    sc.PREDICTORS,
    (nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad),
)
def test_modes(toy_name: str, mode: Callable[[], Any], predictor: str) -> None:
    toy = build(toy_name, depth=2)
    schedule = uniform(toy, 3, predictor)
    with sc.cached(toy, schedule):
        expected = sample(toy)
    with mode(), sc.cached(toy, schedule):
        got = sample(toy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_toy
def test_with_gradients_no_graph_is_kept(toy_name: str) -> None:
    toy = build(toy_name, depth=2).requires_grad_(True)
    with torch.enable_grad(), sc.cached(toy, uniform(toy, 4)) as run:
        x = torch.randn(1, 6, WIDTH, requires_grad=True)
        for time in times():
            out = toy.denoise(x, torch.tensor([time]), torch.tensor([0]))
            out.sum().backward()  # a graph of an earlier step would have been freed by now
            assert x.grad is not None
    assert run.summary().reused


@every_toy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precisions(toy_name: str, dtype: torch.dtype) -> None:
    toy = build(toy_name, depth=2).to(dtype)
    toy.condition = lambda t, y: (t[:, None].to(dtype) / 1000).expand(-1, WIDTH)  # type: ignore[method-assign]
    x = torch.randn(1, 6, WIDTH).to(dtype)
    outputs = []
    for interval in (1, 2):
        with sc.cached(toy, uniform(toy, interval, "taylor")):
            outputs.append([toy.denoise(x, torch.tensor([t]), torch.tensor([0])) for t in times()])
    assert all(out.dtype == dtype and out.isfinite().all() for out in outputs[1])
    assert same(outputs[0][::2], outputs[1][::2]) or toy_name == "parallel-block"


def test_the_summary_counts(toy: Toy) -> None:
    schedule = uniform(toy, 2)
    run = sc.enable(toy, schedule)
    assert run.summary().finished == run.summary().computed == run.summary().reused == 0
    sample(toy, timesteps=times()[:3])
    assert run.summary().steps_under_way == 3
    sample(toy)
    run.disable()
    summary = run.summary()
    assert (summary.finished, summary.broken_off, summary.steps_under_way) == (1, 1, 0)
    layers = len(schedule.rows)
    assert (summary.computed, summary.reused) == ((2 + 4) * layers, (1 + 4) * layers)
    assert summary.reused_fraction == pytest.approx(5 / 11)
    assert summary.held_bytes == 0


def test_a_schedule_that_reused_nothing_is_reported(toy: Toy) -> None:
    with sc.cached(toy, uniform(toy)) as run:
        with pytest.warns(sc.SmoothCacheWarning, match=r"reused nothing.*shape of the inputs"):
            for step, time in enumerate(times()):
                n = step + 1
                toy(
                    torch.zeros(n, 6, WIDTH),
                    torch.full((n,), time),
                    torch.zeros(n, dtype=torch.long),
                )
        assert "NOTHING WAS REUSED" in str(run.summary())


def test_layers_that_never_ran_are_reported() -> None:
    def bypass(block: Any, x: Tensor) -> Tensor:  # not to be seen in the code of the block
        return block.attn.proj(block.attn.qkv(x)[..., :WIDTH]) + block.mlp.fc2(block.mlp.fc1(x))

    class Bypassed(Block):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + bypass(self, x)

    class BypassedToy(Toy):
        block = Bypassed

    toy = BypassedToy(depth=1)
    with (
        sc.cached(toy, uniform(toy)) as run,
        pytest.warns(sc.SmoothCacheWarning, match="none of its layers ran"),
    ):
        sample(toy)
    assert run.summary().never_ran == ("blocks.0.attn", "blocks.0.mlp")
    assert "never ran: 2 (blocks.0.attn, blocks.0.mlp)" in str(run.summary())


def test_a_generation_of_one_step(toy: Toy) -> None:
    schedule = sc.Schedule.uniform(toy, 1, 1)
    plain = sample(toy, 1)
    with sc.cached(toy, schedule) as run:
        for _ in range(3):
            assert same(sample(toy, 1), plain)
    assert run.summary().held_bytes == 0


def test_a_lone_call_before_the_generation(toy: Toy) -> None:
    """A trial of the model at another time, as warming up does."""
    calibration = sc.calibrate(
        toy, lambda i: toy.generate(STEPS, seed=i), num_samples=1, progress=False
    )
    schedule = sc.plan(calibration, alpha=10.0)
    with sc.cached(toy, schedule):
        fresh = sample(toy)
    with sc.cached(toy, schedule) as run:
        toy.denoise(torch.zeros(1, 6, WIDTH), torch.tensor([500.0]), torch.tensor([0]))
        assert same(sample(toy), fresh)
    assert (run.summary().finished, run.summary().broken_off) == (1, 1)


def test_layers_called_outside_of_the_model_run_as_they_are(toy: Toy) -> None:
    x = torch.randn(1, 6, WIDTH)
    plain = toy.blocks[0].attn(x)
    with sc.cached(toy, uniform(toy)) as run:
        sample(toy)
        before = run.summary()
        assert torch.equal(toy.blocks[0].attn(x), plain)
        assert run.summary().computed == before.computed


def test_disabling_inside_the_block(toy: Toy) -> None:
    plain = sample(toy)
    with sc.cached(toy, uniform(toy)) as run:
        sample(toy)
        run.disable()
        assert same(sample(toy), plain)
    assert run.summary().finished == 1


def test_two_models_at_once(toy: Toy) -> None:
    other = copy.deepcopy(toy)
    with sc.cached(toy, uniform(toy, 2)) as a, sc.cached(other, uniform(other, 4)) as b:
        first, second = sample(toy), sample(other)
    assert a.summary().reused != b.summary().reused
    with sc.cached(toy, uniform(toy, 4)):
        assert same(sample(toy), second)
    assert not same(first, second)


class Pipe:
    """As much of a pipeline as is asked for: components, and a scheduler with timesteps."""

    def __init__(self, **components: Any) -> None:
        self.scheduler = SimpleNamespace(timesteps=torch.arange(1000).flip(0))
        self.components = {**components, "scheduler": self.scheduler, "tokenizer": None}

    def announce(self, timesteps: list[float]) -> list[float]:
        self.scheduler.timesteps = torch.tensor(timesteps)
        return timesteps


def test_two_denoisers_share_a_trajectory(toy: Toy) -> None:
    """The second takes over in the middle; what the first kept is dropped when its use is over."""
    high, low = toy, build("single", seed=1, depth=2)
    pipe = Pipe(transformer=high, transformer_2=low)
    schedule = uniform(pipe, 3)
    assert {path.split(".")[0] for path in schedule.rows} == {"transformer", "transformer_2"}
    held = []
    with sc.cached(pipe, schedule) as run:
        x = torch.randn(1, 6, WIDTH)
        for step, time in enumerate(pipe.announce(times())):
            model = high if step < 5 else low
            x = x - model(x, torch.tensor([time]), torch.tensor([0])) / STEPS
            held.append(run.summary().held_bytes)
    layers, size = len(schedule.rows) // 2, x.nbytes
    # Computed at 0, 3 and 6. The second has nothing at step 5; what the first kept for that step
    # is dropped when step 6 begins.
    assert [n / (layers * size) for n in held] == [1, 1, 0, 1, 1, 1, 1, 0]
    assert run.summary().reused == layers * 4
    assert sum(run.summary().recomputed.values()) == layers
    assert run.summary().finished == 1


def test_image_to_image_starts_in_the_middle(toy: Toy) -> None:
    pipe = Pipe(transformer=toy)
    schedule = uniform(pipe, 4)
    with sc.cached(pipe, schedule) as run:
        for start in (3, 5):
            x = torch.randn(1, 6, WIDTH)
            for time in pipe.announce(times())[start:]:
                x = x - toy(x, torch.tensor([time]), torch.tensor([0])) / STEPS
    summary = run.summary()
    assert summary.finished == 2
    layers = len(schedule.rows)
    assert sum(summary.recomputed.values()) == 2 * layers
    assert summary.reused == layers * (3 + 2)


def test_a_solver_with_two_calls_a_step(toy: Toy) -> None:
    """Heun: the scheduler lists every timestep but the first twice."""
    pipe = Pipe(transformer=toy)
    schedule = uniform(pipe, 2)
    with sc.cached(pipe, schedule) as run:
        for _ in range(2):
            x = torch.randn(1, 6, WIDTH)
            twice = [t for i, t in enumerate(times()) for t in [t] * (1 + (i > 0))]
            for time in pipe.announce(twice):
                x = x - toy(x, torch.tensor([time]), torch.tensor([0])) / STEPS
    assert run.summary().finished == 2
    assert run.summary().reused > schedule.reused


class OddBlock(nn.Module):
    """Layers that return a tuple with nothing in front, and a mapping."""

    class Attn(Attention):
        def forward(self, x: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
            return None, super().forward(x)

    class Ffn(Mlp):
        def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
            return {"flag": True, "out": super().forward(x)}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.mlp = self.Attn(dim), self.Ffn(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(x + c[:, None])[1]
        out: Tensor = self.mlp(x)["out"]
        return x + out


@every_predictor
def test_layers_with_odd_outputs(predictor: str) -> None:
    class OddToy(Toy):
        block = OddBlock

    torch.manual_seed(0)
    toy = OddToy(depth=2).eval()
    schedule = uniform(toy, 3, predictor)
    by_hand = sc.calibrate(toy, lambda i: sample(toy, seed=i), num_samples=1, progress=False)
    assert len(by_hand.layers) == 4
    plain = sample(toy)
    with sc.cached(toy, schedule) as run:
        got = sample(toy)
    assert run.summary().reused == schedule.reused
    assert same(plain[0], got[0]) and not same(plain, got)


def test_a_denoiser_that_calls_another() -> None:
    """After the inner call the outer one goes on: its later layers are kept and reused, too."""
    inner = build("single", depth=1)

    class Outer(Toy):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            c = self.condition(t, y)
            h = self.blocks[0](self.x_embedder(x), c)
            h = h + inner(x, t, y)
            return self.head(self.blocks[1](h, c))

    torch.manual_seed(1)
    outer = Outer(depth=2).eval().requires_grad_(False)
    pipe = SimpleNamespace(components={"transformer": outer, "controlnet": inner})
    with sc.cached(pipe, sc.Schedule.uniform(pipe, 6, 2)) as run:
        outer.generate(6)
    assert not run.summary().never_ran
    last = run._layers.by_path["transformer.blocks.1.mlp"]
    assert last.ran
    assert run.summary().computed + run.summary().reused + sum(
        run.summary().recomputed.values()
    ) == 6 * len(run._layers.by_path)
