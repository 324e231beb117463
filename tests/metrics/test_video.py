"""Metrics of clips against what can be worked out by hand, and against those of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothcache import InvalidArgumentError
from smoothcache.metrics.distribution import attribute_accuracy
from smoothcache.metrics.fidelity import psnr, ssim
from smoothcache.metrics.video import (
    motion_error,
    psnr_per_frame,
    ssim_per_frame,
    temporal_consistency,
)

PAIRED = (psnr_per_frame, ssim_per_frame, motion_error)


@pytest.fixture
def clips() -> Tensor:
    return torch.rand((2, 3, 3, 16, 16), generator=torch.Generator().manual_seed(0))


def of_brightness(*frames: float) -> Tensor:
    return torch.tensor(frames).view(1, -1, 1, 1, 1)


@pytest.mark.parametrize(("clip", "image"), [(psnr_per_frame, psnr), (ssim_per_frame, ssim)])
def test_frames_are_judged_as_images(clips: Tensor, clip: Any, image: Any) -> None:
    reference = clips.flip(0)
    values = clip(clips, reference)
    assert values.shape == (2, 3)
    for i in range(2):
        torch.testing.assert_close(values[i], image(clips[i], reference[i]))


def test_a_still_clip_is_consistent_and_flicker_is_not() -> None:
    assert temporal_consistency(of_brightness(0.3, 0.3, 0.3)).item() == 1
    flicker = temporal_consistency(of_brightness(0.2, 0.8, 0.2))
    assert flicker.item() == pytest.approx(0.4)


def test_motion_error_counts_change_alone() -> None:
    reference = of_brightness(0.0, 0.2, 0.6)
    assert motion_error(reference, reference).item() == 0
    assert motion_error(reference + 0.3, reference).item() == pytest.approx(0, abs=1e-6)
    assert motion_error(reference / 2, reference).item() == pytest.approx(0.5)
    assert motion_error(reference.flip(1), reference).item() == pytest.approx(2)


def test_motion_error_sees_flicker_that_frames_hide() -> None:
    """Errors of one size in every frame: alike they are no flicker, in turns they are."""
    reference = of_brightness(0.3, 0.4, 0.5, 0.6)
    alike, in_turns = reference + 0.1, reference + of_brightness(0.1, -0.1, 0.1, -0.1)
    torch.testing.assert_close(
        psnr_per_frame(alike, reference), psnr_per_frame(in_turns, reference)
    )
    assert motion_error(in_turns, reference).item() > 1 > motion_error(alike, reference).item()


@pytest.mark.parametrize("measure", PAIRED)
def test_clips_of_other_shapes_are_refused(clips: Tensor, measure: Callable[..., Tensor]) -> None:
    with pytest.raises(InvalidArgumentError):
        measure(clips, clips[:, :2])


@pytest.mark.parametrize("measure", [*PAIRED, lambda clips, _: temporal_consistency(clips)])
def test_what_is_no_clip_is_refused(clips: Tensor, measure: Callable[..., Tensor]) -> None:
    for wrong in (clips[0], clips.long(), clips * torch.nan, clips[:0], "clips"):
        with pytest.raises(InvalidArgumentError):
            measure(wrong, wrong)


def test_change_needs_two_frames(clips: Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 2 frames"):
        temporal_consistency(clips[:, :1])


def test_attributes_are_judged_one_by_one() -> None:
    logits = {"colour": torch.eye(3), "shape": torch.eye(3).flip(0)}
    labels = torch.arange(3)
    assert attribute_accuracy(logits, {"colour": labels, "shape": labels}) == {
        "colour": 1.0,
        "shape": pytest.approx(1 / 3),
    }
    with pytest.raises(InvalidArgumentError, match="colour, shape, and the labels are of colour"):
        attribute_accuracy(logits, {"colour": labels})
