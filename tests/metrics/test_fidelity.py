"""Metrics against their formulas, and what they refuse."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from smoothcache.errors import InvalidArgumentError, MissingPackageError, SmoothCacheError
from smoothcache.metrics.distribution import class_accuracy, frechet_distance
from smoothcache.metrics.fidelity import psnr, relative_error, ssim
from smoothcache.optional import optional_module

Fidelity = Callable[[Tensor, Tensor], Tensor]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape or (3, 3, 16, 20), generator=torch.Generator().manual_seed(seed))


def test_psnr_is_the_formula_image_by_image() -> None:
    a, b = images(seed=1), images(seed=2)
    mse = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(psnr(a, b).double(), -10 * mse.log10(), rtol=1e-5, atol=1e-4)
    theirs = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(a, b), theirs)


def test_psnr_of_identical_images_is_infinite() -> None:
    a = images()
    b = a.clone()
    b[0] = 1 - b[0]
    assert psnr(a, b).isinf().tolist() == [False, True, True]
    assert psnr(a, a).gt(0).all()


def test_a_single_image_keeps_its_batch() -> None:
    a = images(1, 3, 16, 16)
    for metric in (psnr, ssim, relative_error):
        assert metric(a, 1 - a).shape == (1,)


def test_ssim_orders_noise() -> None:
    a = images(2, 3, 32, 32)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    little, much = ((a + s * noise).clamp(0, 1) for s in (0.02, 0.2))
    assert (ssim(a, a) == 1).all()
    assert (ssim(much, a) < ssim(little, a)).all()


def test_half_precision_is_compared_in_single() -> None:
    a, b = images(seed=1).half(), images(seed=2).half()
    for metric in (psnr, ssim, relative_error):
        torch.testing.assert_close(metric(a, b), metric(a.float(), b.float()))


def test_relative_error_is_the_papers() -> None:
    a, b = images(seed=1), images(seed=2)
    expected = [(x - y).abs().sum() / y.abs().sum() for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(relative_error(a, b), torch.stack(expected))
    expected = [(x - y).norm() / y.norm() for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(relative_error(a, b, norm="l2"), torch.stack(expected))


def test_relative_error_to_nothing() -> None:
    zero = torch.zeros(1, 4)
    assert relative_error(zero, zero).item() == 0
    assert math.isinf(relative_error(zero + 1, zero).item())


@pytest.mark.parametrize("metric", [psnr, ssim, relative_error])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a[:2], r"\[2, 3, 16, 20\].*\[3, 3, 16, 20\]"),
        (lambda a: (255 * a).byte(), "floating point, got torch.uint8"),
        (lambda a: a.numpy(), "floating point, got ndarray"),
        (lambda a: a * math.nan, "NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    metric: Fidelity, change: Callable[[Tensor], Tensor], reason: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        metric(change(images()), images())


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_is_no_image_is_refused(metric: Fidelity) -> None:
    with pytest.raises(InvalidArgumentError, match=r"\[0, 1\], got values from -"):
        metric(images() * 2 - 1, images())
    with pytest.raises(InvalidArgumentError, match=r"reference must be in \[0, 1\]"):
        metric(images(), images() * 2)
    with pytest.raises(InvalidArgumentError, match="height, width"):
        metric(images(3, 16, 16), images(3, 16, 16))


def test_small_images_and_unknown_norms_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least 11 x 11 pixels, got 8 x 16"):
        ssim(images(1, 3, 8, 16), images(1, 3, 8, 16))
    with pytest.raises(InvalidArgumentError, match="'l3'"):
        relative_error(images(), images(), norm="l3")  # type: ignore[arg-type]


def gaussian(mean: float, scale: float, *, rows: int = 4000, columns: int = 3) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(mean + scale * rng.standard_normal((rows, columns)))


def test_frechet_distance_of_gaussians() -> None:
    # For N(m, s^2 I): columns * ((m1 - m2)^2 + (s1 - s2)^2)
    distance = frechet_distance(gaussian(1.5, 2.0), gaussian(0.0, 1.0))
    assert distance == pytest.approx(3 * (1.5**2 + 1.0), rel=0.05)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    features = gaussian(1000.0, 1.0, rows=64, columns=16).float()
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_with_fewer_samples_than_features() -> None:
    features = gaussian(0.0, 1.0, rows=8, columns=32)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(features + 1, features) == pytest.approx(32, rel=1e-4)


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (torch.rand(4), r"got \[4\]"),
        (torch.rand(1, 3), "at least 2"),
        (torch.rand(4, 5), "5 columns, their reference 3"),
        (torch.full((4, 3), math.nan), "finite"),
        (torch.ones(4, 3, dtype=torch.long), "floating point"),
    ],
)
def test_features_that_do_not_fit_are_refused(features: Tensor, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        frechet_distance(features, torch.rand(4, 3))


def test_class_accuracy_counts() -> None:
    logits = torch.eye(4)
    assert class_accuracy(logits, torch.arange(4)) == 1
    assert class_accuracy(logits, torch.tensor([0, 1, 0, 0])) == 0.5


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.eye(4), torch.arange(3)),
        (torch.eye(4), torch.arange(4.0)),
        (torch.eye(4), torch.arange(1, 5)),
        (torch.eye(4), -torch.ones(4, dtype=torch.long)),
        (torch.eye(4) * math.nan, torch.arange(4)),
        (torch.ones(4), torch.arange(4)),
    ],
)
def test_labels_that_do_not_fit_are_refused(logits: Tensor, labels: Tensor) -> None:
    with pytest.raises(InvalidArgumentError):
        class_accuracy(logits, labels)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(MissingPackageError, match=r"pip install '\.\[metrics\]'") as error:
        ssim(images(), images())
    assert isinstance(error.value, SmoothCacheError)
    assert isinstance(error.value, ImportError)
    assert "\n" not in str(error.value)


def test_optional_module_returns_the_module_itself() -> None:
    assert optional_module("json", extra="metrics").dumps([1]) == "[1]"
