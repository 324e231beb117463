"""SearchOptions: values that are refused, and options beside keywords."""

from __future__ import annotations

import math
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from support.searches import Adams, Sampler, same, search
from support.toys import Toy

import smoothcache as sc
from smoothcache.searching.options import SearchKeywords


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["exactly one", "speedup", "compute", "max_error"]),
        ({"speedup": 2, "compute": 0.5}, ["exactly one"]),
        ({"speedup": 2, "max_error": 0.1}, ["exactly one"]),
        ({"speedup": 0.99}, ["speedup", "0.99"]),
        ({"speedup": 0}, ["speedup", "0"]),
        ({"speedup": -2}, ["speedup", "-2"]),
        ({"speedup": math.nan}, ["speedup", "nan"]),
        ({"speedup": math.inf}, ["speedup", "inf"]),
        ({"speedup": "2"}, ["speedup", "'2'"]),
        ({"speedup": True}, ["speedup", "True"]),
        ({"speedup": [2]}, ["speedup", "[2]"]),
        ({"compute": 0}, ["compute", "0"]),
        ({"compute": 1.01}, ["compute", "1.01"]),
        ({"compute": -0.5}, ["compute", "-0.5"]),
        ({"compute": math.nan}, ["compute", "nan"]),
        ({"compute": "half"}, ["compute", "'half'"]),
        ({"max_error": -0.1}, ["max_error", "-0.1"]),
        ({"max_error": math.nan}, ["max_error", "nan"]),
        ({"max_error": "0"}, ["max_error", "'0'"]),
        ({"speedup": 2, "seconds": 0}, ["seconds", "0"]),
        ({"speedup": 2, "seconds": math.nan}, ["seconds", "nan"]),
        ({"speedup": 2, "max_cost": 0}, ["max_cost", "0"]),
        ({"speedup": 2, "max_cost": math.nan}, ["max_cost", "nan"]),
        ({"speedup": 2, "objective": "psnr"}, ["objective", "'psnr'"]),
        ({"speedup": 2, "objective": None}, ["objective", "None"]),
        ({"speedup": 2, "num_samples": 0}, ["num_samples", "0"]),
        ({"speedup": 2, "num_samples": 1.5}, ["num_samples", "1.5"]),
        ({"speedup": 2, "num_validation": 0}, ["num_validation", "0"]),
        ({"speedup": 2, "num_validation": True}, ["num_validation", "True"]),
        ({"speedup": 2, "seed": -1}, ["seed", "-1"]),
        ({"speedup": 2, "seed": None}, ["seed", "None"]),
        ({"speedup": 2, "joint": True}, ["joint", "num_inference_steps", "scheduler"]),
    ],
)
def test_bad_arguments(toy: Toy, options: dict[str, Any], words: list[str]) -> None:
    sampler = Sampler(toy)
    with pytest.raises(sc.InvalidArgumentError) as caught:
        search(toy, sampler.stepped, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert sampler.calls == []


def test_a_solver_that_asks_twice_in_a_step(toy: Toy) -> None:
    sampler = Sampler(toy)
    solvers = {"adams": Adams(), "heun": SimpleNamespace(order=2)}
    with pytest.raises(sc.InvalidArgumentError, match="'heun' calls the model 2 times"):
        search(toy, sampler.full, speedup=2, joint=True, solvers=solvers)
    assert sampler.calls == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("joint", "yes", "joint must be True or False, got 'yes'"),
        ("journal", 3, "journal must be the path of a file, got int"),
        ("solvers", [Adams()], "solvers must map names to noise schedulers, got list"),
        ("proposals", 5, "proposals must be a sequence of schedules, got int"),
        ("proposals", ["dit.json"], "proposals must be schedules.*got str"),
        ("num_samples", 0, "num_samples must be an integer of at least 1, got 0"),
        ("max_cost", math.inf, "max_cost must be a finite number, got inf"),
    ],
)
def test_options_refuse_bad_values_when_they_are_made(field: str, value: Any, words: str) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=words):
        sc.SearchOptions(**{field: value})


def test_a_single_schedule_is_no_sequence_of_proposals(toy: Toy) -> None:
    schedule = sc.Schedule.uniform(toy, 8, 2)
    with pytest.raises(sc.InvalidArgumentError, match="sequence of schedules, got Schedule"):
        sc.SearchOptions(proposals=schedule)  # type: ignore[arg-type]


def test_options_give_what_keywords_give(toy: Toy) -> None:
    settings: dict[str, Any] = {"max_cost": 12.0, "num_samples": 1, "seed": 3}
    options = sc.SearchOptions(progress=False, **settings)
    one = sc.search(toy, Sampler(toy).stepped, speedup=2, options=options)
    assert same(one, search(toy, Sampler(toy).stepped, speedup=2, **settings))


def test_keywords_complete_options(toy: Toy) -> None:
    options = sc.SearchOptions(num_samples=1)
    sampler = Sampler(toy)
    search(toy, sampler.alone, compute=0.5, options=options, num_validation=3, max_cost=1)
    assert {i for i, _ in sampler.calls} == set(range(4))
    assert options == sc.SearchOptions(num_samples=1)


def test_a_setting_in_options_and_as_a_keyword_is_refused(toy: Toy) -> None:
    sampler = Sampler(toy)
    options = sc.SearchOptions(max_cost=12, seed=3)
    with pytest.raises(sc.InvalidArgumentError, match=r"'max_cost', 'seed' .* both in options"):
        search(toy, sampler.alone, speedup=2, options=options, max_cost=12, seed=4)
    assert not sampler.calls


def test_options_of_another_kind_are_refused(toy: Toy) -> None:
    sampler = Sampler(toy)
    with pytest.raises(sc.InvalidArgumentError, match="options must be SearchOptions, got dict"):
        search(toy, sampler.alone, speedup=2, options={"max_cost": 3})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'maxcost'.*max_cost"):
        search(toy, sampler.alone, speedup=2, maxcost=3)
    assert not sampler.calls


def test_the_keywords_of_search_are_the_fields_of_the_options() -> None:
    assert list(SearchKeywords.__annotations__) == [x.name for x in fields(sc.SearchOptions)]


@pytest.mark.parametrize(
    ("settings", "training", "validation"),
    [
        ({}, range(2), range(2, 4)),
        ({"joint": True}, range(1), range(1, 2)),
        ({"num_samples": 3}, range(3), range(3, 6)),
        ({"num_samples": 3, "num_validation": 1}, range(3), range(3, 4)),
    ],
)
def test_validation_samples_follow_the_training_samples(
    settings: dict[str, Any], training: range, validation: range
) -> None:
    options = sc.SearchOptions(**settings)
    assert (options.training_samples, options.validation_samples) == (training, validation)
