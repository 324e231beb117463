"""Calibration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.block_models import (
    BypassingToy,
    Idle,
    _nested,
    assert_equal_calibrations,
    calibrated,
    coarse,
    every_toy,
    paths,
)
from support.reference import STEPS, same, sample
from support.toys import Attention, Toy, build
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import smoothcache as sc
from smoothcache.model.costs import MacCounter


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


@pytest.fixture
def bypassing() -> Toy:
    torch.manual_seed(0)
    return BypassingToy(depth=2).eval().requires_grad_(False)


@every_toy
@pytest.mark.parametrize("granularity", ["auto", "block", "model"])
def test_calibrating_at_a_granularity_is_calibrating_its_layers(toy: Toy, granularity: Any) -> None:
    by_name = calibrated(toy, lambda i: sample(toy), num_samples=1, granularity=granularity)
    layers = sc.find_layers(toy, granularity=granularity)
    assert paths(by_name.layers) == paths(layers)
    by_hand = calibrated(
        toy, lambda i: sample(toy), num_samples=1, layers=layers, granularity="model"
    )
    assert_equal_calibrations(by_name, by_hand)


def _only(*names: str) -> Callable[[str, nn.Module], bool]:
    return lambda path, module: path.rpartition(".")[2] in names


@pytest.mark.parametrize("names", [("attn",), ("mlp",), ("fc1", "fc2"), ("head",)], ids="-".join)
def test_layers_chosen_by_hand_are_those_observed(names: tuple[str, ...]) -> None:
    toy = build("single", depth=2)
    expected = sc.find_layers(toy, select=_only(*names))
    seen = sc.observe_layers(toy, lambda i: sample(toy), select=_only(*names))
    assert [(x.path, x.kind) for x in seen] == [(x.path, x.kind) for x in expected]


@pytest.mark.parametrize("names", [("attn",), ("mlp",), ("fc1", "fc2")], ids="-".join)
def test_exactly_the_given_layers_are_calibrated(names: tuple[str, ...]) -> None:
    toy = build("single", depth=2)
    chosen = sc.find_layers(toy, select=_only(*names))
    got = calibrated(toy, lambda i: sample(toy), layers=chosen)
    assert paths(got.layers) == paths(chosen)


def test_layers_asked_for_as_layers_are_calibrated_as_layers() -> None:
    """They run, and they are not bypassed: there is only more beside them."""
    toy = build("parallel-block", depth=2)
    got = calibrated(toy, lambda i: sample(toy), granularity="layer")
    assert paths(got.layers) == paths(sc.find_layers(toy, granularity="layer"))


@every_toy
@coarse
@pytest.mark.parametrize("calls", [1, 2])
def test_errors_of_blocks_and_models_are_those_of_the_definition(
    toy: Toy, granularity: Any, calls: int
) -> None:
    """E(t, k) = |L_t - L_(t-k)| / |L_t|, of all that a layer returns in a step."""
    got = calibrated(
        toy, lambda i: sample(toy, calls=calls), num_samples=1, granularity=granularity
    )
    outputs: dict[str, list[list[Tensor]]] = {path: [] for path in paths(got.layers)}

    def begin(step: int, branch: int) -> None:
        for recorded in outputs.values():
            recorded += [[]] if branch == 0 else []

    for path, recorded in outputs.items():
        module = toy.get_submodule(path)
        module.forward = recording(recorded, module.forward)
    sample(toy, calls=calls, begin=begin)
    for index, recorded in enumerate(outputs.values()):
        values = [torch.cat([x.double().flatten() for x in tensors]) for tensors in recorded]
        for gap, step in itertools.product((1, 2, 3), range(STEPS)):
            error = got.errors[0, index, gap - 1, step]
            if step < gap:
                assert np.isnan(error)
                continue
            expected = (values[step] - values[step - gap]).abs().sum() / values[step].abs().sum()
            np.testing.assert_allclose(error, float(expected), rtol=1e-4)


def recording(into: list[list[Tensor]], forward: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        into[-1] += [leaf.clone() for leaf in pytree.tree_leaves(output)]
        return output

    return recorded


@every_toy
@coarse
def test_a_plan_costs_what_it_says(toy: Toy, granularity: Any) -> None:
    calibration = calibrated(toy, lambda i: sample(toy, seed=i), granularity=granularity)
    schedule = sc.plan(calibration, alpha=100.0)
    assert schedule.reused
    with MacCounter() as uncached:
        sample(toy)
    with sc.cached(toy, schedule) as run, MacCounter() as counter:
        sample(toy)
    assert schedule.compute == pytest.approx(counter.total / uncached.total)
    assert run.summary().recomputed == {}


def test_calibration_falls_back_to_blocks_after_the_first_sample(bypassing: Toy) -> None:
    ran: list[int] = []
    seen: list[Any] = []

    def generate(i: int) -> Any:
        ran.append(i)
        seen.append(sample(bypassing, seed=i))
        return seen[-1]

    got = calibrated(bypassing, generate, num_samples=3, trajectory=False)
    assert ran == [0, 0, 1, 2]
    assert same(seen, [sample(bypassing, seed=i) for i in ran])
    blocks = sc.find_layers(bypassing, granularity="block")
    expected = calibrated(
        bypassing,
        lambda i: sample(bypassing, seed=i),
        num_samples=3,
        layers=blocks,
        trajectory=False,
    )
    assert [layer.kind for layer in got.layers] == ["block", "block"]
    assert_equal_calibrations(got, expected)
    assert "left_out" not in got.provenance


def test_calibration_that_need_not_fall_back_runs_each_sample_once() -> None:
    toy = Idle(depth=3)
    ran: list[int] = []

    def generate(i: int) -> Any:
        ran.append(i)
        return sample(toy, seed=i)

    got = calibrated(toy, generate, num_samples=3, trajectory=False)
    assert ran == [0, 1, 2]
    assert got.provenance["left_out"] == "blocks.2.attn, blocks.2.mlp"


def test_no_layers_at_all_are_refused_before_anything_runs() -> None:
    toy = build("single", depth=1)
    ran: list[int] = []
    with pytest.raises(sc.InvalidArgumentError, match=r"layers"):
        calibrated(toy, ran.append, layers=[])
    assert ran == []


def _twice(toy: Toy) -> list[sc.CacheLayer]:
    return [*sc.find_layers(toy), *sc.find_layers(toy)]


def _in_the_model(toy: Toy) -> list[sc.CacheLayer]:
    return [*sc.find_layers(toy, granularity="model"), *sc.find_layers(toy)]


@pytest.mark.parametrize("layers_of", [_twice, _nested, _in_the_model])
def test_layers_that_cannot_be_calibrated_together_are_refused_before_anything_runs(
    layers_of: Callable[[Toy], list[sc.CacheLayer]],
) -> None:
    toy = build("single", depth=2)
    ran: list[int] = []
    with pytest.raises(sc.InvalidArgumentError, match=r"blocks\.0"):
        calibrated(toy, ran.append, layers=layers_of(toy))
    assert ran == []


def test_layers_that_the_model_lacks_are_refused() -> None:
    toy, deeper = build("single", depth=1), build("single", depth=2)
    for attempt in (
        lambda: calibrated(toy, lambda i: sample(toy), layers=sc.find_layers(deeper)),
        lambda: sc.enable(
            toy,
            replace(sc.Schedule.uniform(toy, STEPS, 2, layers=sc.find_layers(deeper)), model=None),
        ),
    ):
        with pytest.raises(sc.ScheduleMismatchError, match=r"missing from the model.*blocks\.1"):
            attempt()
        assert type(toy) is Toy and type(toy.blocks[0].attn) is Attention
