"""The video demo from end to end, on a pipeline with random weights and a few steps."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from support.demo_results import (
    assert_everything_is_compared,
    assert_everything_is_written,
    assert_stages_are_told_and_timed,
)
from support.tiny_pipeline import build_clip_pipeline

from smoothcache.comparison.result import REFERENCE
from smoothcache.demo import video
from smoothcache.demo.classifier import save_classifier
from smoothcache.demo.clip_classifier import ClipClassifier
from smoothcache.demo.clips import ATTRIBUTES
from smoothcache.demo.course import DemoResult
from smoothcache.demo.video import BATCH, run_demo

STEPS = 5


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(told: list[str], tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    folder = tmp_path_factory.mktemp("pipeline")
    build_clip_pipeline(depth=1).save_pretrained(folder)
    torch.manual_seed(0)
    save_classifier(ClipClassifier(width=8), folder / "classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "NUM_REAL", 70)
        patch.setattr(video, "NUM_CALIBRATION", 2)
        return run_demo(
            tmp_path_factory.mktemp("out") / "demo",
            folder=folder,
            num_samples=BATCH,
            num_steps=STEPS,
            progress=False,
            tell=told.append,
        )


def test_it_compares_everything_with_fewer_steps(result: DemoResult) -> None:
    columns = ("psnr", "ssim", "motion_error", "temporal_consistency", "frechet_distance")
    assert_everything_is_compared(result, *columns)
    assert all(list(row.accuracies) == list(ATTRIBUTES) for row in result.report.rows)
    header = result.report.header()
    assert "motion error" in header and "direction accuracy" in header
    assert result.comparison.images[REFERENCE].shape == (BATCH, 8, 3, 32, 32)


def test_the_last_step_is_computed_under_fora(result: DemoResult) -> None:
    assert all(result.schedules[f"FORA n = {n}"].table()[:, -1].all() for n in (2, 3))


def test_spatial_and_temporal_layers_have_curves_of_their_own(result: DemoResult) -> None:
    kinds = ("self_attn", "cross_attn", "ffn")
    wanted = {f"{stack}_{kind}" for stack in ("spatial", "temporal") for kind in kinds}
    assert set(result.calibration.kinds) == wanted


def test_it_says_what_it_measured(result: DemoResult) -> None:
    assert f"{BATCH} clips" in result.report.title
    assert f"{STEPS} rectified flow steps" in result.report.title


def test_stages_are_told_and_timed(result: DemoResult, told: list[str]) -> None:
    assert_stages_are_told_and_timed(result, told)


def test_it_writes_what_it_says(result: DemoResult) -> None:
    assert_everything_is_written(result, "frames-n2-0.png", "frames-n3-1.png", "clips-n3.gif")
    with Image.open(result.folder / "clips-n2.gif") as moving:
        assert moving.n_frames == 8
