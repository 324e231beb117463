"""Rollouts: everything that is run is counted."""

from __future__ import annotations

from typing import Any

import pytest
from support.searches import SOLVERS, Sampler, macs_of, result_of, search
from support.toys import build

import smoothcache as sc
from smoothcache.model.costs import MacCounter


@pytest.mark.parametrize(
    ("way", "options", "is_calibrated"),
    [
        ("alone", {"speedup": 1.8, "max_cost": 20}, False),
        ("alone", {"max_error": 0.005, "max_cost": 30}, True),
        ("stepped", {"speedup": 1.8, "max_cost": 45}, True),
        ("full", {"compute": 0.5, "solvers": SOLVERS, "max_cost": 45}, False),
        ("full", {"compute": 0.5, "solvers": SOLVERS, "joint": True, "max_cost": 45}, False),
    ],
)
def test_everything_that_is_run_is_counted(
    way: str, options: dict[str, Any], is_calibrated: bool
) -> None:
    toy = build("single", depth=1)
    sampler = Sampler(toy, num_steps=5)
    calibration = None
    if is_calibrated:
        calibration = sc.calibrate(toy, Sampler(toy, 5).alone, 2, progress=False)
    with MacCounter() as counter:
        result = result_of(search(toy, getattr(sampler, way), calibration, **options))
    samples = 2 if options.get("joint") else 4
    converged = sum(num_steps == 50 for _, num_steps in sampler.calls)
    assert converged == {"alone": 0, "stepped": 2, "full": 2}[way]
    calibrating = 0 if is_calibrated else samples // 2
    # Gains are fitted in generations in which the model does not run.
    assert len(sampler.calls) >= calibrating + samples + converged + result.rollouts
    once = macs_of(lambda: Sampler(toy, 5).alone(0))
    assert counter.total / once == pytest.approx(result.cost, abs=1e-6)
    assert result.cost <= options["max_cost"]
