"""The video demo from end to end, on a pipeline with random weights and a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import build_clip_pipeline

from smoothcache import Calibration, InvalidArgumentError
from smoothcache._optional import MissingPackageError
from smoothcache.compare import REFERENCE
from smoothcache.demo import video
from smoothcache.demo.classifier import save_classifier
from smoothcache.demo.clip_classifier import ClipClassifier
from smoothcache.demo.clips import ATTRIBUTES
from smoothcache.demo.course import DemoResult
from smoothcache.demo.video import BATCH, run_demo

STEPS = 5


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
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
        )


def test_it_compares_everything_with_fewer_steps(result: DemoResult) -> None:
    names = [row.name for row in result.report.rows]
    assert names[0] == REFERENCE
    assert {f"FORA n = {n}{how}" for n in (2, 3) for how in ("", ", Taylor")} <= set(names)
    assert any(name.startswith("α = ") for name in names)
    assert set(result.comparison.rivals.values()) <= set(names)
    assert result.comparison.images[REFERENCE].shape == (BATCH, 8, 3, 32, 32)


def test_rows_have_the_metrics_of_clips(result: DemoResult) -> None:
    for row in result.report.rows:
        values = (row.psnr, row.ssim, row.motion_error, row.temporal_consistency)
        assert None not in (*values, row.frechet_distance, row.time), row.name
        assert list(row.accuracies) == list(ATTRIBUTES)
    header = result.report.header()
    assert "motion error" in header and "direction accuracy" in header


def test_spatial_and_temporal_layers_have_curves_of_their_own(result: DemoResult) -> None:
    kinds = ("self_attn", "cross_attn", "ffn")
    wanted = {f"{stack}_{kind}" for stack in ("spatial", "temporal") for kind in kinds}
    assert set(result.calibration.kinds) == wanted


def test_it_says_what_it_measured(result: DemoResult) -> None:
    assert f"{BATCH} clips" in result.report.title
    assert f"{STEPS} rectified flow steps" in result.report.title
    assert result.report.notes[-1] == result.comparison.verdict()[-1]


def test_it_writes_what_it_says(result: DemoResult) -> None:
    from PIL import Image

    assert sorted(result.files) == sorted(result.folder.iterdir())
    names = {path.name for path in result.files}
    assert {"error-curves.png", "composition.png", "frames-n2-0.png", "clips-n3.gif"} <= names
    with Image.open(result.folder / "clips-n2.gif") as moving:
        assert moving.n_frames > 1
    document = json.loads((result.folder / "table.json").read_text(encoding="utf-8"))
    assert set(document["rows"][0]["accuracies"]) == set(ATTRIBUTES)
    assert Calibration.load(result.folder / "calibration.safetensors").num_steps == STEPS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be"),
        ({"num_samples": 15}, "multiple of 12"),
        ({"num_steps": 1}, "num_steps must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        run_demo(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"transformers.*smoothcache\[video\]"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()
