"""Weights that lead a run of few steps to the states of one of many."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.prompt_pipeline import STEPS, PromptPipeline
from support.searches import distance
from support.searches import search as cheap_search
from torch import Tensor

import smoothcache as sc
from smoothcache.searching import rollouts
from smoothcache.searching.gains import Recorder, Trajectory
from smoothcache.searching.weights import Weights, fit_weights

COMPUTED = tuple(t in (0, 3, 6, 9, 11) for t in range(STEPS))

search = partial(cheap_search, max_cost=None)  # the limit of its own


def converged(pipe: PromptPipeline, i: int) -> tuple[Trajectory, Tensor]:
    output, trajectory = Recorder(pipe).run(pipe, lambda: pipe.sample(i, 10 * STEPS))
    return trajectory, output


def test_a_run_under_the_weights_ends_nearer_to_the_reference() -> None:
    pipe = PromptPipeline()
    references = {i: converged(pipe, i) for i in range(2)}
    weights = fit_weights(pipe, pipe.alone, COMPUTED, references)
    layer = sc.CacheLayer("", kind="model", block="")

    def error(row: sc.Row) -> float:
        schedule = sc.Schedule(STEPS, {"": row}, (layer,))
        errors = []
        for i, (_, wanted) in references.items():
            with sc.cached(pipe, schedule):
                errors.append(distance(pipe.sample(i), wanted))
        return float(np.mean(errors))

    fitted = error(sc.Row(COMPUTED, "fitted", weights=weights))
    assert fitted < error(sc.Row(COMPUTED, "taylor2"))
    assert fitted < float(
        np.mean([distance(pipe.sample(i), x) for i, (_, x) in references.items()])
    )


def test_a_sampler_that_does_not_return_latents() -> None:
    pipe = PromptPipeline()

    def decoded(i: int) -> dict[str, Tensor]:
        x = pipe.sample(i)
        return {"image": x[..., :3], "mask": x[..., 3:]}

    trajectory, _ = converged(pipe, 0)
    weights = fit_weights(pipe, decoded, COMPUTED, {0: (trajectory, decoded(0))})
    assert [bool(x) for x in weights] == [not x for x in COMPUTED]
    assert all(np.isfinite(x).all() for x in weights)


def test_a_joint_search_fits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = PromptPipeline()
    calibration = sc.calibrate(pipe, pipe.alone, 2, progress=False)
    found: list[Weights] = []

    def noted(*args: Any) -> Weights:
        found.append(fit_weights(*args))
        return found[-1]

    monkeypatch.setattr(rollouts, "fit_weights", noted)
    schedule = search(pipe, pipe.sample, calibration, compute=0.34, joint=True)
    assert found and all(len(x) > 0 for x in found)
    result = schedule.result
    assert result is not None and result.cost <= 60
    assert all(
        (result.best.converged_error or 0) <= (row.converged_error or 0) + 1e-12
        for row in result.baselines
    )
    assert torch.equal(pipe.sample(0), PromptPipeline().sample(0))
