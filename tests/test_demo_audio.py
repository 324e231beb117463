"""The audio demo from end to end, on a pipeline with random weights and a few steps."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import pytest
import torch
from tiny_pipeline import build_audio_pipeline

from smoothcache import Calibration, InvalidArgumentError, Schedule
from smoothcache.compare import REFERENCE
from smoothcache.demo import audio
from smoothcache.demo.audio import Judge, batch_attributes, real_sounds, run_demo
from smoothcache.demo.course import DemoResult
from smoothcache.demo.tone_classifier import ToneClassifier, save_classifier
from smoothcache.demo.tones import SAMPLING_RATE, generate

pytest.importorskip("torchsde")

STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    build_audio_pipeline().save_pretrained(folder)
    save_classifier(ToneClassifier(width=8), folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(folder: Path, told: list[str], tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "NUM_REAL", 40)
        patch.setattr(audio, "NUM_CALIBRATION", 2)
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
    for row in result.report.rows:
        values = (row.compute, row.time, row.snr, row.log_spectral_distance, row.stft_distance,
                  row.label_divergence, row.frechet_distance)  # fmt: skip
        assert None not in values, row.name
        assert set(row.accuracies) == {"timbre", "pitch", "rhythm"}
        assert row.psnr is None and row.ssim is None
    assert result.comparison.row(REFERENCE).label_divergence == 0
    assert result.comparison.images[REFERENCE].shape == (20, 1, 16_384)


def test_the_table_has_the_columns_of_sounds(result: DemoResult) -> None:
    header = result.report.header()
    assert {"SNR, dB", "timbre accuracy", "pitch accuracy", "label KL, nats"} <= set(header)
    assert "PSNR, dB" not in header and "accuracy" not in header


def test_it_says_what_it_measured_and_whether_caching_pays(result: DemoResult) -> None:
    assert "20 sounds" in result.report.title and "DPM-Solver++(3M) SDE" in result.report.title
    assert result.report.notes[-1] == result.comparison.verdict()[-1]
    assert "in signal-to-noise ratio against the uncached sounds" in result.report.notes[-1]


def test_stages_are_told_and_timed(result: DemoResult, told: list[str]) -> None:
    assert [line.partition(" ")[0].strip(",") for line in told] == [
        "loading", "calibrating", "planning", "sampling", "writing",
    ]  # fmt: skip
    assert len(result.seconds) == len(told)


def test_it_writes_what_it_says(result: DemoResult) -> None:
    assert sorted(result.files) == sorted(result.folder.iterdir())  # and none of them twice
    names = {path.name for path in result.files}
    assert {"error-curves.png", "composition.png", "spectrograms-n2.png"} <= names
    assert {"bell-uncached.wav", "bell-n2-fora.wav", "drum-n3-smoothcache.wav"} <= names
    for path in result.files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        if path.suffix == ".wav":
            with wave.open(str(path)) as file:
                assert file.getframerate() == SAMPLING_RATE and file.getnframes() == 16_384
    document = json.loads((result.folder / "table.json").read_text(encoding="utf-8"))
    assert set(document["rows"][0]["accuracies"]) == {"timbre", "pitch", "rhythm"}
    assert Calibration.load(result.folder / "calibration.safetensors").num_steps == STEPS
    even = Schedule.load(result.folder / "schedule-n2-fora.json")
    assert even == result.schedules["FORA n = 2"]


def test_scores_judge_each_attribute() -> None:
    torch.manual_seed(0)
    sounds = real_sounds(20)
    assert sounds.shape == (20, 1, 16_384)
    assert not torch.equal(sounds, generate(batch_attributes(0), seed=audio.DATA_SEED)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "NUM_REAL", 20)
        judge = Judge(ToneClassifier(width=8).eval())
    assert all(0 <= judge.accuracy(sounds, i) <= 1 for i in range(3))
    assert judge.divergence(sounds) == 0 < judge.divergence(sounds.flip(0))
    assert judge.distance(sounds) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be"),
        ({"num_samples": 30}, "multiple of 20"),
        ({"num_steps": 1}, "num_steps must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        run_demo(tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
