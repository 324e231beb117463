"""Rows with weights of their own: checked, saved, and run as they say."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration.test_solver_responses import STEPS, Pipeline
from torch import Tensor, nn

import smoothcache as sc

COMPUTED = (True, True, False, True, False, False, True, False)
WEIGHTS = ((), (), (1.5, -0.4), (), (0.9,), (2.0, -1.5, 0.6), (), (0.3, 0.3, 0.2))


def schedule(model: Any) -> sc.Schedule:
    layers = tuple(sc.find_layers(model, granularity="model"))
    return sc.Schedule(STEPS, {"": sc.Row(COMPUTED, "fitted", weights=WEIGHTS)}, layers)


class Model(nn.Module):
    """Elementwise, so that compiling it takes little time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x * self.scale + t)


@torch.no_grad()
def generated(model: Any, by_hand: bool = False, batch: int = 3) -> Tensor:
    x = torch.randn(batch, 5, generator=torch.Generator().manual_seed(0))
    known: list[Tensor] = []
    for step, t in enumerate(torch.linspace(1, 0.125, STEPS)):
        if by_hand and not COMPUTED[step]:
            pairs = zip(WEIGHTS[step], known[::-1], strict=False)
            output = sum((w * e for w, e in pairs), torch.zeros_like(x))
        else:
            output = model(x, t[None])
            known.append(output)
        x = x - 0.3 * output
    return x


def test_a_run_reuses_the_weighted_sum() -> None:
    model = Model()
    with sc.cached(model, schedule(model)) as run:
        found = generated(model)
        again = generated(model, batch=2)
    assert (run.summary().computed, run.summary().reused) == (8, 8)
    assert not run.summary().recomputed
    torch.testing.assert_close(found, generated(model, by_hand=True))
    torch.testing.assert_close(again, generated(model, by_hand=True, batch=2))


def test_a_compiled_run_does_the_same() -> None:
    model = Model()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager", fullgraph=True)
    with sc.cached(compiled, schedule(compiled)) as run:
        found = [generated(compiled) for _ in range(2)]
    assert not run.summary().recomputed
    for x in found:
        torch.testing.assert_close(x, generated(model, by_hand=True))


def test_host_memory_does_the_same() -> None:
    model = Model()
    with sc.cached(model, schedule(model), store="cpu"):
        found = generated(model)
    torch.testing.assert_close(found, generated(model, by_hand=True))


def test_files_give_back_the_weights(tmp_path: Path) -> None:
    made = schedule(Model())
    made.save(path := tmp_path / "s.json")
    assert sc.Schedule.load(path) == made


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0]], "weights for 1 steps, but 4 steps are reused"),
        ([[1.0, 1.0, 1.0], [1.0], [1.0], [1.0]], "step 2 has 3 weights"),
        ([[], [1.0], [1.0], [1.0]], "step 2 has 0 weights"),
        ([["a"], [1.0], [1.0], [1.0]], "finite number"),
        ([1.0, 1.0, 1.0, 1.0], "list"),
        (None, "requires weights"),
    ],
)
def test_files_with_wrong_weights_are_refused(tmp_path: Path, weights: Any, message: str) -> None:
    schedule(Model()).save(path := tmp_path / "s.json")
    document = json.loads(path.read_text())
    document["rows"][0]["weights"] = weights
    path.write_text(json.dumps(document))
    with pytest.raises(sc.FileFormatError, match=message):
        sc.Schedule.load(path)


def test_infinite_weights_in_a_file_are_refused(tmp_path: Path) -> None:
    schedule(Model()).save(path := tmp_path / "s.json")
    path.write_text(path.read_text().replace("-0.4", "Infinity"))
    with pytest.raises(sc.FileFormatError):
        sc.Schedule.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "fitted"}, "requires weights"),
        ({"predictor": "taylor", "weights": ((), (1.0,))}, "other predictors take none"),
        (
            {"predictor": "fitted", "weights": ((), (1.0,)), "gains": (1.0, 0.5)},
            "in place of gains",
        ),
        ({"predictor": "fitted", "weights": ((), (1.0, 1.0))}, "needs 1 to 1"),
        ({"predictor": "fitted", "weights": ((1.0,), (1.0,))}, "computed and takes none"),
        ({"predictor": "fitted", "weights": ((), (math.inf,))}, "finite"),
        ({"predictor": "fitted", "weights": ((),)}, "1 steps, expected 2"),
        ({"predictor": "fitted", "weights": ((), 1.0)}, "must be a list"),
    ],
)
def test_rows_with_wrong_weights_are_refused(options: Any, message: str) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=message):
        sc.Row((True, False), **options)


def test_moved_and_resampled_rows_fall_back_to_a_polynomial() -> None:
    row = sc.Row(COMPUTED, "fitted", weights=WEIGHTS)
    assert row.moved((True, False) * 4) == sc.Row((True, False) * 4, "taylor2")
    resampled = schedule(Model()).resample(STEPS - 2)
    assert resampled.rows[""].predictor == "taylor2"


