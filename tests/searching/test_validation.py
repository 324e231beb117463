"""The winner and the baselines, measured on samples that the search has not used."""

from __future__ import annotations

import numpy as np
import pytest
from support.searches import SOLVERS, STEPS, Sampler, calibrated, distance, found, result_of, search
from support.toys import Toy

import smoothcache as sc


def test_the_quality_is_that_on_unseen_samples(toy: Toy) -> None:
    schedule, _ = found("stepped", speedup=2.0)
    best = result_of(schedule).best
    sample = Sampler(toy).stepped
    errors, converged_errors = [], []
    for i in range(2, 4):
        with sc.cached(toy, schedule):
            output = sample(i)
        errors.append(distance(output, sample(i)))
        converged_errors.append(distance(output, sample(i, 10 * STEPS)))
    assert best.error == pytest.approx(np.mean(errors), abs=1e-9)
    assert best.converged_error == pytest.approx(np.mean(converged_errors), abs=1e-9)
    assert schedule.quality == {
        "error": best.error,
        "error to the converged sample": best.converged_error,
    }


def test_the_ways_without_a_cache_are_measured_on_the_same_samples(toy: Toy) -> None:
    result = result_of(search(toy, Sampler(toy).full, calibrated(), compute=0.3, solvers=SOLVERS))
    assert [row.name for row in result.baselines] == [
        "2 steps",
        "2 steps of adams",
        "2 steps of euler",
    ]
    sample = Sampler(toy).full
    for row in result.baselines:
        assert (row.schedule, row.num_steps, row.compute) == (None, 2, 0.25)
        outputs = [sample(i, 2, SOLVERS.get(row.solver or "")) for i in range(2, 4)]
        uncached = [distance(x, sample(i)) for x, i in zip(outputs, range(2, 4), strict=True)]
        converged = [distance(x, sample(i, 80)) for x, i in zip(outputs, range(2, 4), strict=True)]
        assert row.error == pytest.approx(np.mean(uncached), abs=1e-9)
        assert row.converged_error == pytest.approx(np.mean(converged), abs=1e-9)
    assert result.scheduler is None and result.num_steps == STEPS


def test_a_sampler_that_cannot_take_fewer_steps(toy: Toy) -> None:
    schedule = search(toy, Sampler(toy).alone, speedup=2, max_cost=1)
    result = result_of(schedule)
    assert result.baselines == () and result.best.converged_error is None
    assert "not compared with fewer steps" in result.verdict
    assert "converged" not in str(result)
    assert list(schedule.quality) == ["error"]
