"""Learning routers: what they come to, and that nothing else changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learned_cache import learned_schedule
from support.reference import STEPS, times
from support.toys import TOYS, WIDTH, Block, Toy, build
from support.traces import assert_same_traces, traces
from torch import Tensor, nn

import smoothcache as sc
from smoothcache.layers import identify
from smoothcache.learning.routed_layer import RoutedLayer
from smoothcache.runtime.call import Call
from smoothcache.runtime.reused_layer import ReusedLayer
from smoothcache.runtime.row_plan import RowPlan
from smoothcache.runtime.summary import Tally

LAYERED = sorted(set(TOYS) - {"parallel-block"})  # its layers are whole blocks
every_toy = pytest.mark.parametrize("toy_name", LAYERED)


def generate(toy: Toy, **options: Any) -> Callable[[int], Tensor]:
    @torch.no_grad()
    def sample(i: int) -> Tensor:
        return toy.generate(STEPS, seed=i, **options)

    return sample


def calibrated(model: Any, sample: Callable[[int], Any], **options: Any) -> sc.Calibration:
    return sc.calibrate(model, sample, num_samples=1, max_gap=1, progress=False, **options)


def learned(
    model: Any,
    sample: Callable[[int], Any],
    calibration: sc.Calibration | None = None,
    **options: Any,
) -> sc.Routers:
    calibration = calibration or calibrated(model, sample)
    if not {"compute", "penalty"} & set(options):
        options["compute"] = 0.8
    given = {"num_samples": 2, "epochs": 1, "progress": False, **options}
    return sc.learn_routers(model, sample, calibration, **given)


class HalfConstantBlock(Block):
    """Its attention puts out the same at every step, its feed-forward follows the timestep."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        same = torch.linspace(-1, 1, WIDTH).expand(x.shape)
        return x + self.attn(same) + self.mlp(c[:, None] * 3).expand(x.shape)


class HalfConstantToy(Toy):
    block = HalfConstantBlock


@pytest.mark.parametrize("interval", [2, 3])
def test_what_changes_is_computed_and_what_does_not_is_reused(interval: int) -> None:
    torch.manual_seed(0)
    toy = HalfConstantToy(depth=2).eval()
    routers = learned(
        toy,
        generate(toy),
        compute=0.75,
        interval=interval,
        num_samples=3,
        epochs=3,
        learning_rate=1.0,
    )
    free = [step for step in range(STEPS) if step % interval]
    kinds = np.array([layer.kind for layer in routers.layers])
    constant, changing = (routers.values[kinds == kind][:, free] for kind in ("self_attn", "ffn"))
    assert constant.max() < changing.min()
    schedule = sc.plan_learned(routers, threshold=(constant.max() + changing.min()) / 2)
    assert schedule.table()[kinds == "ffn"].all()
    assert not schedule.table()[kinds == "self_attn"][:, free].any()
    with torch.no_grad(), sc.cached(toy, schedule):
        torch.testing.assert_close(toy.generate(STEPS), generate(toy)(0))


def two_steps(toy: Toy) -> Callable[[int], Tensor]:
    @torch.no_grad()
    def sample(i: int) -> Tensor:
        return toy.generate(2, seed=i)

    return sample


@pytest.mark.parametrize("seed", range(6))
def test_the_best_layers_are_chosen_for_every_budget(seed: int) -> None:
    """Two steps, so one decision a layer: all decisions are tried for real."""
    toy = build("single", seed=seed, depth=2)
    scales = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist()
    outputs = [part for x in toy.blocks for part in (x.attn.proj, x.mlp.fc2)]
    for part, scale in zip(outputs, scales, strict=True):  # layers that matter more, and less
        part.weight.mul_(4.0 ** (scale - 1))
    sample = two_steps(toy)
    calibration = calibrated(toy, sample)
    layers = tuple(replace(layer, macs=100) for layer in calibration.layers)
    calibration = replace(calibration, layers=layers, total_macs=400)
    plain = sample(0)

    def error(reused: tuple[int, ...]) -> float:
        rows = {x.path: sc.Row((True, i not in reused)) for i, x in enumerate(layers)}
        with sc.cached(toy, sc.Schedule(2, rows, layers)):
            return float((sample(0) - plain).square().sum())

    routers = learned(
        toy, sample, calibration, compute=0.75, num_samples=1, epochs=40, learning_rate=0.5
    )
    for count in range(1, 4):
        best = min(itertools.combinations(range(4), count), key=error)
        schedule = sc.plan_learned(routers, compute=1 - count / 8)
        assert [i for i, x in enumerate(schedule.table()[:, 1]) if not x] == list(best)


