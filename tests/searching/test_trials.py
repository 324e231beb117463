"""The Pareto front of everything that was tried."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.searches import Sampler, error_of, found, result_of
from support.toys import Toy


@pytest.mark.parametrize("options", [{"speedup": 2.0}, {"max_error": 0.01, "max_cost": 60}])
def test_the_front_is_what_was_measured_and_a_pareto_front(
    toy: Toy, options: dict[str, float]
) -> None:
    result = result_of(found("stepped", **options)[0])
    for cheaper, dearer in pairwise(result.front):
        assert cheaper.compute < dearer.compute and cheaper.error > dearer.error
    for row in result.front:
        assert row.schedule is not None
        error = error_of(toy, Sampler(toy).alone, row.schedule, range(2))
        assert row.error == pytest.approx(error, abs=1e-9)
        assert row.schedule.compute == row.compute
    assert any(row.schedule.rows == result.best.schedule.rows for row in result.front)  # type: ignore[union-attr]
