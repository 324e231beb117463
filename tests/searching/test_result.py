"""The result as a schedule, as a text, and as a verdict."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import assert_golden
from support.searches import Sampler, found, result_of, same, search
from support.toys import Toy

import smoothcache as sc
from smoothcache.searching.result import Measured, SearchResult, verdict_on


def test_a_saved_schedule_is_a_plain_one(toy: Toy, tmp_path: Path) -> None:
    schedule, _ = found("stepped", speedup=2.0)
    schedule.save(tmp_path / "fast.json")
    loaded = sc.Schedule.load(tmp_path / "fast.json")
    assert type(loaded) is sc.Schedule
    plain = {name: getattr(schedule, name) for name in sc.Schedule.__dataclass_fields__}
    assert loaded == sc.Schedule(**plain)
    result = result_of(schedule)
    assert loaded.quality["error"] == result.best.error
    assert loaded.provenance["planner"] == "search"
    assert loaded.provenance["family"] == result.best.name
    assert loaded.provenance["rollouts"] == str(result.rollouts)
    assert loaded.provenance["verdict"] == result.verdict
    outputs = []
    for each in (schedule, loaded):
        with sc.cached(toy, each):
            outputs.append(Sampler(toy).alone(7))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("twice", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_searched_schedule_can_be_copied(twice: Callable[[Any], Any]) -> None:
    schedule, _ = found("stepped", speedup=2.0)
    copied = twice(schedule)
    assert isinstance(copied, sc.SearchedSchedule) and same(copied, schedule)


def test_a_result_is_a_short_text() -> None:
    best = replace(CACHED, name="every 3, moved, gains, taylor2-angle, layers")
    baselines = (measured("4 steps", 0.5, 0.1, 0.2), measured("4 steps of UniPC", 0.5, 0.05, 0.1))
    texts = []
    for joint in (False, True):
        rows = (best, *baselines)
        if not joint:
            rows = tuple(replace(row, converged_error=None) for row in rows)
        verdict = verdict_on(rows[0], rows[1:], joint=joint)
        texts.append(str(SearchResult(rows[0], rows[1:], (), 96, 52.96, verdict)))
    assert_golden("\n\n".join(texts), "searching/result")


def test_where_the_cache_pays() -> None:
    result = result_of(found("stepped", speedup=2.0)[0])
    assert result.best.error < result.baselines[0].error
    assert result.verdict.startswith(
        "the schedule pays off: it ends closer to the uncached run than 4 steps at no higher cost"
    )


def test_a_rival_that_costs_less_is_not_said_to_cost_as_much(toy: Toy) -> None:
    result = result_of(search(toy, Sampler(toy).stepped, compute=0.49, max_cost=1))
    assert result.baselines[0].compute == 0.375 < result.best.compute
    assert "no higher cost" not in result.verdict and "instead of 37.5%" in result.verdict


def test_where_fewer_steps_are_better(toy: Toy) -> None:
    result = result_of(search(toy, Sampler(toy).shaken, speedup=2))
    assert result.baselines[0].error < result.best.error
    assert "SAMPLING WITHOUT A CACHE IS BETTER: 4 steps costs 50.0% and ends closer" in str(result)


def test_without_a_budget_nothing_is_gained(toy: Toy) -> None:
    schedule = search(toy, Sampler(toy).stepped, speedup=1, max_cost=1)
    assert schedule.is_all_compute and schedule.quality["error"] == 0
    assert "SAMPLING WITHOUT A CACHE IS BETTER: 8 steps costs 100.0% and ends as close" in str(
        schedule.result
    )


def measured(name: str, compute: float, error: float, converged: float | None = None) -> Measured:
    return Measured(name, compute, error, converged)


CACHED = replace(
    measured("cached", 0.5, 0.02, 0.3), schedule=sc.Schedule(1, {"a": sc.Row((True,))})
)


@pytest.mark.parametrize(
    ("best", "baselines", "joint", "verdict"),
    [
        (
            measured("4 steps", 0.5, 0.1),
            [],
            False,
            "no cache is needed: 4 steps has the smallest error of everything tried",
        ),
        (
            CACHED,
            [],
            False,
            "not compared with fewer steps, because sample takes no num_inference_steps: whether "
            "the cache pays off is not known",
        ),
        (
            CACHED,
            [measured("4 steps", 0.5, 0.04, 0.4)],
            False,
            "the schedule pays off: it ends closer to the uncached run than 4 steps at no higher "
            "cost (0.0200 against 0.0400)",
        ),
        (
            CACHED,
            [measured("3 steps", 0.375, 0.04, 0.4)],
            False,
            "the schedule pays off: it ends closer to the uncached run than 3 steps at 50.0% of "
            "the uncached MACs instead of 37.5% (0.0200 against 0.0400)",
        ),
        (
            CACHED,
            [measured("4 steps", 0.5, 0.04, 0.4), measured("4 steps of adams", 0.5, 0.05, 0.2)],
            False,
            "the schedule pays off: it ends closer to the uncached run than 4 steps at no higher "
            "cost (0.0200 against 0.0400); HOWEVER, 4 steps of adams ends closer to the converged "
            "sample (0.2000 against 0.3000)",
        ),
        (
            CACHED,
            [measured("4 steps", 0.5, 0.02, 0.4)],
            False,
            "SAMPLING WITHOUT A CACHE IS BETTER: 4 steps costs 50.0% and ends as close to the "
            "uncached run (0.0200 against 0.0200)",
        ),
        (
            CACHED,
            [measured("4 steps", 0.5, 0.01, 0.4)],
            True,
            "the schedule pays off: it ends closer to the converged sample than 4 steps at no "
            "higher cost (0.3000 against 0.4000)",
        ),
    ],
)
def test_the_verdict(best: Measured, baselines: list[Measured], joint: bool, verdict: str) -> None:
    assert verdict_on(best, baselines, joint=joint) == verdict


def test_the_former_name_of_the_baselines_still_works() -> None:
    result = result_of(found("stepped", speedup=2.0)[0])
    assert result.honest is result.baselines