def test_a_higher_penalty_computes_less() -> None:
    toy = build("single", depth=2)
    means = [
        learned(toy, generate(toy), penalty=penalty, epochs=3).values[:, 1::2].mean()
        for penalty in (0.0, 1e-3, 1.0)
    ]
    assert means[0] > 0.5 > means[2]
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize("budget", [0.6, 0.9, 1.0])
def test_the_routers_spend_the_budget_that_they_are_trained_for(budget: float) -> None:
    toy = build("single", depth=2)
    calibration = calibrated(toy, generate(toy))
    routers = learned(toy, generate(toy), calibration, compute=budget, epochs=3)
    macs = np.array([layer.macs for layer in routers.layers])
    saved = (macs[:, None] * (1 - routers.values)).sum()
    assert 1 - saved / (calibration.total_macs * STEPS) == pytest.approx(budget, abs=1e-4)


@every_toy
@pytest.mark.parametrize("options", [{}, {"interval": 3, "predictor": "taylor"}], ids=str)
def test_learned_schedules_run_and_keep_their_budget(toy_name: str, options: Any) -> None:
    toy = build(toy_name, depth=2)
    sample = generate(toy, guidance_calls=2)
    routers = learned(toy, sample, compute=0.75, **options)
    interval = options.get("interval", 2)
    assert (routers.values[:, ::interval] == 1).all()
    assert ((routers.values > 0) & (routers.values < 1)).sum() == len(routers.layers) * (
        STEPS - len(range(0, STEPS, interval))
    )
    schedule = sc.plan_learned(routers, compute=0.75)
    assert schedule.reused and schedule.compute is not None and schedule.compute <= 0.75
    with sc.cached(toy, schedule) as run:
        sample(5)
    assert run.summary().reused >= 2 * schedule.reused
    assert not run.summary().recomputed


def test_two_denoisers_that_take_turns() -> None:
    """The second begins at a step where everything else is free to reuse, and has nothing yet."""
    toys = {"transformer": build("single", depth=1), "transformer_2": build("dual", 1, depth=1)}
    pipe = SimpleNamespace(
        components=dict(toys), scheduler=SimpleNamespace(timesteps=torch.tensor(times()))
    )

    @torch.no_grad()
    def sample(i: int) -> Tensor:
        pipe.scheduler.timesteps = torch.tensor(times())
        x = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(i))
        for step, time in enumerate(times()):
            toy = toys["transformer" if step < 5 else "transformer_2"]
            x = x - toy.denoise(x, torch.tensor([time]), torch.tensor([0])) / STEPS
        return x

    routers = learned(pipe, sample, compute=0.8)
    for layer, row in zip(routers.layers, routers.values, strict=True):
        free = {7} if layer.path.startswith("transformer_2.") else {1, 3}
        assert set(np.flatnonzero(row < 1)) == free
    schedule = sc.plan_learned(routers, compute=0.8)
    with sc.cached(pipe, schedule) as run:
        sample(0)
    assert run.summary().reused == schedule.reused
    assert not run.summary().recomputed


@pytest.mark.parametrize(("budget", "interval"), [(0.75, 2), (0.6, 3), (0.4, 4)])
def test_the_benchmark_finds_an_interval_that_leaves_a_choice(budget: float, interval: int) -> None:
    toy = build("single", depth=2)
    calibration = calibrated(toy, generate(toy))
    schedule, cost = learned_schedule(
        toy, generate(toy), calibration, budget, num_samples=1, epochs=1
    )
    assert schedule.provenance["interval"] == str(interval)
    assert schedule.compute is not None and budget - 0.1 < schedule.compute <= budget
    assert cost > 1


@given(
    later=st.lists(st.booleans(), min_size=1, max_size=8),
    predictor=st.sampled_from([name for name, x in sc.PREDICTORS.items() if x.axis == "step"]),
)
def test_shares_of_0_and_1_are_what_a_schedule_does(later: list[bool], predictor: str) -> None:
    row = (True, *later)
    reused = ReusedLayer(RowPlan("layer", row, predictor), call := Call(), Tally())
    routed = RoutedLayer(predictor)
    values = torch.randn(len(row), 2, 3, generator=torch.Generator().manual_seed(0))
    for step, is_computed in enumerate(row):
        share = None if step == 0 else torch.tensor(float(is_computed))
        outputs = []
        call.begin(step, 0)
        routed.begin(step, 0, share)
        for handler in (reused, routed):
            outputs.append(handler(lambda step=step: (values[step], None), (), {})[0])
        torch.testing.assert_close(outputs[1], outputs[0])


