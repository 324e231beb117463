"""Values that are no numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.reference import STEPS, ByHand, levels, same, sample, times
from support.toys import TOKENS, WIDTH, Attention, Block, Toy, build
from support.unusual_models import every_toy, made, predictors, uniform
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


NOT_FINITE = "what had been computed was not finite"


class SpoiledAttention(Attention):
    """Its output is spoiled while ``add`` is no number."""

    add = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.add


class SpoiledBlock(Block):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.attn = SpoiledAttention(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x) + c[:, None]).nan_to_num(0.5, 0.5, 0.5)
        return x + self.mlp(self.norm2(x))


class SpoiledToy(Toy):
    """Survives what is not finite in the output of an attention."""

    block = SpoiledBlock

    def spoil(self, step: int, at: Sequence[int], value: float) -> None:
        self.blocks[0].attn.add = value if step in at else 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@predictors
@pytest.mark.parametrize("at", [(0,), (3,), (4,), (0, 1), (0, 3, 6), tuple(range(STEPS))])
def test_what_is_not_finite_is_not_reused(
    value: float, predictor: str, at: tuple[int, ...]
) -> None:
    """By hand: where nothing finite was computed, the next step computes."""
    toy = made(SpoiledToy)
    spoiled = "blocks.0.attn"
    schedule = uniform(toy, 3, predictor=predictor)
    planned = schedule.rows[spoiled].computed
    expected_row, missing = [], False
    for step in range(STEPS):
        computes = planned[step] or missing
        missing = (step in at) if computes else missing
        expected_row.append(computes)
    rows = {**schedule.rows, spoiled: sc.Row(tuple(expected_row), predictor)}
    by_hand = ByHand(toy, sc.Schedule(STEPS, rows, schedule.layers, noise_levels=levels()))

    def spoil_by_hand(step: int, branch: int) -> None:
        by_hand.begin(step, branch)
        history = by_hand.outputs.get((spoiled, branch, 0), [])
        history[:] = [kept for kept in history if kept[1][0].isfinite().all()]
        by_hand.toy.spoil(step, at, value)

    expected = sample(by_hand.toy, begin=spoil_by_hand)
    with sc.cached(toy, schedule, check_finite=True) as run:
        got = sample(toy, begin=lambda step, branch: toy.spoil(step, at, value))
    torch.testing.assert_close(got, expected)
    if predictor == "hold":
        assert same(got, expected)
    recomputed = sum(expected_row) - sum(planned)
    assert run.summary().recomputed == ({NOT_FINITE: recomputed} if recomputed else {})
    assert run.summary().held_bytes == 0


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_what_is_not_finite_is_not_reused_of_blocks_and_models(granularity: Any) -> None:
    class Spoiled(SpoiledToy):
        def __init__(self, depth: int = 2) -> None:
            super().__init__(depth)
            self.value = 0.0

        def spoil(self, step: int, at: Sequence[int], value: float) -> None:
            self.value = value if step in at else 0.0

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            c, h = self.condition(t, y), self.x_embedder(x)
            h = self.blocks[0](h + self.value, c).nan_to_num(0.5)
            return self.head(self.blocks[1](h, c))

    toy = made(Spoiled)
    for value, at in ((0.0, ()), (float("nan"), (0, 3))):
        with sc.cached(toy, uniform(toy, 3, granularity=granularity), check_finite=True) as run:
            out = sample(toy, begin=lambda step, _, v=value, a=at: toy.spoil(step, a, v))
        layers = 2 if granularity == "block" else 1
        assert out[-1].isfinite().all()
        spoiled = 2 if granularity == "block" and at else 0
        assert run.summary().recomputed == ({NOT_FINITE: spoiled} if spoiled else {})
        assert run.summary().reused == 5 * layers - spoiled


class Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@every_toy
@pytest.mark.parametrize("granularity", ["auto", "block", "model"])
def test_nothing_is_checked_unless_asked_for(toy_name: str, granularity: Any) -> None:
    toy = build(toy_name, depth=2)
    names = {}
    for check in (False, True):
        with sc.cached(toy, uniform(toy, granularity=granularity), check_finite=check) as run:
            with Operators() as operators:
                sample(toy)
        names[check] = operators.names
        assert run.summary().recomputed == {}
    checks = {"isfinite", "isnan", "isinf", "abs", "eq", "ne", "all", "_local_scalar_dense"}
    assert not names[False] & checks
    assert {"_local_scalar_dense"} < names[True] & checks


def test_checking_changes_nothing_where_all_is_finite() -> None:
    toy = build("dual", depth=2)
    results = []
    for check in (False, True):
        with sc.cached(toy, uniform(toy, 3, predictor="taylor"), check_finite=check):
            results.append(sample(toy, calls=2))
    assert same(*results)


def test_what_was_not_finite_is_no_reason_in_the_next_generation() -> None:
    toy = made(SpoiledToy)
    scheduler = SimpleNamespace(timesteps=torch.arange(1000).flip(0))
    pipe = SimpleNamespace(components={"transformer": toy}, scheduler=scheduler)

    def generate(start: int, value: float) -> None:
        scheduler.timesteps = torch.tensor(times())
        x = torch.ones(1, TOKENS, WIDTH)
        for step, time in list(enumerate(times()))[start:]:
            toy.spoil(step, (4, 5, 6, 7), value)
            x = x - toy(x, torch.tensor([time]), torch.tensor([0])) / STEPS

    schedule = uniform(pipe, 4)
    with sc.cached(pipe, schedule, check_finite=True) as run:
        generate(0, float("nan"))
        assert run.summary().recomputed == {NOT_FINITE: 3}
        generate(5, 0.0)
    recomputed = dict(run.summary().recomputed)
    assert recomputed.pop(NOT_FINITE) == 3
    assert sum(recomputed.values()) == len(schedule.rows)
