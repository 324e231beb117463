from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoothcache.steps.predictors import (
    PREDICTORS,
    axis_positions,
    extrapolation_weights,
    last_uses,
)

masks = st.lists(st.booleans(), max_size=12).map(lambda rest: (True, *rest))


@given(
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True).map(sorted),
    ahead=st.integers(1, 10),
    coefficients=st.lists(st.integers(-5, 5), min_size=3, max_size=3),
)
def test_weights_are_exact_for_polynomials(
    steps: list[int], ahead: int, coefficients: list[int]
) -> None:
    polynomial = np.polynomial.Polynomial(coefficients[: len(steps)])
    at = steps[-1] + ahead
    weights = extrapolation_weights(steps, at)
    predicted = sum(w * polynomial(s) for w, s in zip(weights, steps, strict=True))
    assert predicted == pytest.approx(polynomial(at), rel=1e-6, abs=1e-6)


def test_one_value_is_held() -> None:
    assert extrapolation_weights([3], at=9) == [1.0]


@pytest.mark.parametrize("order", [predictor.order for predictor in PREDICTORS.values()])
@given(computed=masks)
def test_last_uses_by_running_the_mask(order: int, computed: tuple[bool, ...]) -> None:
    uses: dict[int, int] = {}
    kept: list[int] = []
    for step, is_computed in enumerate(computed):
        if is_computed:
            kept = [*kept, step][-order - 1 :]
        else:
            uses.update(dict.fromkeys(kept, step))
    entries = last_uses(computed, order)
    assert {s: entries[s] for s, due in enumerate(computed) if due} == {
        s: uses.get(s) for s, due in enumerate(computed) if due
    }


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_predictor_has_the_name_of_its_entry(name: str) -> None:
    assert PREDICTORS[name].name == name
    assert PREDICTORS[name].order >= 0


@given(
    known=st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True).map(sorted),
    ahead=st.integers(1, 10),
    gain=st.floats(-2, 3),
)
def test_a_gain_scales_the_predicted_change(known: list[int], ahead: int, gain: float) -> None:
    values = [float(step * step - 3 * step) for step in known]
    at = known[-1] + ahead

    def predicted(gain: float) -> float:
        weights = extrapolation_weights(known, at, gain)
        assert sum(weights) == pytest.approx(1)
        return sum(w * v for w, v in zip(weights, values, strict=True))

    change = predicted(1.0) - values[-1]
    assert predicted(gain) == pytest.approx(values[-1] + gain * change, rel=1e-6, abs=1e-6)
    assert predicted(0.0) == values[-1]


NOISE = (1.0, 0.8, 0.5, 0.1)


def test_positions_on_the_axes() -> None:
    assert axis_positions("step", 4, NOISE) == [0, 1, 2, 3]
    assert axis_positions("angle", 4, NOISE) == pytest.approx(
        [np.pi / 2, np.arctan(4), np.pi / 4, np.arctan(1 / 9)]
    )
    log_snr = axis_positions("log_snr", 4, NOISE)
    assert log_snr[1:] == pytest.approx([-np.log(16), 0, np.log(81)])
    assert np.isfinite(log_snr[0]) and log_snr[0] < -15  # pure noise


@pytest.mark.parametrize("name", [name for name, p in PREDICTORS.items() if p.axis != "step"])
def test_a_predictor_over_the_noise_level_is_exact_for_polynomials_in_it(name: str) -> None:
    predictor = PREDICTORS[name]
    places = axis_positions(predictor.axis, 4, NOISE)
    polynomial = np.polynomial.Polynomial([2.0, -1.0, 0.5][: predictor.order + 1])
    known = places[: predictor.order + 1]
    weights = extrapolation_weights(known, places[3])
    predicted = sum(w * polynomial(x) for w, x in zip(weights, known, strict=True))
    assert predicted == pytest.approx(polynomial(places[3]))


def held(known: list[float], at: float, values: list[float]) -> float:
    weights = extrapolation_weights(known, at)
    assert len(weights) == len(known)
    return sum(w * v for w, v in zip(weights, values, strict=True))


def test_of_two_levels_beyond_the_clip_the_newer_value_is_used() -> None:
    noise = (1.0, 0.99999, 0.5, 0.1)  # the first two are beyond the clip of 1e-4
    places = axis_positions("log_snr", 4, noise)
    assert places[0] == places[1]
    assert held(places[:2], places[2], [7.0, 9.0]) == 9.0
    line = held(places[1:3], places[3], [9.0, 3.0])
    assert held(places[:3], places[3], [7.0, 9.0, 3.0]) == pytest.approx(line)


def test_at_the_position_of_the_newest_value_that_value_is_used() -> None:
    places = axis_positions("log_snr", 3, (0.5, 1e-5, 0.0))
    assert held(places[:2], places[2], [7.0, 9.0]) == 9.0


@given(
    known=st.lists(st.integers(0, 4), min_size=1, max_size=4).map(sorted),
    ahead=st.integers(0, 4),
    gain=st.sampled_from([1.0, 0.5, 1.5]),
)
def test_coinciding_positions_lower_the_order(known: list[int], ahead: int, gain: float) -> None:
    at = known[-1] + ahead
    weights = extrapolation_weights(known, at, gain)
    newest = {position: i for i, position in enumerate(known)}
    assert all(weights[i] == 0 for i in range(len(known)) if i not in newest.values())
    without = extrapolation_weights(sorted(newest), at, gain)
    assert [weights[newest[x]] for x in sorted(newest)] == pytest.approx(without)
    assert sum(weights) == pytest.approx(1)