def test_a_share_between_mixes() -> None:
    routed = RoutedLayer("hold")
    routed.begin(0, 0)
    routed(lambda: (torch.zeros(2), 7), (), {})
    share = torch.tensor(0.25, requires_grad=True)
    routed.begin(1, 0, share)
    mixed, other = routed(lambda: (torch.tensor([1.0, 2.0]), 7), (), {})
    assert mixed.tolist() == [0.25, 0.5] and other == 7
    (slope,) = torch.autograd.grad(mixed.sum(), [share])
    assert float(slope) == 3
    routed.begin(2, 0, torch.tensor(0.5))
    other_shape = routed(lambda: (torch.ones(3), 7), (), {})[0]
    assert other_shape.tolist() == [1, 1, 1] and not routed.mixed


@every_toy
def test_samples_and_model_come_out_as_they_would_without(toy_name: str) -> None:
    toy = build(toy_name, depth=2)
    sample = generate(toy, guidance_calls=2)
    calibration = calibrated(toy, sample)
    plain = [sample(i) for i in range(2)]
    weights = {name: value.clone() for name, value in toy.state_dict().items()}
    before, seen, state = traces(toy), {}, torch.get_rng_state()

    def watched(i: int) -> None:
        seen[i] = sample(i)

    learned(toy, watched, calibration)
    assert all(torch.equal(seen[i], plain[i]) for i in range(2))
    assert_same_traces(before, traces(toy))
    assert all(torch.equal(toy.state_dict()[name], value) for name, value in weights.items())
    assert torch.equal(torch.get_rng_state(), state)


