"""Mixed schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.block_models import (
    NOTHING_KEPT,
    _nested,
    coarse,
    every_toy,
    paths,
    steps,
)
from support.reference import STEPS, levels, run_by_hand, same, sample, times
from support.toys import WIDTH, Block, Toy, build
from torch import Tensor

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


BLOCK = steps("##.#..#.")
INNER = steps("#.#..#..")
LATER = steps("###.#..#")


def mixed(toy: Toy, outer: str, predictor: str = "hold") -> sc.Schedule:
    """Rows for blocks or the model, and others for layers inside of them."""
    outside = sc.find_layers(toy, granularity=outer)  # type: ignore[arg-type]
    inside = [x for x in sc.find_layers(toy, granularity="layer") if x not in outside]
    rows = {x.path: sc.Row(BLOCK, predictor) for x in outside}
    rows |= {x.path: sc.Row((INNER, LATER)[i % 2], predictor) for i, x in enumerate(inside)}
    return sc.Schedule(STEPS, rows, tuple(outside + inside), noise_levels=levels())


@every_toy
@coarse
@pytest.mark.parametrize("calls", [1, 2])
def test_mixed_schedules_are_never_stale(toy: Toy, granularity: str, calls: int) -> None:
    """A layer whose block skipped its computed step computes at its next one, and that counts."""
    schedule = mixed(toy, granularity)
    expected, by_hand = run_by_hand(toy, schedule, calls=calls)
    with sc.cached(toy, schedule) as run:
        got = [sample(toy, calls=calls) for _ in range(2)]
    assert same(got, [expected, expected])
    summary = run.summary()
    assert (summary.computed, summary.reused) == (2 * by_hand.computed, 2 * by_hand.reused)
    assert summary.recomputed == {NOTHING_KEPT: 2 * by_hand.recomputed}
    assert by_hand.recomputed > 0
    assert summary.held_bytes == 0 and summary.finished == 2


@every_toy
def test_the_model_the_blocks_and_the_layers_at_once(toy: Toy) -> None:
    schedule = mixed(toy, "block")
    layers = (sc.CacheLayer("", "model", ""), *(schedule.layers or ()))
    rows = {"": sc.Row(steps("##.##..#")), **schedule.rows}
    schedule = sc.Schedule(STEPS, rows, layers)
    expected, by_hand = run_by_hand(toy, schedule)
    with sc.cached(toy, schedule) as run:
        assert same(sample(toy), expected)
    assert run.summary().reused == by_hand.reused
    assert sum(run.summary().recomputed.values()) == by_hand.recomputed


@coarse
def test_mixed_schedules_read_back(granularity: str, tmp_path: Any) -> None:
    toy = build("single", depth=2)
    schedule = mixed(toy, granularity, "taylor2")
    schedule.save(tmp_path / "schedule.json")
    assert sc.Schedule.load(tmp_path / "schedule.json") == schedule


@every_toy
@coarse
def test_an_outer_row_that_computes_everything_changes_nothing(toy: Toy, granularity: str) -> None:
    schedule = mixed(toy, granularity)
    outer = paths(sc.find_layers(toy, granularity=granularity))  # type: ignore[arg-type]
    inner = {path: row for path, row in schedule.rows.items() if path not in outer}
    rows = {**dict.fromkeys(outer, sc.Row((True,) * STEPS)), **inner}
    results = []
    for paths_of in (rows, inner):
        layers = tuple(x for x in schedule.layers or () if x.path in paths_of)
        if not layers:
            pytest.skip("its blocks have no layers inside")
        with sc.cached(toy, sc.Schedule(STEPS, paths_of, layers)) as run:
            results.append(sample(toy))
        assert run.summary().recomputed == {}
    assert same(*results)


class SpoilingBlock(Block):
    """Its output is no number in some of its calls."""

    calls: int
    spoils: tuple[int, ...]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out = super().forward(x, c)
        self.calls += 1
        return out * float("nan") if self.calls in self.spoils else out


class TwiceToy(Toy):
    """Runs its one block twice."""

    block = SpoilingBlock

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        out = self.blocks[0](h, c)
        again: Tensor = self.blocks[0](h + 1, c)
        return out + again.nan_to_num()


def test_a_block_used_twice_whose_second_use_alone_must_compute() -> None:
    torch.manual_seed(0)
    toy = TwiceToy(depth=1).eval()
    block, attention, _ = _nested(toy)
    toy.blocks[0].calls, toy.blocks[0].spoils = 0, (2,)
    row = sc.Row(steps("#.#####"))
    schedule = sc.Schedule(7, {block.path: row, attention.path: row}, (block, attention))
    seen: list[tuple[Tensor, Tensor]] = []
    toy.blocks[0].attn.register_forward_hook(
        lambda _, args, output: seen.append((args[0].clone(), output.clone()))
    )
    with sc.cached(toy, schedule, check_finite=True) as run:
        for time in times(7):
            toy(torch.ones(1, 6, WIDTH), torch.tensor([time]), torch.tensor([0]))
    (_, first), (_, second), (given, second_again) = seen[:3]
    assert not torch.equal(first, second)
    # In step 1 the block is reused, then computed: its attention too, as it is not its first use.
    assert torch.equal(second_again, toy.blocks[0].attn(given))
    assert run.summary().recomputed == {
        "what had been computed was not finite": 1,
        "no value had been computed for this call": 1,
    }
