"""The audio demo from end to end, on a pipeline with random weights and a few steps."""

from __future__ import annotations

import wave
from pathlib import Path

import pytest
import torch
from support.demo_results import (
    assert_everything_is_compared,
    assert_everything_is_written,
    assert_stages_are_told_and_timed,
)
from support.tiny_pipeline import build_audio_pipeline

from smoothcache.comparison.result import REFERENCE
from smoothcache.demo import audio
from smoothcache.demo.audio import Judge, batch_attributes, real_sounds, run_demo
from smoothcache.demo.classifier import save_classifier
from smoothcache.demo.course import DemoResult
from smoothcache.demo.tone_classifier import ToneClassifier
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
    columns = ("snr", "log_spectral_distance", "stft_distance", "label_divergence")
    assert_everything_is_compared(result, *columns, "frechet_distance")
    for row in result.report.rows:
        assert set(row.accuracies) == {"timbre", "pitch", "rhythm"}
        assert row.psnr is None and row.ssim is None
    assert result.comparison.row(REFERENCE).label_divergence == 0
    assert result.comparison.images[REFERENCE].shape == (20, 1, 16_384)


def test_the_last_step_is_computed_under_fora(result: DemoResult) -> None:
    assert all(result.schedules[f"FORA n = {n}"].table()[:, -1].all() for n in (2, 3))


def test_the_table_has_the_columns_of_sounds(result: DemoResult) -> None:
    header = result.report.header()
    assert {"SNR, dB", "timbre accuracy", "pitch accuracy", "label KL, nats"} <= set(header)
    assert "PSNR, dB" not in header and "accuracy" not in header


def test_it_says_what_it_measured_and_whether_caching_pays(result: DemoResult) -> None:
    assert "20 sounds" in result.report.title and "DPM-Solver++(3M) SDE" in result.report.title
    assert "in signal-to-noise ratio against the uncached sounds" in result.report.notes[-1]


def test_stages_are_told_and_timed(result: DemoResult, told: list[str]) -> None:
    assert_stages_are_told_and_timed(result, told)


def test_it_writes_what_it_says(result: DemoResult) -> None:
    sounds = ("bell-uncached.wav", "bell-n2-fora.wav", "drum-n3-smoothcache.wav")
    assert_everything_is_written(result, "spectrograms-n2.png", *sounds)
    for path in result.folder.glob("*.wav"):
        with wave.open(str(path)) as file:
            assert file.getframerate() == SAMPLING_RATE and file.getnframes() == 16_384


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
