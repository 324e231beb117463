"""References: outputs that cannot serve as one are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.searches import STEPS, Sampler, calibrated, search
from support.toys import Toy
from torch import Tensor

import smoothcache as sc


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x, n: None, ["sample(0)", "NoneType", "final tensor"]),
        (lambda x, n: {"images": []}, ["sample(0)", "dict", "final tensor"]),
        (lambda x, n: x.numpy(), ["sample(0)", "ndarray", "final tensor"]),
        (lambda x, n: x * math.nan, ["sample(0)", "NaN"]),
        (lambda x, n: [x, x / 0], ["sample(0)", "infinity"]),
        (lambda x, n: x + 0.01 * torch.randn(x.shape), ["sample(0)", "generator seeded with i"]),
        (lambda x, n: x + n / 100, ["sample(0)", "in two runs", "evaluation mode"]),
        (lambda x, n: x[:, : 1 + n % 3], ["shapes", "must be the same"]),
        (lambda x, n: (x,) * (1 + n % 3), ["shapes", "must be the same"]),
    ],
    ids=["none", "empty", "array", "nan", "inf", "noise", "drift", "shapes", "tuples"],
)
def test_a_sample_that_cannot_be_judged_by(
    toy: Toy, spoil: Callable[[Tensor, int], Any], words: list[str], is_calibrated: bool
) -> None:
    sampler = Sampler(toy)

    def sample(i: int) -> Any:
        x = sampler.alone(i)
        return spoil(x, len(sampler.calls))

    with pytest.raises(sc.InvalidArgumentError) as caught:
        search(toy, sample, calibrated() if is_calibrated else None, speedup=2)
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(sampler.calls) <= 7


def test_a_sample_that_returns_every_step(toy: Toy) -> None:
    def sample(i: int, num_inference_steps: int = STEPS) -> Tensor:
        return torch.cat([Sampler(toy).stepped(i, num_inference_steps)] * num_inference_steps)

    with pytest.raises(sc.InvalidArgumentError, match=r"\[80, 6, 16\].* must be the same"):
        search(toy, sample, speedup=2)


def test_a_sample_that_diverges_with_more_steps(toy: Toy) -> None:
    def sample(i: int, num_inference_steps: int = STEPS) -> Tensor:
        x = Sampler(toy).stepped(i, num_inference_steps)
        return x / 0 if num_inference_steps > STEPS else x

    with pytest.raises(sc.InvalidArgumentError, match=r"num_inference_steps=80\).* infinity"):
        search(toy, sample, speedup=2)
