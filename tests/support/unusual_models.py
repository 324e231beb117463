"""Models and helpers that several tests of bad models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.reference import STEPS, ByHand, levels, same, sample
from support.toys import TOKENS, TOYS, Toy
from support.traces import unaltered
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import smoothcache as sc

every_toy = pytest.mark.parametrize("toy_name", TOYS)
predictors = pytest.mark.parametrize("predictor", ["hold", "taylor"])


def made(kind: type[Any], depth: int = 2) -> Any:
    torch.manual_seed(0)
    return kind(depth=depth).eval().requires_grad_(False)


def paths(layers: Sequence[sc.CacheLayer]) -> list[str]:
    return [layer.path for layer in layers]


def steps(pattern: str) -> tuple[bool, ...]:
    """A row from text: # is a computed step, a dot a reused one."""
    return tuple(mark == "#" for mark in pattern)


def uniform(model: Any, interval: int = 2, **options: Any) -> sc.Schedule:
    return sc.Schedule.uniform(model, STEPS, interval, noise_levels=levels(), **options)


def calibrated(model: Any, generate: Callable[[int], Any], **options: Any) -> sc.Calibration:
    settings: dict[str, Any] = {"num_samples": 1, "max_gap": 2, "progress": False, **options}
    return sc.calibrate(model, generate, **settings)


@contextmanager
def refused(model: nn.Module, error: type[Exception], words: str) -> Iterator[None]:
    """Refused in these words, before or after anything ran, and the model is as it was."""
    with unaltered(model), pytest.raises(error, match=words):
        yield


class CarefulByHand(ByHand):
    """Drops what was computed for inputs of another form."""

    def __init__(self, toy: Toy, schedule: sc.Schedule) -> None:
        self._forms: dict[tuple[str, int, int], Any] = {}
        super().__init__(toy, schedule)

    def _replacement(self, path: str, kind: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        inner = super()._replacement(path, kind, forward)

        def careful(*args: Any, **kwargs: Any) -> Any:
            place = (path, self._branch, self._uses.get(path, -1) + 1)
            form = [(x.shape, x.dtype) for x in pytree.tree_leaves((args, kwargs))]
            if self._forms.get(place, form) != form:
                self.outputs.pop(place, None)
            self._forms[place] = form
            return inner(*args, **kwargs)

        return careful


def assert_as_by_hand(toy: Toy, schedule: sc.Schedule, reason: str, **options: Any) -> sc.Summary:
    """Under a schedule as by hand, recomputed as often, and the model is left as it was.

    How many values an extrapolation goes through after a recomputation is left open.
    """
    by_hand = CarefulByHand(toy, schedule)
    expected = sample(by_hand.toy, begin=by_hand.begin, **options)
    with unaltered(toy), sc.cached(toy, schedule) as run:
        got = [sample(toy, **options) for _ in range(2)]
    assert same(*got)
    if all(row.predictor == "hold" for row in schedule.rows.values()):
        assert same(got[0], expected)
    assert [x.shape for x in got[0]] == [x.shape for x in expected]
    summary = run.summary()
    recomputed = {reason: 2 * by_hand.recomputed} if by_hand.recomputed else {}
    assert summary.recomputed == recomputed
    assert summary.finished == 2
    return summary


class DroppingToy(Toy):
    """Lets its blocks see only some of the tokens at some times; outside, nothing changes."""

    kept: Callable[[float], int] = staticmethod(lambda time: TOKENS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        kept = self.kept(float(t[0]))
        for block in self.blocks:
            h = torch.cat([block(h[:, :kept], c), h[:, kept:]], dim=1)
        out: Tensor = self.head(h)
        return out
