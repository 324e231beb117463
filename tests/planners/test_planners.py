"""Planners: the paper's rule against another reading of it, and what holds for every planner."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.made_up import calibration_of, calibrations, errors_of, layers_of

from smoothcache.calibration.curves import Calibration
from smoothcache.errors import InvalidArgumentError
from smoothcache.planners import PLANNERS
from smoothcache.planners._few_patterns import with_few_patterns
from smoothcache.planners.threshold import plan, threshold_mask
from smoothcache.planners.uniform import plan_uniform
from smoothcache.schedule.row import Row

alphas = st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0, 2.0])


@pytest.mark.parametrize("name", PLANNERS)
@given(calibration=calibrations())
def test_every_planner_fills_in_the_whole_schedule(name: str, calibration: Calibration) -> None:
    schedule = PLANNERS[name](calibration)
    assert schedule.layers == calibration.layers
    assert schedule.table().shape == (len(calibration.layers), calibration.num_steps)
    assert schedule.table()[:, 0].all()
    assert schedule.model == calibration.model
    assert schedule.timesteps == calibration.timesteps
    assert schedule.provenance["planner"] in ("threshold", "uniform")
    computed = schedule.table().sum() * 10 + calibration.num_steps * (100 - 10 * len(schedule.rows))
    assert schedule.compute == pytest.approx(computed / (100 * calibration.num_steps))


@pytest.mark.parametrize("name", PLANNERS)
def test_compute_stays_unknown_where_a_cost_is(name: str) -> None:
    assert PLANNERS[name](calibration_of(layers=layers_of(2, macs=None))).compute is None
    assert PLANNERS[name](calibration_of(total_macs=0)).compute is None


def brute_force(errors: npt.NDArray[np.float64], alpha: float) -> tuple[bool, ...]:
    """The rule of the paper as a statement on masks, tried on every mask.

    A reuse at t is allowed if every step from the last computed one up to t is within the
    threshold and max_gap. Of all masks where each reuse is allowed, and no computed step but the
    first and the last could be a reuse given what is before it, there is just one.
    """
    max_gap, steps = errors.shape

    def allowed(mask: tuple[bool, ...], t: int) -> bool:
        gap = next(k for k in range(1, t + 1) if mask[t - k])
        return gap <= max_gap and bool(errors[gap - 1, t] < alpha)

    found = []
    for number in range(2 ** max(steps - 2, 0)):
        between = tuple(bool(number >> bit & 1) for bit in range(max(steps - 2, 0)))
        mask = (True, *between, True)[:steps]
        if all(mask[t] != allowed(mask, t) for t in range(1, steps - 1)):
            found.append(mask)
    assert len(found) == 1
    return found[0]


@given(calibration=calibrations(max_steps=9), alpha=alphas, data=st.data())
def test_plan_is_the_rule_of_the_paper(
    calibration: Calibration, alpha: float, data: st.DataObject
) -> None:
    max_gap = data.draw(st.integers(1, calibration.max_gap))
    schedule = plan(calibration, alpha=alpha, max_gap=max_gap)
    for kind in calibration.kinds:
        of_kind = [i for i, layer in enumerate(calibration.layers) if layer.kind == kind]
        averaged = calibration.errors[:, of_kind, :max_gap].mean(axis=1).mean(axis=0)
        expected = brute_force(averaged, alpha)
        assert {tuple(row) for row in schedule.table()[of_kind]} == {expected}


@given(calibration=calibrations(max_steps=9), alpha=alphas)
def test_plan_per_block_reads_each_layer_alone(calibration: Calibration, alpha: float) -> None:
    schedule = plan(calibration, alpha=alpha, per="block")
    for index, layer in enumerate(calibration.layers):
        expected = brute_force(calibration.errors[:, index].mean(axis=0), alpha)
        assert schedule.rows[layer.path].computed == expected


@given(calibration=calibrations(), alpha=alphas, per=st.sampled_from(["kind", "block"]))
def test_gaps_and_ends(calibration: Calibration, alpha: float, per: Any) -> None:
    for row in plan(calibration, alpha=alpha, per=per).rows.values():
        assert row.computed[0] and row.computed[-1]
        computed = [step for step, on in enumerate(row.computed) if on]
        assert max(np.diff(computed), default=1) <= calibration.max_gap + 1


@given(calibration=calibrations(), lower=alphas, higher=alphas)
def test_larger_alpha_never_computes_more_if_error_grows_with_the_gap(
    calibration: Calibration, lower: float, higher: float
) -> None:
    lower, higher = sorted((lower, higher))
    growing = np.maximum.accumulate(np.nan_to_num(calibration.errors), axis=2)
    shape = calibration.errors.shape
    calibration = calibration_of(
        growing, samples=shape[0], layers=calibration.layers, max_gap=shape[2], steps=shape[3]
    )
    few, many = (plan(calibration, alpha=alpha).table().sum(axis=1) for alpha in (higher, lower))
    assert (few <= many).all()


def test_larger_alpha_may_compute_more_if_error_falls_with_the_gap() -> None:
    # Why the property above has its condition: with 0.3 step 1 is reused and the walk lands on
    # step 2 as its computed step, whose output step 3 cannot use; with 0.1 step 1 is computed
    # and serves steps 2 and 3.
    errors = errors_of(0.9, 1, 1, 3, 6)[0, 0]
    errors[0, 1], errors[0, 2], errors[1, 3], errors[2, 4] = 0.2, 0.0, 0.0, 0.0
    assert threshold_mask(errors, 0.1) == (True, True, False, False, False, True)
    assert threshold_mask(errors, 0.3) == (True, False, True, True, True, True)


def test_errors_at_the_threshold_are_computed() -> None:
    assert plan(calibration_of(0.25), alpha=0.25).is_all_compute
    assert not plan(calibration_of(0.25), alpha=0.2500001).is_all_compute


def test_zero_computes_everything() -> None:
    assert plan(calibration_of(0.0), alpha=0).is_all_compute


def test_each_follower_is_judged_by_its_own_gap() -> None:
    errors = errors_of(np.array([0.1, 0.2, 0.3]).reshape(3, 1), 1, 1, 3, 10)[0, 0]
    assert threshold_mask(errors, 0.15) == (True, False) * 4 + (True, True)
    assert threshold_mask(errors, 0.25) == (True, False, False) * 3 + (True,)
    assert threshold_mask(errors, 0.35) == (True, False, False, False) * 2 + (True, True)


def test_plan_says_how_it_was_made() -> None:
    calibration = calibration_of(solver="DDIMScheduler", provenance={"created": "2026-01-01"})
    schedule = plan(calibration, alpha=0.18, max_gap=2, predictor="taylor")
    assert schedule.solver == "DDIMScheduler"
    assert dict(schedule.provenance) == {
        "calibration created": "2026-01-01",
        "planner": "threshold",
        "alpha": "0.18",
        "per": "kind",
        "max_gap": "2",
        "predictor": "taylor",
    }
    assert {row.predictor for row in schedule.rows.values()} == {"taylor"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alpha": -0.1}, ["alpha", "-0.1"]),
        ({"alpha": math.nan}, ["alpha", "nan"]),
        ({"alpha": math.inf}, ["alpha", "inf"]),
        ({"alpha": "0.1"}, ["alpha", "'0.1'"]),
        ({"alpha": None}, ["alpha", "None"]),
        ({"alpha": True}, ["alpha", "True"]),
        ({"alpha": 0.1, "max_gap": 4}, ["max_gap", "4", "3", "Calibrate"]),
        ({"alpha": 0.1, "max_gap": 0}, ["max_gap", "0"]),
        ({"alpha": 0.1, "max_gap": 1.5}, ["max_gap", "1.5"]),
        ({"alpha": 0.1, "per": "layer"}, ["per", "'layer'", "'kind'", "'block'"]),
        ({"alpha": 0.1, "predictor": "magic"}, ["'magic'", "'hold'"]),
    ],
)
def test_bad_arguments_of_plan(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        plan(calibration_of(), **arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_numpy_numbers_are_numbers() -> None:
    schedule = plan(calibration_of(), alpha=np.float32(0.5), max_gap=np.int64(2))
    assert schedule == plan(calibration_of(), alpha=0.5, max_gap=2)


@given(st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_uniform_mask(num_steps: int, interval: int, last: bool) -> None:
    wanted = set(range(0, num_steps, interval)) | ({num_steps - 1} if last else set())
    computed = Row.uniform(num_steps, interval, last=last).computed
    assert {step for step, on in enumerate(computed) if on} == wanted
    assert len(computed) == num_steps


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True, None])
def test_uniform_refuses_what_is_no_count(wrong: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="num_steps"):
        Row.uniform(wrong, 2)
    with pytest.raises(InvalidArgumentError, match="interval"):
        Row.uniform(10, wrong)


def test_plan_uniform_knows_its_cost() -> None:
    schedule = plan_uniform(calibration_of(), interval=2, predictor="taylor", last=True)
    assert schedule.rows["blocks.0.mlp"] == Row.uniform(8, 2, predictor="taylor", last=True)
    assert schedule.compute == pytest.approx((5 * 40 + 8 * 60) / 800)
    assert schedule.provenance["interval"] == "2"


@given(
    calibration=calibrations(),
    alpha=alphas,
    patterns=st.integers(1, 4),
    per=st.sampled_from(["kind", "block"]),
)
def test_few_patterns_compute_more_and_break_no_promise(
    calibration: Calibration, alpha: float, patterns: int, per: Any
) -> None:
    free = plan(calibration, alpha=alpha, per=per)
    few = plan(calibration, alpha=alpha, per=per, patterns=patterns)
    assert few.patterns <= patterns
    assert (few.table() >= free.table()).all()
    if free.patterns <= patterns:
        assert few.rows == free.rows
    for layer in calibration.layers:
        choice = {"kind": layer.kind} if per == "kind" else {"layer": layer.path}
        last = 0
        for step, computed in enumerate(few.rows[layer.path].computed):
            if computed:
                last = step
            else:
                assert calibration.curve(gap=step - last, **choice).mean[step] < alpha


def test_a_shorter_gap_with_a_larger_error_is_computed() -> None:
    computed = np.array([[1, 0, 0, 1], [1, 1, 0, 1]], dtype=np.bool_)
    errors = [np.full((2, 4), 0.1) for _ in computed]
    few = with_few_patterns(computed, errors, 0.5, [1.0, 10.0], 2)
    assert few.tolist() == [[True, True, False, True]] * 2
    errors[0][0, 2] = 9.0  # now that step 1 is computed, this is the reuse at step 2
    few = with_few_patterns(computed, errors, 0.5, [1.0, 10.0], 2)
    assert few.tolist() == [[True] * 4, [True, True, False, True]]


@pytest.mark.parametrize("patterns", [0, -1, 1.5, "two"])
def test_patterns_are_at_least_one(patterns: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="patterns"):
        plan(calibration_of(), alpha=0.1, patterns=patterns)
