"""Inception Score, precision and recall, and kernel distances against explicit loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from smoothcache.errors import InvalidArgumentError
from smoothcache.metrics import InceptionScore, MetricResult, inception_score, kid, precision_recall
from smoothcache.metrics import precision_recall as _function
from smoothcache.metrics.kid import gaussian_mmd
from smoothcache.metrics.result import mean_result


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def explicit_inception_score(logits: Tensor) -> float:
    p = logits.softmax(dim=1)
    mean = p.mean(dim=0)
    total = 0.0
    for row in p:
        total += sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(row, mean, strict=True))
    return math.exp(total / len(p))


def test_inception_score_is_by_splits_in_order() -> None:
    logits = 3 * normal(60, 7)
    result = inception_score(logits, split_size=20)
    splits = torch.tensor([explicit_inception_score(x) for x in logits.split(20)]).double()
    assert result.value == pytest.approx(float(splits.mean()))
    assert result.spread == pytest.approx(float(splits.std(correction=0)))
    by_class = logits[logits.argmax(dim=1).argsort()]
    assert inception_score(by_class, split_size=20).value != pytest.approx(result.value)


@pytest.mark.parametrize("num_classes", [2, 10])
def test_inception_score_of_certain_and_uncertain_classes(num_classes: int) -> None:
    certain = 1000 * torch.eye(num_classes).repeat(3, 1)  # probabilities of exactly 0
    assert inception_score(certain, split_size=len(certain)).value == pytest.approx(num_classes)
    uncertain = torch.zeros(6, num_classes)
    assert inception_score(uncertain, split_size=3).value == pytest.approx(1)


def test_inception_scores_of_ranks_merge() -> None:
    logits, indices = normal(40, 5), torch.arange(40)
    merged = InceptionScore(5, split_size=10)
    for rank in range(3):
        part = InceptionScore(5, split_size=10)
        for batch in indices[rank::3].split(4):
            part.update(logits[batch], batch)
        merged.merge(part)
    assert merged.result().value == pytest.approx(inception_score(logits, split_size=10).value)
    with pytest.raises(InvalidArgumentError, match="cannot be merged"):
        merged.merge(InceptionScore(5, split_size=11))


def test_inception_score_refuses_partial_splits() -> None:
    with pytest.raises(InvalidArgumentError, match="full splits of 5000 samples, got 12"):
        inception_score(normal(12, 5))
    with pytest.raises(InvalidArgumentError, match="multiple of 5"):
        inception_score(normal(12, 5), split_size=5)
    with pytest.raises(InvalidArgumentError, match="1008"):
        InceptionScore().update(normal(2, 5))


def explicit_precision(samples: Tensor, reference: Tensor, k: int) -> float:
    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm())

    inside = 0
    radii = []
    for i, a in enumerate(reference):
        others = sorted(distance(a, b) for j, b in enumerate(reference) if i != j)
        radii.append(others[k - 1])
    for a in samples:
        inside += any(distance(a, b) <= r for b, r in zip(reference, radii, strict=True))
    return inside / len(samples)


@pytest.mark.parametrize("block", [7, 2048])
def test_precision_and_recall_are_those_of_loops(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    import sys

    monkeypatch.setattr(sys.modules[_function.__module__], "BLOCK", block)
    samples, reference = 0.7 * normal(40, 3) + 0.6 + 1e3, normal(30, 3, seed=1) + 1e3
    precision, recall = precision_recall(samples, reference)
    assert precision.value == pytest.approx(explicit_precision(samples, reference, 3))
    assert recall.value == pytest.approx(explicit_precision(reference, samples, 3))
    assert 0 < recall.value < 1 and recall.value != precision.value
    share = precision.value
    assert precision.spread == pytest.approx(math.sqrt(share * (1 - share) / 40))
    assert precision.num_references == 30


def test_precision_and_recall_of_the_same_and_of_apart_sets() -> None:
    samples = normal(20, 4)
    assert [x.value for x in precision_recall(samples, samples)] == [1, 1]
    assert [x.value for x in precision_recall(samples + 100, samples)] == [0, 0]
    with pytest.raises(InvalidArgumentError, match="more than 3 samples"):
        precision_recall(samples[:3], samples)
    with pytest.raises(InvalidArgumentError, match="4 columns, their reference 3"):
        precision_recall(samples, samples[:, :3])


def explicit_kid(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n = len(x)
    value = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                value += (kernel(x[i], x[j]) + kernel(y[i], y[j])) / (n * (n - 1))
            value -= 2 * kernel(x[i], y[j]) / n**2
    return value


def test_kid_is_that_of_a_loop() -> None:
    x, y = normal(12, 5), normal(12, 5, seed=1) + 0.3
    result = kid(x, y, num_subsets=1, subset_size=12)  # a subset of all: the order is no matter
    assert result.value == pytest.approx(explicit_kid(x, y))
    assert result.spread is None


def test_kid_is_unbiased_and_repeatable() -> None:
    x, y = normal(300, 4), normal(300, 4, seed=1)
    result = kid(x, y, num_subsets=50, subset_size=30)
    assert result.spread is not None and abs(result.value) < result.spread
    assert result == kid(x, y, num_subsets=50, subset_size=30)
    assert kid(x + 1, y, num_subsets=50, subset_size=30).value > 10 * abs(result.value)
    with pytest.raises(InvalidArgumentError, match=r"subsets of 1000.*300 samples"):
        kid(x, y)


def explicit_mmd(x: Tensor, y: Tensor, sigma: float) -> float:
    def mean(a: Tensor, b: Tensor) -> float:
        total = 0.0
        for u in a:
            for v in b:
                total += math.exp(-float((u - v).square().sum()) / (2 * sigma**2))
        return total / (len(a) * len(b))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


@pytest.mark.parametrize("block", [5, 2048])
def test_gaussian_mmd_is_that_of_a_loop(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    import sys

    monkeypatch.setattr(sys.modules[gaussian_mmd.__module__], "BLOCK", block)
    x, y = normal(13, 3), normal(11, 3, seed=1) + 0.5
    value, spread = gaussian_mmd(x, y, sigma=1.5, num_groups=4)
    assert value == pytest.approx(explicit_mmd(x, y, 1.5))
    left = [explicit_mmd(x[torch.arange(13) % 4 != g], y, 1.5) for g in range(4)]
    mean = sum(left) / 4
    assert spread == pytest.approx(math.sqrt(3 / 4 * sum((v - mean) ** 2 for v in left)))


def test_results_refuse_what_is_not_finite() -> None:
    with pytest.raises(InvalidArgumentError, match="the value of fid is nan"):
        MetricResult("fid", math.nan, num_samples=1, unit="", protocol="")
    with pytest.raises(InvalidArgumentError, match="sample 1 is inf"):
        mean_result("lpips", torch.tensor([1.0, math.inf]), unit="", protocol="")
    result = mean_result("lpips", torch.tensor([1.0, 3.0]), unit="", protocol="p")
    assert (result.value, result.spread) == (2, pytest.approx(1))
    assert str(result) == "lpips 2 ± 1 (n = 2)"
    assert mean_result("x", torch.ones(1), unit="", protocol="").spread is None
