from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoothcache.predictors import PREDICTORS, extrapolation_weights, last_uses

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
