"""Shapes that change in the middle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.reference import same, sample
from support.toys import TOKENS, Attention, Block, DualStreamToy, Toy
from support.unusual_models import DroppingToy, assert_as_by_hand, made, uniform
from torch import Tensor

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


OTHER_SHAPES = "the shape of the inputs had changed"


class MergingToy(Toy):
    """Merges neighbouring tokens at some times, and parts them again."""

    kept: Callable[[float], int] = staticmethod(lambda time: TOKENS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        group = TOKENS // self.kept(float(t[0]))
        for block in self.blocks:
            merged = h.unflatten(1, (-1, group)).mean(dim=2)
            h = h + (block(merged, c) - merged).repeat_interleave(group, dim=1)
        out: Tensor = self.head(h)
        return out


class HalvingToy(Toy):
    """Runs its blocks on the first sample of a batch alone at some times."""

    kept: Callable[[float], int] = staticmethod(lambda time: TOKENS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        n = len(x) if self.kept(float(t[0])) == TOKENS else 1
        for block in self.blocks:
            h = torch.cat([block(h[:n], c[:n]), h[n:]])
        out: Tensor = self.head(h)
        return out


PATTERNS = {
    "from step 1": lambda time: TOKENS if time > 900 else 3,
    "from step 4": lambda time: TOKENS if time > 500 else 3,
    "at step 5 alone": lambda time: 3 if time == 375 else TOKENS,
    "at every other step": lambda time: 3 if (time / 125) % 2 else TOKENS,
    "three lengths": lambda time: {0: TOKENS, 1: 3, 2: 2}[int(time / 125) % 3],
}


@pytest.mark.parametrize("kind", [DroppingToy, MergingToy, HalvingToy])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("granularity", ["auto", "block"])
@pytest.mark.parametrize(("predictor", "interval"), [("hold", 3), ("hold", 4), ("taylor", 2)])
def test_tokens_dropped_inside_the_model(
    kind: type[Toy],
    pattern: str,
    granularity: Any,
    predictor: str,
    interval: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kind, "kept", staticmethod(PATTERNS[pattern]))
    toy = made(kind)
    schedule = uniform(toy, interval, granularity=granularity, predictor=predictor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sc.SmoothCacheWarning)
        assert_as_by_hand(toy, schedule, OTHER_SHAPES, batch=2)


def test_tokens_dropped_are_recomputed_and_counted() -> None:
    class Dropping(DroppingToy):
        kept = staticmethod(PATTERNS["at step 5 alone"])

    toy = made(Dropping)
    schedule = uniform(toy, 4)
    summary = assert_as_by_hand(toy, schedule, OTHER_SHAPES)
    per_run = 2 * len(schedule.rows)  # at step 5 for its shape, at step 6 for that of step 5
    assert summary.recomputed == {OTHER_SHAPES: 2 * per_run}
    assert summary.reused == 2 * (schedule.reused - per_run)


class DroppingTextToy(DualStreamToy):
    """Drops tokens of its second stream alone in the second half."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        n = 3 if float(t[0]) > 600 else 2
        text = self.y_embedder(y)[:, None].expand(-1, n, -1) + torch.arange(n)[:, None]
        for block in self.blocks:
            text, h = block(h, text, c)
        out: Tensor = self.head(h) + text.mean(dim=1, keepdim=True)
        return out


class PackedAttention(Attention):
    """Takes its streams in a list."""

    def forward(self, streams: list[Tensor], c: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat(streams, dim=1))


class PackedBlock(Block):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.attn = PackedAttention(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm1(x) + c[:, None]
        x = x + self.attn([h[:, :1], h[:, 1:]], c)
        return x + self.mlp(self.norm2(x))


class PackedToy(DroppingToy):
    block = PackedBlock
    kept = staticmethod(PATTERNS["from step 4"])


class ChangingTypeToy(Toy):
    """Runs its blocks in double precision in the second half."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        dtype = torch.float32 if float(t[0]) > 600 else torch.float64
        c, h = self.condition(t, y).to(dtype), self.x_embedder(x).to(dtype)
        self.blocks.to(dtype)
        for block in self.blocks:
            h = block(h, c)
        out: Tensor = self.head(h.float())
        return out


@pytest.mark.parametrize(
    ("kind", "interval"), [(DroppingTextToy, 3), (PackedToy, 3), (ChangingTypeToy, 3)]
)
def test_what_changes_is_not_the_shape_of_the_first_tensor(kind: type[Toy], interval: int) -> None:
    toy = made(kind)
    assert_as_by_hand(toy, uniform(toy, interval), OTHER_SHAPES)


def test_tokens_of_a_second_stream_dropped_inside_the_model_and_reused_blocks() -> None:
    """With no base of its shape, what a block added would be returned as what it is."""
    toy = made(DroppingTextToy)
    shapes: list[tuple[Any, Any]] = []
    for block in toy.blocks:
        block.register_forward_hook(lambda _, x, out: shapes.append((x[1].shape, out[0].shape)))
    with sc.cached(toy, uniform(toy, 3, granularity="block")):
        sample(toy)
    assert all(given == returned for given, returned in shapes)


def test_a_batch_that_changes_inside_and_outside_at_once() -> None:
    class Halving(HalvingToy):
        kept = staticmethod(PATTERNS["from step 4"])

    toy = made(Halving)
    with sc.cached(toy, uniform(toy, 4)) as run:
        got = [sample(toy, batch=batch) for batch in (1, 3, 2)]
    for one, batch in zip(got, (1, 3, 2), strict=True):
        with sc.cached(toy, uniform(toy, 4)):
            assert same(one, sample(toy, batch=batch))
    assert run.summary().finished == 3
