"""The demo from end to end, on a pipeline with random weights and a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_pipeline import build_pipeline

from smoothcache import Calibration, InvalidArgumentError, Schedule
from smoothcache.compare import REFERENCE
from smoothcache.demo import image
from smoothcache.demo.classifier import ShapeClassifier, save_classifier
from smoothcache.demo.course import DemoResult
from smoothcache.demo.image import Judge, real_images, run_demo
from smoothcache.methods import plan_at_cost

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
    names = [row.name for row in result.report.rows]
    assert names[0] == REFERENCE
    assert {f"FORA n = {n}{how}" for n in (2, 3) for how in ("", ", Taylor")} <= set(names)
    assert any(name.startswith("α = ") for name in names)
    assert set(result.comparison.rivals) == set(result.schedules)
    assert set(result.comparison.rivals.values()) <= set(names)
    for row in result.report.rows:
        values = (row.compute, row.time, row.psnr, row.class_accuracy, row.frechet_distance)
        assert None not in values, row.name
    assert len(result.comparison.images[REFERENCE]) == 20


def test_it_says_what_it_measured_and_whether_caching_pays(result: DemoResult) -> None:
    assert "20 images" in result.report.title and f"{STEPS} DDIM steps" in result.report.title
    assert result.report.notes[-1] == result.comparison.verdict()[-1]


def test_it_calibrates_on_one_sample_of_each_class(result: DemoResult) -> None:
    assert result.calibration.num_samples == 10
    assert result.calibration.num_steps == STEPS and result.calibration.max_gap == 3


def test_stages_are_told_and_timed(result: DemoResult, told: list[str]) -> None:
    assert [line.partition(" ")[0].strip(",") for line in told] == [
        "loading", "calibrating", "planning", "sampling", "writing",
    ]  # fmt: skip
    assert len(result.seconds) == len(told)


def test_it_writes_what_it_says(result: DemoResult) -> None:
    assert sorted(result.files) == sorted(result.folder.iterdir())  # and none of them twice
    names = {path.name for path in result.files}
    assert {"error-curves.png", "composition.png", "images-n2.png"} <= names
    document = json.loads((result.folder / "table.json").read_text(encoding="utf-8"))
    assert len(document["rows"]) == len(result.report.rows)
    assert "FORA n = 2" in (result.folder / "table.md").read_text(encoding="utf-8")
    for path in result.files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    assert Calibration.load(result.folder / "calibration.safetensors").num_steps == STEPS
    even = Schedule.load(result.folder / "schedule-n2-fora.json")
    assert even == result.schedules["FORA n = 2"]


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be"),
        ({"num_samples": 15}, "multiple of 10"),
        ({"num_steps": 1}, "num_steps must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        run_demo(tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