class WritingToy(Toy):
    """Writes into the latents that it is given."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x.mul_(1.1), t, y)


def test_a_model_that_writes_into_its_input_does_so_once() -> None:
    torch.manual_seed(0)
    toy = WritingToy(depth=1).eval()
    sample = generate(toy)
    calibration, plain, seen = calibrated(toy, sample), sample(0), []
    learned(toy, lambda i: seen.append(sample(i)), calibration, num_samples=1)
    assert torch.equal(seen[0], plain)


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_and_their_flags_are_left_as_found(fails: bool) -> None:
    toy = build("single", depth=2)
    calibration = calibrated(toy, generate(toy))
    for index, parameter in enumerate(toy.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    kept = next(toy.parameters())
    kept.grad = torch.ones_like(kept)
    flags = [parameter.requires_grad for parameter in toy.parameters()]
    before = traces(toy)

    def sample(i: int) -> Tensor:  # with gradients switched on, as outside of pipelines
        if fails and i == 1:
            toy.generate(STEPS, stop_after=4)
            raise Stop
        return toy.generate(STEPS, seed=i)

    if fails:
        with pytest.raises(Stop):
            learned(toy, sample, calibration)
    else:
        learned(toy, sample, calibration)
    assert [parameter.requires_grad for parameter in toy.parameters()] == flags
    assert [p.grad is not None for p in toy.parameters()] == [True] + [False] * (len(flags) - 1)
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert_same_traces(before, traces(toy))


def test_a_failing_layer_leaves_nothing_behind() -> None:
    toy = build("single", depth=2)
    calibration = calibrated(toy, generate(toy))
    before = traces(toy)
    count = 0

    def fail(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:  # in the second run of step 1
            raise Stop

    handle = toy.head.register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        learned(toy, generate(toy), calibration)
    handle.remove()
    assert_same_traces(before, traces(toy))
    assert not learned(toy, generate(toy), calibration).values[:, 1].max() == 1


def test_the_same_seed_learns_the_same() -> None:
    toy = build("single", depth=2)
    calibration = calibrated(toy, generate(toy))
    options: dict[str, Any] = {"num_samples": 4, "epochs": 2}
    first = learned(toy, generate(toy), calibration, **options)
    torch.manual_seed(123)
    again = learned(toy, generate(toy), calibration, **options)
    assert np.array_equal(first.values, again.values)
    other = learned(toy, generate(toy), calibration, seed=1, **options)
    assert not np.array_equal(first.values, other.values)


def test_it_says_what_it_did_and_what_it_cost(capfd: pytest.CaptureFixture[str]) -> None:
    toy = build("single", depth=2)
    routers = learned(toy, generate(toy), progress=True, num_samples=3, epochs=2)
    shown = capfd.readouterr().err
    assert "learning" in shown and "6/6" in shown and "error" in shown and "compute" in shown
    # Of 8 steps 4 run once; 4 run twice and back.
    assert routers.provenance["training cost"] == "12.0 generations"
    assert routers.provenance["epochs"] == "2"
    assert (routers.model, routers.num_steps) == (identify(toy), STEPS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compute": 0.8, "penalty": 0.1}, "exactly one of compute and penalty"),
        ({"compute": None}, "exactly one of compute and penalty"),
        ({"compute": 0}, r"compute must be in \(0, 1\], got 0"),
        ({"compute": 1.2}, r"compute must be in \(0, 1\]"),
        ({"compute": "half"}, "compute must be a finite number"),
        ({"compute": 0.4}, r"no routers are as cheap as 0.400.*interval of 2.*larger interval"),
        ({"penalty": -1}, "penalty must not be negative"),
        ({"penalty": float("nan")}, "penalty must be a finite number"),
        ({"interval": 1}, "interval must be an integer of at least 2"),
        ({"predictor": "spline"}, "over the step.*got 'spline'"),
        ({"num_samples": 0}, "num_samples must be"),
        ({"epochs": 1.5}, "epochs must be"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_arguments_are_checked_first(options: dict[str, Any], words: str) -> None:
    toy = build("single", depth=2)
    calibration = calibrated(toy, generate(toy))

    def never(i: int) -> None:
        raise AssertionError("sampled")

    with pytest.raises(sc.InvalidArgumentError, match=words):
        learned(toy, never, calibration, **options)


def refused(
    toy: Toy,
    sample: Any,
    words: str,
    error: type[Exception] = sc.CalibrationError,
    calibration: Any = None,
    **options: Any,
) -> None:
    """Learning raises, and leaves no trace."""
    calibration = calibration or calibrated(toy, generate(toy))
    before = traces(toy)
    with pytest.raises(error, match=words):
        learned(toy, sample, calibration, **options)
    assert_same_traces(before, traces(toy))


def test_samples_that_cannot_be_trained_on() -> None:
    toy = build("single", depth=2)
    sample = generate(toy)

    def inference(i: int) -> None:
        with torch.inference_mode():
            toy.generate(STEPS)

    refused(toy, inference, r"sample\(\d\) runs under torch.inference_mode.*no_grad")
    refused(toy, lambda i: None, r"sample\(\d\) never ran the model")
    refused(toy, lambda i: [sample(i), sample(i)], r"sample\(\d\) started a second generation")
    refused(toy, lambda i: toy.generate(STEPS - 1), r"ran 7 steps, but the calibration has 8")
    refused(
        toy, lambda i: toy.generate(STEPS + 1), r"reached step 9, but the calibration has 8 steps"
    )
    refused(toy, "sample", "sample must be a function", sc.InvalidArgumentError)


def test_calibrations_that_do_not_fit() -> None:
    toy, other = build("single", depth=2), build("dual", depth=2)
    calibration = calibrated(toy, generate(toy))
    sample = generate(other)
    invalid = sc.InvalidArgumentError
    refused(other, sample, "of another model", sc.ScheduleMismatchError, calibration)
    refused(
        other,
        sample,
        "missing from the model",
        sc.ScheduleMismatchError,
        replace(calibration, model=None),
    )
    refused(toy, generate(toy), "expected a Calibration, got str", invalid, "dit.safetensors")
    unknown = replace(calibration, total_macs=0)
    refused(toy, generate(toy), "pass a penalty instead", invalid, unknown)
    assert learned(toy, generate(toy), unknown, penalty=0.1).total_macs == 0


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_whole_blocks_are_refused(granularity: Any) -> None:
    toy = build("single", depth=2)
    calibration = calibrated(toy, generate(toy), granularity=granularity)
    refused(
        toy, generate(toy), 'granularity="layer"', sc.InvalidArgumentError, calibration=calibration
    )


class SwitchedOff(Toy):
    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)


def test_a_model_that_lets_no_gradient_through() -> None:
    torch.manual_seed(0)
    toy = SwitchedOff(depth=1).eval()
    refused(toy, generate(toy), "no gradient flows from the denoiser's output.*step 1")


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        toy = Toy(depth=1).eval()
    refused(toy, generate(toy), "created under torch.inference_mode", sc.InvalidArgumentError)


def test_gradient_checkpointing_is_refused() -> None:
    toy = build("single", depth=2)
    toy.is_gradient_checkpointing = True
    refused(toy, generate(toy), "disable_gradient_checkpointing", sc.InvalidArgumentError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite(value: float) -> None:
    toy = build("single", depth=2)
    calibration = calibrated(toy, generate(toy))
    toy.head.weight.fill_(value)
    refused(toy, generate(toy), "not finite at step 1", calibration=calibration)


def test_a_model_in_use_is_refused() -> None:
    toy: nn.Module = build("single", depth=2)
    calibration = calibrated(toy, generate(toy))  # type: ignore[arg-type]
    flags = [parameter.requires_grad for parameter in toy.requires_grad_(True).parameters()]
    with sc.cached(toy, sc.Schedule.uniform(toy, STEPS, 2)):
        before = traces(toy)
        with pytest.raises(sc.AlreadyCachedError, match="disable"):
            learned(toy, generate(toy), calibration)  # type: ignore[arg-type]
        assert_same_traces(before, traces(toy))
        toy.generate(STEPS)  # type: ignore[operator]
    assert [parameter.requires_grad for parameter in toy.parameters()] == flags
