"""The demo from end to end, on a pipeline with random weights and a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.demo_results import (
    assert_everything_is_compared,
    assert_everything_is_written,
    assert_stages_are_told_and_timed,
)
from support.tiny_pipeline import build_pipeline

from smoothcache.comparison.methods import plan_at_cost
from smoothcache.comparison.result import REFERENCE
from smoothcache.demo import image
from smoothcache.demo.classifier import ShapeClassifier, save_classifier
from smoothcache.demo.course import DemoResult
from smoothcache.demo.image import Judge, real_images, run_demo

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = build_pipeline()
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    pipeline.register_modules(vae=vae.eval())
    pipeline.save_pretrained(folder)
    save_classifier(ShapeClassifier(width=8), folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(folder: Path, told: list[str], tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "NUM_REAL", 100)
        return run_demo(
            tmp_path_factory.mktemp("out") / "new" / "demo",
            folder=folder,
            num_samples=20,
            num_steps=STEPS,
            progress=False,
            tell=told.append,
        )


def test_it_compares_everything_with_fewer_steps(result: DemoResult) -> None:
    assert_everything_is_compared(result, "psnr", "class_accuracy", "frechet_distance")
    assert len(result.comparison.images[REFERENCE]) == 20
    assert "20 images" in result.report.title and f"{STEPS} DDIM steps" in result.report.title


def test_it_calibrates_on_one_sample_of_each_class(result: DemoResult) -> None:
    assert result.calibration.num_samples == 10
    assert result.calibration.num_steps == STEPS and result.calibration.max_gap == 3


def test_stages_are_told_and_timed(result: DemoResult, told: list[str]) -> None:
    assert_stages_are_told_and_timed(result, told)


def test_it_writes_what_it_says(result: DemoResult) -> None:
    assert_everything_is_written(result, "images-n2.png", "images-n3.png")


def test_the_cost_of_a_threshold_is_that_of_fora(result: DemoResult) -> None:
    fora = result.schedules["FORA n = 2"].compute
    threshold = plan_at_cost(result.calibration, fora or 1.0)
    assert threshold.provenance["planner"] == "threshold"
    assert threshold.compute == pytest.approx(fora, abs=0.35)


def test_real_images_are_new_and_balanced() -> None:
    images = real_images(20)
    assert images.shape == (20, 3, 32, 32)
    assert 0 <= images.min() and images.max() <= 1
    torch.manual_seed(0)
    judge = Judge(ShapeClassifier(width=8).eval())
    assert 0 <= judge.accuracy(images) <= 1
    assert judge.distance(images) > 0
