"""The methods of a benchmark, on a tiny pipeline and on a made-up calibration."""

from __future__ import annotations

import numpy as np
import pytest
from support.made_up import calibration_of
from support.tiny_pipeline import build_pipeline

from smoothcache.calibration.curves import Calibration
from smoothcache.comparison import methods
from smoothcache.comparison.benchmark import Case, run_benchmark
from smoothcache.diffusers_io.sampler import PipelineSampler
from smoothcache.errors import InvalidArgumentError

STEPS = 6


@pytest.fixture(scope="module")
def case() -> Case:
    return methods.pipeline_case(PipelineSampler(build_pipeline(), (), (1, 2), STEPS))


@pytest.fixture(scope="module")
def calibration(case: Case) -> Calibration:
    return methods.calibrated(case, 2, progress=False)


def test_a_pipeline_is_a_case(case: Case) -> None:
    assert case.num_steps == STEPS and case.name == "DiTPipeline, 6 steps"
    assert case.sample(case.model, 0).shape == (1, 3, 16, 16)
    again = case.sample(case.model, 0, num_inference_steps=STEPS)
    assert again.equal(case.sample(case.model, 0))
    assert not case.training(case.model, 0).equal(again), "training has seeds of its own"


def test_every_method_runs_and_spends_what_it_says(case: Case, calibration: Calibration) -> None:
    entries = methods.training_free(
        case, calibration, budgets=(0.5,), intervals=(2,), costs=(0.5, 0.9)
    )
    result = run_benchmark(case, entries, converged=False, progress=False)
    assert not result.failures
    cost = {row.name: row.compute for row in result.rows}
    assert cost["4 steps"] == pytest.approx(4 / 6) and cost["3 steps"] == pytest.approx(0.5)
    assert cost["3 steps, UniPC"] == cost["3 steps, DPM-Solver++ 2M"] == pytest.approx(0.5)
    assert cost["FORA, n = 2"] == cost["uniform, Taylor 2, n = 2"] < 0.7
    assert sum(name.startswith("SmoothCache") for name in cost) >= 1


def test_searches_keep_their_budget(case: Case) -> None:
    entries = methods.searched(case, (0.5,), max_cost=15)
    result = run_benchmark(case, entries, converged=False, progress=False)
    (row,) = (row for row in result.rows if row.family == methods.SEARCH)
    assert row.name == "search, ≤ 0.5" and row.compute is not None and row.compute <= 0.5 + 1e-9
    assert "uncached generations" in result.notes[row.name]


def test_a_joint_search_samples_with_what_it_found(case: Case) -> None:
    entries = methods.searched(case, (0.5,), joint=True, max_cost=30)
    result = run_benchmark(case, entries, converged=False, progress=False)
    assert not result.failures
    (row,) = (row for row in result.rows if row.family == methods.JOINT)
    assert row.compute is not None and row.compute <= 0.5 + 1e-9


def test_thresholds_come_near_the_wanted_cost() -> None:
    calibration = calibration_of(np.linspace(0.05, 0.5, 8))
    plans = methods.threshold_plans(calibration)
    wanted = sorted({x.compute for x in plans.values() if x.compute is not None})
    assert len(wanted) > 1
    for cost in (wanted[0], wanted[-1]):
        assert methods.plan_at_cost(calibration, cost).compute == cost


@pytest.mark.parametrize("budget", [0, -0.5, 1.5, float("nan"), True])
def test_budgets_are_fractions(budget: float) -> None:
    with pytest.raises(InvalidArgumentError):
        methods.checked_budgets([0.5, budget])


def test_budgets_come_once() -> None:
    assert methods.checked_budgets([0.5, 0.3, 0.5]) == (0.5, 0.3)
