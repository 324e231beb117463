"""Improvement: it stops where no move helps, and within the limits of time and cost."""

from __future__ import annotations

import random

import pytest
from support.searches import Sampler, calibrated, error_of, result_of, same, search
from support.toys import Toy

import smoothcache as sc
from smoothcache.searching.masks import neighbours


def test_no_move_of_a_computed_step_makes_the_winner_better(toy: Toy) -> None:
    sample = Sampler(toy).alone
    schedule = search(toy, sample, calibrated(), compute=0.5, num_samples=1, max_cost=1000)
    (row,) = set(schedule.rows.values())
    error = error_of(toy, sample, schedule, range(1))
    for mask in neighbours(row.computed, random.Random(0)):
        moved = sc.Schedule(
            schedule.num_steps,
            {path: sc.Row(mask, row.predictor) for path in schedule.rows},
            schedule.layers,
        )
        assert error_of(toy, sample, moved, range(1)) >= error - 1e-12


@pytest.mark.parametrize("options", [{"speedup": 1.5}, {"compute": 0.3}])
def test_max_cost_is_kept_if_the_least_fits(toy: Toy, options: dict[str, float]) -> None:
    least = result_of(search(toy, Sampler(toy).stepped, calibrated(), max_cost=0.1, **options))
    errors = [least.front[-1].error]
    for max_cost in (least.cost, least.cost + 9, 60):
        result = result_of(
            search(toy, Sampler(toy).stepped, calibrated(), max_cost=max_cost, **options)
        )
        assert least.cost <= result.cost <= max_cost
        errors.append(result.front[-1].error)
    assert min(errors) == errors[-1] and errors[0] == max(errors)
    assert least.cost < 60


def test_seconds_end_the_improvement(toy: Toy) -> None:
    schedules = [
        search(toy, Sampler(toy).alone, calibrated(), speedup=2, **options)
        for options in ({"seconds": 1e-6}, {"max_cost": 0.1}, {"seconds": 1000}, {})
    ]
    assert same(schedules[0], schedules[1]) and same(schedules[2], schedules[3])
    assert result_of(schedules[0]).rollouts < result_of(schedules[2]).rollouts
