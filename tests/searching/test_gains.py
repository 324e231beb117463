"""Gains: fitted where the next computed step begins, with the denoiser run once at each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from support.reference import same
from support.toys import Toy, build
from torch import Tensor, nn

import smoothcache as sc
from smoothcache.searching.gains import LARGEST_GAIN, Recorder, Trajectory, fit_gains

STEPS = 12
COMPUTED = tuple(step in (0, 2, 5, 9) for step in range(STEPS))


class Curve(nn.Module):
    """A denoiser whose output bends over time, in one direction, whatever it is given."""

    def __init__(self, curve: Callable[[float], float]) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.linspace(0.5, 1.5, 6), requires_grad=False)
        self._curve = curve
        self.calls = 0

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls += 1
        shift = 1.0 if label is None else float(label.flatten()[0])
        return shift * self._curve(float(timestep)) * self.direction.expand_as(x)


def sampler(model: nn.Module, guided: bool = False) -> Callable[[int], Tensor]:
    def sample(i: int) -> Tensor:
        x = torch.randn(1, 6, generator=torch.Generator().manual_seed(i))
        for step in range(STEPS):
            t = torch.tensor(1 - step / STEPS)
            if guided:
                labels = torch.tensor([[2.0]]), torch.tensor([[0.5]])
                with_label, without = (model(x, t, label) for label in labels)
                output = without + 3 * (with_label - without)
            else:
                output = model(x, t)
            x = x - output / STEPS
        return x

    return sample


def of_denoiser(model: Any, row: sc.Row) -> sc.Schedule:
    (layer,) = sc.find_layers(model, granularity="model")
    return sc.Schedule(STEPS, {layer.path: row}, (layer,))


def fitted(
    model: Any, sample: Callable[[int], Any], row: sc.Row, numbers: tuple[int, ...] = (0, 1)
) -> sc.Row:
    references = {}
    for i in numbers:
        output, trajectory = Recorder(model).run(model, lambda i=i: sample(i))
        references[i] = (trajectory, output.flatten())
    return fit_gains(model, sample, of_denoiser(model, row), references)


def error(model: Any, sample: Callable[[int], Tensor], row: sc.Row, i: int) -> float:
    wanted = sample(i)
    with sc.cached(model, of_denoiser(model, row)) as run:
        output = sample(i)
    assert not run.summary().recomputed
    return float((output - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("predictor", ["taylor", "taylor2"])
def test_what_bends_in_one_direction_is_met_exactly(guided: bool, predictor: str) -> None:
    model = Curve(lambda t: 1 + t + 0.6 * t**2)
    sample = sampler(model, guided)
    plain = sc.Row(COMPUTED, predictor)
    row = fitted(model, sample, plain)
    assert row.gains is not None and row.computed == COMPUTED and row.predictor == predictor
    # At the first gap one value is known, and nothing can be predicted; the error made there is
    # corrected in the next gap.
    assert row.gains[1] == 1
    for i in (0, 1, 7):
        assert error(model, sample, row, i) < 1e-5
        assert error(model, sample, plain, i) > 1e-3


def test_gains_are_for_reused_steps_and_alike_in_a_gap() -> None:
    model = Curve(lambda t: 1 + t + 0.6 * t**2)
    gains = fitted(model, sampler(model), sc.Row(COMPUTED, "taylor")).gains
    assert gains is not None
    assert all(gains[step] == 1 for step in (0, 2, 5, 9))
    assert gains[3] == gains[4] != 1
    assert gains[6] == gains[7] == gains[8]
    assert gains[10] == gains[11]


def test_gains_have_bounds() -> None:
    model = Curve(lambda t: 1 - 1e-3 * t + (t < 0.55) * 500 * (0.55 - t))
    gains = fitted(model, sampler(model), sc.Row(COMPUTED, "taylor")).gains
    assert gains is not None and max(gains) == LARGEST_GAIN and min(gains) >= 0


def test_the_denoiser_runs_once_at_each_computed_step() -> None:
    model = Curve(lambda t: 1 + t**2)
    sample = sampler(model)
    references = {}
    for i in (0, 1):
        output, trajectory = Recorder(model).run(model, lambda i=i: sample(i))
        references[i] = (trajectory, output.flatten())
    model.calls = 0
    fit_gains(model, sample, of_denoiser(model, sc.Row(COMPUTED, "taylor")), references)
    assert model.calls == 2 * sum(COMPUTED)


def test_a_toy_is_left_as_it_was_and_nearer_to_the_uncached_run() -> None:
    toy = build("single", depth=2)

    def sample(i: int) -> Tensor:
        x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(i))
        for step in range(STEPS):
            t = torch.tensor([1000 * (1 - step / STEPS)])
            x = x - toy.denoise(x, t, torch.tensor([0])) / STEPS
        return x

    before, classes = sample(3), [type(module) for module in toy.modules()]
    plain = sc.Row(COMPUTED, "taylor")
    row = fitted(toy, sample, plain)
    assert [type(module) for module in toy.modules()] == classes
    assert same(sample(3), before)
    assert error(toy, sample, row, 0) < error(toy, sample, plain, 0)


def test_an_exception_in_the_sampler_leaves_no_trace() -> None:
    model = Curve(lambda t: 1 + t)
    good = sampler(model)
    output, trajectory = Recorder(model).run(model, lambda: good(0))
    count = 0

    def failing(i: int) -> Tensor:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("out of memory")
        return good(i)

    schedule = of_denoiser(model, sc.Row(COMPUTED, "taylor"))
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_gains(model, failing, schedule, {0: (trajectory, output.flatten())})
    assert type(model) is Curve and "forward" not in vars(model)


def test_a_trajectory_between_its_steps() -> None:
    trajectory = Trajectory([1.0, 0.5, 0.25], [torch.tensor([x]) for x in (4.0, 2.0, 0.0)])
    assert trajectory.at(1.0) == 4.0
    assert trajectory.at(0.75) == 3.0
    assert trajectory.at(0.25) == 0.0
    assert trajectory.at(0.1) is None
    rising = Trajectory([0.0, 0.5], [torch.tensor([x]) for x in (1.0, 3.0)])
    assert rising.at(0.25) == 2.0


def test_moved_gains_go_along_gap_by_gap() -> None:
    row = sc.Row((True, False, False, True, False), "taylor", (1, 0.5, 0.5, 1, 2))
    moved = row.moved((True, False, True, False, False))
    assert moved.gains == (1, 0.5, 1, 2, 2)
    assert row.moved((True, True, True, True, False)).gains is None  # no gap of old is left
    assert sc.Row(COMPUTED, "taylor").moved(COMPUTED).gains is None


@pytest.mark.parametrize("wrong", [(1.0,), (1.0, float("nan")), (1.0, "much")])
def test_gains_that_make_no_sense(wrong: Any) -> None:
    with pytest.raises(sc.InvalidArgumentError, match="gain"):
        sc.Row((True, False), "taylor", wrong)


def test_no_gain_holds() -> None:
    toy: Toy = build("single", depth=1)
    computed = (True, True, False)
    layers = tuple(sc.find_layers(toy))

    def outputs(row: sc.Row) -> list[Tensor]:
        schedule = sc.Schedule(3, {layer.path: row for layer in layers}, layers)
        got = []
        with torch.no_grad(), sc.cached(toy, schedule):
            for t in (900.0, 600.0, 300.0):
                x = torch.ones(1, 5, 16)
                got.append(toy.denoise(x, torch.tensor([t]), torch.tensor([1])))
        return got

    held = outputs(sc.Row(computed, "hold"))[2]
    none = outputs(sc.Row(computed, "taylor", (1, 1, 0.0)))[2]
    whole = outputs(sc.Row(computed, "taylor"))[2]
    assert torch.allclose(held, none, atol=1e-6)
    assert not torch.allclose(held, whole, atol=1e-6)


@pytest.mark.parametrize("first", [1, 2, 3, 6])
def test_guidance_that_begins_in_the_middle(first: int) -> None:
    model = Curve(lambda t: 1 + t + 0.6 * t**2)

    def sample(i: int, num_inference_steps: int = STEPS) -> Tensor:
        x = torch.randn(1, 6, generator=torch.Generator().manual_seed(i))
        for step in range(num_inference_steps):
            t = torch.tensor(1 - step / num_inference_steps)
            output = model(x, t, torch.tensor([[2.0]]))
            if step >= first:  # the second call of a step, from here on
                without = model(x, t, torch.tensor([[0.5]]))
                output = without + 3 * (output - without)
            x = x - output / num_inference_steps
        return x

    row = fitted(model, sample, sc.Row(COMPUTED, "taylor"))
    assert row.gains is not None and all(map(math.isfinite, row.gains))


def test_a_search_with_guidance_that_begins_in_the_middle() -> None:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8
    ).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)

    @torch.no_grad()
    def sample(i: int) -> Tensor:
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        for step in range(8):
            t = torch.tensor([900 - 100 * step])
            output = model(x, t, torch.tensor([1])).sample
            if step >= 1:
                output = 3 * output - 2 * model(x, t, torch.tensor([1000])).sample
            x = x - 0.1 * output
        return x

    schedule = sc.search(model, sample, speedup=1.6, max_cost=30, progress=False)
    with torch.no_grad(), sc.cached(model, schedule) as run:
        sample(0)
    assert run.summary().finished == 1
