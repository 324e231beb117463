"""The search space: costs of candidates, and which of them have the same effect."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.searches import SOLVERS, STEPS, Sampler, calibrated, real_compute, two_denoisers
from support.toys import Toy

import smoothcache as sc
from smoothcache.searching.masks import spaced
from smoothcache.searching.space import Candidate, SearchSpace


@pytest.fixture
def space(toy: Toy) -> SearchSpace:
    return SearchSpace(toy, calibrated(), SOLVERS)


def test_names_do_not_matter_to_the_key(space: SearchSpace) -> None:
    mask = spaced(STEPS, 3)
    one = space.candidate("a", "layers", mask, "taylor")
    assert one.key == space.even("b", "layers", mask, "taylor").key
    for other in (
        space.candidate("a", "model", mask, "taylor"),
        space.candidate("a", "layers", mask, "hold"),
        space.candidate("a", "layers", spaced(STEPS, 4), "taylor"),
        replace(one, num_steps=STEPS),
        replace(one, solver="adams"),
    ):
        assert one.key != other.key


def test_too_few_computed_steps_lower_the_order_of_a_predictor(space: SearchSpace) -> None:
    """Two computed steps are enough for a line, and one is enough for holding alone."""
    keys = [
        {space.candidate("", "model", mask, name).key for name in ("hold", "taylor", "taylor2")}
        for mask in (spaced(STEPS, 1), (True, True, *(False,) * (STEPS - 2)), spaced(STEPS, 4))
    ]
    assert [len(x) for x in keys] == [1, 2, 3]


def test_all_ways_to_compute_everything_are_the_same(space: SearchSpace) -> None:
    everything = (True,) * STEPS
    keys = {space.candidate("", x, everything, "taylor").key for x in space.granularities}
    assert keys == {Candidate("uncached", 1.0).key}


@pytest.mark.parametrize("granularity", ["layers", "model"])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.77, 1.0])
def test_no_more_steps_are_affordable(
    toy: Toy, space: SearchSpace, granularity: str, budget: float
) -> None:
    count = space.affordable_steps(granularity, budget)
    best = space.candidate("", granularity, spaced(STEPS, count), "hold")
    assert best.schedule is not None and best.fits(budget)
    assert real_compute(toy, Sampler(toy).alone, best.schedule) == pytest.approx(best.compute)
    if count < STEPS:
        mask = spaced(STEPS, count + 1)
        assert not space.candidate("", granularity, mask, "hold").fits(budget)


def test_two_denoisers_are_not_reused_as_a_whole() -> None:
    pipe, sample = two_denoisers()
    calibration = sc.calibrate(pipe, sample, 1, progress=False)
    space = SearchSpace(pipe, calibration, {})
    assert space.granularities == ("layers",)
    assert space.affordable_steps("layers", space.least_compute() / 2) == 0


def test_plain_sampling_costs_its_steps(space: SearchSpace) -> None:
    plain = space.plain(4, "adams")
    assert (plain.name, plain.compute, plain.schedule) == ("4 steps of adams", 4 / STEPS, None)
    assert (plain.num_steps, plain.solver) == (4, "adams")
    assert space.plain(4, None).name == "4 steps"


def test_a_changed_row_is_named_once(space: SearchSpace) -> None:
    candidate = space.even("2 even steps", "model", spaced(STEPS, 2), "taylor")
    moved = sc.Row((True, False, True) + (False,) * (STEPS - 3), "taylor")
    once = space.with_row(candidate, moved, "moved")
    twice = space.with_row(once, sc.Row(spaced(STEPS, 3), "taylor"), "moved")
    assert once.name == twice.name == "2 even steps, taylor, model, moved"
    assert once.common_row == moved and once.reuses_whole_denoiser and once.even is None
    plain = space.plain(4, None)
    assert space.with_row(plain, moved, "moved") is plain
