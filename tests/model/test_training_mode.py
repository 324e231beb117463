"""Training mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import unusual_models
from support.toys import TOKENS, WIDTH, Block, Mlp, Toy, build
from support.unusual_models import calibrated, made, uniform
from torch import Tensor, nn

import smoothcache as sc


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class DroppingOutMlp(Mlp):
    def __init__(self, dim: int, p: float = 0.1) -> None:
        super().__init__(dim)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(super().forward(x))
        return out


def with_dropout(p: float) -> Toy:
    toy: Toy = made(Toy)
    toy.blocks[1].mlp = DroppingOutMlp(WIDTH, p)
    return toy


def warnings_of(model: Any) -> list[warnings.WarningMessage]:
    """What is said when a model is put under a schedule, and when it is calibrated."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sc.cached(model, uniform(model)) as run:
            run.reset()
        sc.enable(model, uniform(model)).disable()
        with pytest.raises(sc.CalibrationError, match="never ran"):
            calibrated(model, lambda i: None)
    ours = [one for one in caught if issubclass(one.category, sc.SmoothCacheWarning)]
    return [one for one in ours if "no generation was seen" not in str(one.message)]


@pytest.mark.parametrize("p", [0.1, 1.0])
def test_dropout_in_training_mode_is_said(p: float) -> None:
    said = warnings_of(with_dropout(p).train())
    assert len(said) == 3
    for one in said:
        for words in ("Toy is in training mode", "'blocks.1.mlp.drop'", "eval()"):
            assert words in str(one.message)


@pytest.mark.parametrize(
    "kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout]
)
def test_every_kind_of_dropout_is_said(kind: type[nn.Module]) -> None:
    toy = with_dropout(0.0).train()
    toy.blocks[1].mlp.drop = kind(0.5)
    assert len(warnings_of(toy)) == 3


def test_one_dropout_left_in_training_mode_is_said() -> None:
    toy = with_dropout(0.1).eval()
    toy.blocks[1].mlp.drop.train()
    assert len(warnings_of(toy)) == 3


@pytest.mark.parametrize(
    "toy",
    [
        with_dropout(0.1).eval(),
        with_dropout(0.0).train(),
        with_dropout(0.0).eval(),
        build("single").train(),
    ],
    ids=["evaluation", "dropout of nothing", "neither", "no dropout"],
)
def test_nothing_is_said_where_nothing_is_dropped(toy: Toy) -> None:
    assert warnings_of(toy) == []


def test_of_the_denoisers_of_a_pipeline_any_is_said() -> None:
    text_encoder = DroppingOutMlp(WIDTH).train()
    pipe = SimpleNamespace(
        components={
            "transformer": with_dropout(0.1).eval(),
            "transformer_2": with_dropout(0.1).train(),
            "text_encoder": text_encoder,
        }
    )
    with pytest.warns(sc.SmoothCacheWarning, match=r"'blocks\.1\.mlp\.drop'"):
        sc.enable(pipe, uniform(pipe)).disable()
    pipe.components["transformer_2"].eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*training mode", sc.SmoothCacheWarning)
        sc.enable(pipe, uniform(pipe)).disable()


class MultiheadBlock(Block):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.attn = nn.MultiheadAttention(dim, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm1(x) + c[:, None]
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class MultiheadToy(Toy):
    block = MultiheadBlock


@pytest.mark.parametrize("what", ["attention of torch", "feature alpha dropout"])
def test_other_dropout_is_said_too(what: str) -> None:
    toy = made(MultiheadToy) if what == "attention of torch" else with_dropout(0.0)
    if what == "feature alpha dropout":
        toy.blocks[1].mlp.drop = nn.FeatureAlphaDropout(0.5)
    toy.train()
    x, t, y = torch.ones(1, TOKENS, WIDTH), torch.tensor([1.0]), torch.tensor([0])
    assert not torch.equal(toy(x, t, y), toy(x, t, y))
    assert len(warnings_of(toy)) == 3


def test_the_warning_names_the_line_of_the_caller() -> None:
    said = warnings_of(with_dropout(0.1).train())
    assert {one.filename for one in said} == {__file__, unusual_models.__file__}
