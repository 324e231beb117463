"""Objectives: named ones and functions of the user."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.searches import Sampler, calibrated, distance, found, search
from support.toys import Toy
from torch import Tensor

import smoothcache as sc
from smoothcache.searching.objectives import latent_l2, typical_l2


def test_an_objective_that_is_given(toy: Toy) -> None:
    """Where it is a number larger by a constant, or a tensor, the same comes out."""
    given: list[tuple[bool, bool]] = []

    def objective(output: Any, reference: Any) -> Tensor:
        given.append((isinstance(output, Tensor), isinstance(reference, Tensor)))
        return torch.tensor(3 + distance(output, reference), dtype=torch.float64)

    ours = search(toy, Sampler(toy).alone, speedup=2, objective=objective)
    theirs, _ = found("alone", speedup=2)
    assert ours.rows == theirs.rows and set(given) == {(True, True)}
    assert ours.quality["error"] == pytest.approx(3 + theirs.quality["error"])


def test_the_typical_distance_is_the_geometric_mean_over_the_batch(toy: Toy) -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    output = reference + torch.tensor([[0.0, 0.05], [0.0, 1.0]])
    assert typical_l2(output, reference) == pytest.approx((0.01 * 1.0) ** 0.5, rel=1e-4)
    assert typical_l2(reference, reference) < 1e-9
    for apart in ([output, torch.zeros(3)], [output, torch.tensor(1.0)]):  # no common batch
        whole = [reference, *map(torch.ones_like, apart[1:])]
        assert typical_l2(apart, whole) == latent_l2(apart, whole)
    ours = search(toy, Sampler(toy).alone, calibrated(), speedup=2, objective="typical_l2")
    assert ours.result is not None and ours.compute is not None and ours.compute <= 0.5


def test_an_objective_below_zero_is_improved_too(toy: Toy) -> None:
    def objective(output: Tensor, reference: Tensor) -> float:
        return distance(output, reference) - 1

    ours = search(toy, Sampler(toy).alone, speedup=2, objective=objective)
    theirs, _ = found("alone", speedup=2)
    assert ours.quality["error"] == pytest.approx(theirs.quality["error"] - 1)


@pytest.mark.parametrize("value", [math.nan, None, "far", torch.zeros(2), torch.tensor(math.nan)])
def test_an_objective_that_gives_no_number(toy: Toy, value: Any) -> None:
    with pytest.raises(sc.InvalidArgumentError, match="objective must give a number, got"):
        search(toy, Sampler(toy).alone, speedup=2, objective=lambda *_: value)


def test_a_candidate_that_overflows_only_loses(toy: Toy) -> None:
    sampler = Sampler(toy)
    known = {i: sampler.alone(i) for i in range(4)}

    def sample(i: int) -> Tensor:
        x = sampler.alone(i)
        return x if distance(x, known[i]) < 0.004 else x * math.inf

    schedule = search(toy, sample, speedup=2)
    assert schedule.quality["error"] < 0.004