def test_a_step_that_must_be_computed_after_all_does_not_mix_sources() -> None:
    model = Model()
    run = sc.enable(model, schedule(model))
    with torch.no_grad():
        for step, t in enumerate(torch.linspace(1, 0.125, STEPS)):
            batch = 3 if step < 4 else 2  # what was kept no longer fits
            out = model(torch.ones(batch, 5), t[None])
            assert torch.isfinite(out).all()
    assert run.summary().recomputed
    run.disable()


def test_pipelines_of_the_tests_run_them() -> None:
    from diffusers import DDIMScheduler

    pipe = Pipeline(DDIMScheduler(clip_sample=False), "calls")
    with sc.cached(pipe, schedule(pipe)) as run:
        pipe.sample(0)
    assert run.summary().reused == 2 * COMPUTED.count(False)


BRANCH_WEIGHTS = tuple(tuple(w - 0.3 * (i + 1) for i, w in enumerate(x)) for x in WEIGHTS)


def by_branch(model: Any, parts: int) -> sc.Schedule:
    layers = tuple(sc.find_layers(model, granularity="model"))
    row = sc.Row(COMPUTED, "fitted", None, WEIGHTS, (BRANCH_WEIGHTS,), parts)
    return sc.Schedule(STEPS, {"": row}, layers)


@torch.no_grad()
def guided(model: Any, *, in_batch: bool, by_hand: bool = False) -> Tensor:
    """Two branches, which differ in their sign, each reused by weights of its own."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    known: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step, t in enumerate(torch.linspace(1, 0.125, STEPS)):
        if by_hand and not COMPUTED[step]:
            outputs = [
                sum((w * e for w, e in zip(table[step], had[::-1], strict=False)), 0 * x)
                for table, had in zip((WEIGHTS, BRANCH_WEIGHTS), known, strict=True)
            ]
        elif in_batch:
            signs = torch.tensor([1.0, -1.0]).repeat_interleave(3)[:, None]
            outputs = list(model(torch.cat([x, x]), t[None], signs).chunk(2))
        else:
            outputs = [model(x, t[None], torch.tensor([[sign]])) for sign in (1.0, -1.0)]
        for had, output in zip(known, outputs, strict=True):
            if COMPUTED[step]:
                had.append(output)
        x = x - 0.3 * (2 * outputs[0] - outputs[1])
    return x


class Guided(Model):
    def forward(self, x: Tensor, t: Tensor, sign: Tensor) -> Tensor:  # type: ignore[override]
        return torch.sin(x * self.scale + t * sign)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_branches_have_weights_of_their_own(in_batch: bool, compiled: bool) -> None:
    model = Guided()
    expected = guided(model, in_batch=in_batch, by_hand=True)
    if compiled:
        model.compile(backend="eager", fullgraph=True)
    with sc.cached(model, by_branch(model, 2 if in_batch else 1)) as run:
        found = [guided(model, in_batch=in_batch) for _ in range(2)]
    assert not run.summary().recomputed
    for x in found:
        torch.testing.assert_close(x, expected)


def test_weights_of_branches_come_back_from_files(tmp_path: Path) -> None:
    made = by_branch(Guided(), 2)
    made.save(path := tmp_path / "s.json")
    assert sc.Schedule.load(path) == made


@pytest.mark.parametrize("compiled", [True, False])
def test_a_batch_without_those_branches_is_refused(compiled: bool) -> None:
    model = Guided()
    row = sc.Row((True, False), "fitted", None, ((), (1.0,)), (((), (0.9,)),), 2)
    made = sc.Schedule(2, {"": row}, tuple(sc.find_layers(model, granularity="model")))
    if compiled:
        model.compile(backend="eager", fullgraph=True)
    run = sc.enable(model, made)
    with torch.no_grad(), pytest.raises(sc.ScheduleMismatchError, match="guidance branches"):
        for t in (0.9, 0.5):
            model(torch.ones(3, 5), torch.tensor([t]), torch.ones(1, 1))
    run.disable()


def test_another_branch_than_was_fitted_is_refused() -> None:
    model = Guided()
    run = sc.enable(model, by_branch(model, 1))
    with torch.no_grad(), pytest.raises(sc.ScheduleMismatchError, match="another branch"):
        for t in torch.linspace(1, 0.125, STEPS):
            for sign in (1.0, -1.0, 0.5):
                model(torch.ones(3, 5), t[None], torch.tensor([[sign]]))
    run.disable()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_parts": 2}, "1 branches, which is not a multiple"),
        ({"batch_parts": 0}, "batch_parts"),
        ({"branch_weights": (((), (1.0, 1.0)),)}, "needs 1 to 1"),
        ({"branch_weights": (((), (math.nan,)),)}, "finite"),
    ],
)
def test_branches_with_wrong_weights_are_refused(options: Any, message: str) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=message):
        sc.Row((True, False), "fitted", weights=((), (1.0,)), **options)
    with pytest.raises(sc.InvalidArgumentError, match="require weights"):
        sc.Row((True, False), branch_weights=(((), (1.0,)),))
