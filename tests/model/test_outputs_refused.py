"""What returns nothing of use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.reference import STEPS, ByHand, same, sample, times
from support.toys import TOKENS, WIDTH, Attention, Block, Toy
from support.unusual_models import calibrated, made, predictors, refused, uniform
from torch import Tensor

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class InPlaceAttention(Attention):
    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        x.add_(super().forward(x))


class SaysAttention(Attention):
    answer: Any = "done"

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        x.add_(super().forward(x))
        return self.answer


class SilentLayerBlock(Block):
    attention: type[Attention] = InPlaceAttention

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.attn = self.attention(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + c[:, None]
        self.attn(x)
        return x + self.mlp(self.norm2(x))


class SilentLayerToy(Toy):
    """Its attention writes into its input and returns nothing."""

    block = SilentLayerBlock


class TalkingLayerBlock(SilentLayerBlock):
    attention = SaysAttention


class TalkingLayerToy(Toy):
    """Its attention writes into its input and returns something else."""

    block = TalkingLayerBlock


class SilentBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> None:  # type: ignore[override]
        x.add_(self.attn(self.norm1(x) + c[:, None]))
        x.add_(self.mlp(self.norm2(x)))


class SilentBlockToy(Toy):
    """Its blocks write into their input and return nothing."""

    block = SilentBlock

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, h = self.condition(t, y), self.x_embedder(x)
        for block in self.blocks:
            block(h, c)
        out: Tensor = self.head(h)
        return out


SILENT = [
    (SilentLayerToy, "auto", "blocks.0.attn", "NoneType"),
    (SilentLayerToy, "layer", "blocks.0.attn", "NoneType"),
    (TalkingLayerToy, "auto", "blocks.0.attn", "str"),
    (SilentBlockToy, "block", "blocks.0", "NoneType"),
]
silent = pytest.mark.parametrize(("kind", "granularity", "path", "returned"), SILENT)


@silent
def test_what_returns_no_tensor_cannot_be_calibrated(
    kind: type[Toy], granularity: Any, path: str, returned: str
) -> None:
    toy = made(kind)
    words = rf"'{path}' returned no tensor but {returned}.*leave it out with find_layers"
    with refused(toy, sc.CalibrationError, words):
        calibrated(toy, lambda i: sample(toy), granularity=granularity)


@silent
@predictors
def test_what_returns_no_tensor_cannot_be_reused(
    kind: type[Toy], granularity: Any, path: str, returned: str, predictor: str
) -> None:
    toy = made(kind)
    plain = sample(toy)
    schedule = uniform(toy, granularity=granularity, predictor=predictor)
    words = rf"'{path}' returned no tensor but {returned}.*leave it out of the schedule"
    with refused(toy, sc.ScheduleMismatchError, words), sc.cached(toy, schedule):
        sample(toy)
    handle = sc.enable(toy, schedule)
    with pytest.raises(sc.ScheduleMismatchError, match=words):
        sample(toy)
    assert handle.summary().held_bytes == 0
    handle.disable()
    assert same(sample(toy), plain)


@silent
def test_what_returns_no_tensor_may_be_computed_and_left_out(
    kind: type[Toy], granularity: Any, path: str, returned: str
) -> None:
    toy = made(kind)
    plain = sample(toy)
    with sc.cached(toy, uniform(toy, 1, granularity=granularity)):
        assert same(sample(toy), plain)
    kept = sc.find_layers(toy, select=lambda name, module: name.endswith("mlp"))
    schedule = uniform(toy, layers=kept)
    by_hand = ByHand(toy, schedule)
    with sc.cached(toy, schedule) as run:
        assert same(sample(toy), sample(by_hand.toy, begin=by_hand.begin))
    assert run.summary().reused == schedule.reused


@pytest.mark.parametrize("answer", [3, 1.5, True, [], {}, (None, None), object(), "text"])
def test_answers_without_tensors(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SaysAttention, "answer", answer)
    toy = made(TalkingLayerToy)
    words = rf"'blocks.0.attn' returned no tensor but {type(answer).__name__}"
    with refused(toy, sc.CalibrationError, words):
        calibrated(toy, lambda i: sample(toy))
    with refused(toy, sc.ScheduleMismatchError, words), sc.cached(toy, uniform(toy)):
        sample(toy)


class IgnoredBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x.add_(self.attn(self.norm1(x) + c[:, None]))
        return x.add_(self.mlp(self.norm2(x)))


class IgnoringToy(SilentBlockToy):
    """Its blocks write into their input and return it; the model looks at the input alone."""

    block = IgnoredBlock


MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@MODES
@pytest.mark.parametrize("kind", ["block", "whole"])
def test_blocks_whose_effect_on_their_input_is_what_counts(
    kind: str, mode: Callable[[], Any]
) -> None:
    """A reused one, as a residual or as it is, writes into its input too."""
    toy = made(IgnoringToy)
    toy.condition = lambda t, y: torch.zeros(len(t), WIDTH)
    blocks = sc.find_layers(toy, select=lambda path, m: kind if isinstance(m, Block) else False)
    assert len(blocks) == len(toy.blocks)
    with mode():
        x, y = torch.randn(1, TOKENS, WIDTH), torch.tensor([0])
        plain = toy.denoise(x, torch.tensor([1.0]), y)
        with sc.cached(toy, uniform(toy, layers=blocks)) as run:
            for time in times():
                torch.testing.assert_close(toy.denoise(x, torch.tensor([time]), y), plain)
    assert run.summary().reused == len(blocks) * STEPS // 2


class ViewBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x.mul_(1.5)[:]


class ViewToy(SilentBlockToy):
    """Its blocks write into their input and return a view of it."""

    block = ViewBlock


@MODES
def test_writes_into_what_is_not_returned_are_refused_in_any_mode(mode: Callable[[], Any]) -> None:
    toy = made(ViewToy)
    with mode(), refused(toy, sc.ScheduleMismatchError, "writes into an input tensor in place"):
        with sc.cached(toy, uniform(toy, granularity="block")):
            sample(toy)
