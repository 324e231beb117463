"""Schedules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.block_models import (
    assert_equal_calibrations,
    calibrated,
    coarse,
    every_granularity,
    every_toy,
    steps,
    uniform,
)
from support.reference import STEPS, run_by_hand, same, sample
from support.toys import Toy, build

import smoothcache as sc
from smoothcache.layers.modules import identify


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


@every_toy
@every_granularity
def test_uniform_schedules(toy: Toy, granularity: Any) -> None:
    layers = sc.find_layers(toy, granularity=granularity)
    schedule = sc.Schedule.uniform(
        toy, STEPS, 3, predictor="taylor", last=True, granularity=granularity
    )
    assert schedule.layers == tuple(layers)
    assert set(schedule.rows.values()) == {sc.Row(steps("#..#..##"), "taylor")}
    assert schedule.model == identify(toy)
    given = sc.Schedule.uniform(
        toy, STEPS, 3, predictor="taylor", last=True, layers=layers, granularity="model"
    )
    assert given == schedule


def test_uniform_schedules_of_chosen_layers() -> None:
    toy = build("single", depth=3)
    chosen = sc.find_layers(toy, select=lambda path, module: path == "blocks.1")
    schedule = sc.Schedule.uniform(toy, STEPS, 2, layers=chosen)
    expected, _ = run_by_hand(toy, schedule)
    with sc.cached(toy, schedule) as run:
        assert same(sample(toy), expected)
    assert run.summary().reused == STEPS // 2
    with pytest.raises(sc.InvalidArgumentError, match="at least one row"):
        sc.Schedule.uniform(toy, STEPS, 2, layers=[])


@every_toy
@coarse
def test_schedules_read_back_run_the_same(toy: Toy, granularity: Any, tmp_path: Any) -> None:
    schedule = uniform(toy, granularity, 3, "taylor")
    schedule.save(tmp_path / "schedule.json")
    loaded = sc.Schedule.load(tmp_path / "schedule.json")
    assert loaded == schedule
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    results = []
    for one in (schedule, loaded):
        with sc.cached(toy, one):
            results.append(sample(toy))
    assert same(*results)


def test_a_plan_for_the_model_reads_back(tmp_path: Any) -> None:
    toy = build("single", depth=1)
    calibration = calibrated(toy, lambda i: sample(toy, seed=i), granularity="model")
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = sc.Calibration.load(tmp_path / "calibration.safetensors")
    assert_equal_calibrations(calibration, loaded)
    assert loaded.layers[0].path == loaded.layers[0].block == ""
    schedule = sc.plan(loaded, alpha=100.0)
    schedule.save(tmp_path / "schedule.json")
    assert sc.Schedule.load(tmp_path / "schedule.json") == schedule
    assert "model" in str(schedule) and "model" in str(calibration)
    assert calibration.curve(gap=1, layer="").mean.shape == (STEPS,)


def test_a_schedule_of_another_granularity_than_the_layers_is_no_mismatch() -> None:
    """What a schedule covers is its own affair: a model is not searched again for its layers."""
    toy = build("single", depth=2)
    for granularity in ("layer", "block", "model"):
        with sc.cached(toy, uniform(toy, granularity)) as run:
            sample(toy)
        assert run.summary().never_ran == ()
