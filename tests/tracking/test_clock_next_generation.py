"""The next one is different."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.generations import HANDLES, STEPS, interrupting_after, run_sd3, sd3_pipe

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::smoothcache.errors.SmoothCacheWarning"),
]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@HANDLES
def test_the_next_generation_has_another_shape(handle: str) -> None:
    """Another batch, resolution, prompt length, and guidance or none, under one handle."""
    pipe = sd3_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    model = pipe if handle == "pipeline" else pipe.transformer
    options: list[dict[str, Any]] = [
        {},
        {"batch": 2},
        {"size": 32},
        {"size": 96},
        {"tokens": 3},
        {"tokens": 9},
        {"guidance_scale": 1.0},
        {},
    ]
    fresh = []
    for given in options:
        with sc.cached(model, schedule):
            fresh.append(run_sd3(pipe, **given))
    with sc.cached(model, schedule) as run:
        for given, expected in zip(options, fresh, strict=True):
            assert torch.equal(run_sd3(pipe, **given), expected)
    assert run.summary().recomputed == {}
    assert run.summary().finished == len(options)


@HANDLES
@pytest.mark.parametrize("last", range(1, STEPS))
def test_another_shape_after_a_generation_broken_off(handle: str, last: int) -> None:
    pipe = sd3_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    model = pipe if handle == "pipeline" else pipe.transformer
    with sc.cached(model, schedule):
        fresh = run_sd3(pipe, batch=2, size=32)
    with sc.cached(model, schedule) as run:
        run_sd3(pipe, callback_on_step_end=interrupting_after(last))
        assert torch.equal(run_sd3(pipe, batch=2, size=32), fresh)
    assert run.summary().recomputed == {}
