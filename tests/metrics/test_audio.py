"""Metrics of sounds against their formulas, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smoothcache.errors import InvalidArgumentError
from smoothcache.metrics.audio import (
    label_divergence,
    log_mel,
    log_spectral_distance,
    multi_resolution_stft_distance,
    signal_to_noise_ratio,
)

RATE = 16_000
Fidelity = Callable[[Tensor, Tensor], Tensor]
FIDELITIES: tuple[Fidelity, ...] = (
    signal_to_noise_ratio,
    log_spectral_distance,
    multi_resolution_stft_distance,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(shape or (3, 2, 4096), generator=generator)


def tone(frequency: float, amplitude: float = 1.0, samples: int = 8192) -> Tensor:
    time = torch.arange(samples) / RATE
    return amplitude * (2 * math.pi * frequency * time).sin()[None, None]


def test_signal_to_noise_ratio_is_the_formula_sound_by_sound() -> None:
    a, b = noise(seed=1), noise(seed=2)
    power = b.double().square().sum(dim=(1, 2)) / (a - b).double().square().sum(dim=(1, 2))
    expected = 10 * power.log10()
    torch.testing.assert_close(signal_to_noise_ratio(a, b).double(), expected, rtol=1e-5, atol=1e-4)
    assert signal_to_noise_ratio(b, b).isposinf().all()
    assert signal_to_noise_ratio(a, 0 * a).isneginf().all()


def test_log_spectral_distance_is_the_change_of_level() -> None:
    a = noise()
    for gain in (0.1, 2.0):
        distance = log_spectral_distance(gain * a, a)
        expected = torch.full((3,), abs(20 * math.log10(gain)))
        torch.testing.assert_close(distance, expected, rtol=0, atol=0.02)
    assert (log_spectral_distance(a, a) == 0).all()


def test_spectra_forgive_a_shift_in_time_that_the_waveform_does_not() -> None:
    a = noise(1, 1, 32_000, seed=1)
    shifted = a.roll(1, dims=-1)
    other = noise(1, 1, 32_000, seed=2)
    assert signal_to_noise_ratio(shifted, a) < 0
    for distance in (log_spectral_distance, multi_resolution_stft_distance):
        assert distance(shifted, a) < 0.4 * distance(other, a)


def test_stft_distance_is_the_formula() -> None:
    a, b = noise(1, 1, 4096, seed=1), noise(1, 1, 4096, seed=2)
    terms = []
    for window in (1024, 512, 256):
        shape = torch.hann_window(window)
        ours, theirs = (
            torch.stft(x[0], window, window // 4, window=shape, return_complex=True).abs()
            for x in (a, b)
        )
        terms.append((ours - theirs).norm() / theirs.norm() + (ours / theirs).log().abs().mean())
    expected = torch.stack(terms).mean()[None]
    torch.testing.assert_close(multi_resolution_stft_distance(a, b), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("metric", FIDELITIES)
def test_metrics_keep_the_batch_and_compare_half_precision_in_single(metric: Fidelity) -> None:
    a, b = noise(seed=1).half(), noise(seed=2).half()
    assert metric(a, b).shape == (3,)
    torch.testing.assert_close(metric(a, b), metric(a.float(), b.float()))


def test_silence_is_no_infinite_distance() -> None:
    silence = torch.zeros(1, 1, 2048)
    for distance in (log_spectral_distance, multi_resolution_stft_distance):
        assert distance(silence, silence) == 0
        assert distance(noise(1, 1, 2048), silence).isfinite()
    assert (log_mel(silence, RATE) == -100).all()


def test_a_full_tone_is_at_0_db_in_the_band_of_its_pitch() -> None:
    edges = torch.linspace(0, 2595 * math.log10(1 + RATE / 2 / 700), 66)
    centres = 700 * (10 ** (edges[1:-1] / 2595) - 1)
    for frequency in (440.0, 1000.0, 3000.0):
        levels, softer = (log_mel(tone(frequency, x), RATE)[0, :, 20] for x in (1.0, 0.1))
        loudest = int(levels.argmax())
        assert abs(float(centres[loudest]) - frequency) < 0.1 * frequency
        assert float(levels[loudest]) == pytest.approx(0, abs=2.5)
        assert float(softer[loudest]) == pytest.approx(float(levels[loudest]) - 20, abs=0.1)


def test_label_divergence_is_kullback_leibler() -> None:
    samples, reference = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert label_divergence(samples, reference) == pytest.approx(expected)
    assert label_divergence(reference, reference) == 0


@pytest.mark.parametrize("metric", FIDELITIES)
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (noise(2, 4096), noise(2, 4096), r"must be \[batch, channels, samples\], got \[2, 4096\]"),
        (noise(2, 1, 100), noise(2, 1, 100), "at least 1024 samples long"),
        (noise(2, 1, 4096), noise(1, 1, 4096), "each sample is compared with the one at its place"),
        (noise(2, 1, 4096) / 0, noise(2, 1, 4096), "NaN or infinity"),
        (noise(2, 1, 4096).long(), noise(2, 1, 4096), "tensor of floating point"),
    ],
)
def test_what_is_no_pair_of_sounds_is_refused(
    metric: Fidelity, a: Tensor, b: Tensor, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        metric(a, b)


@pytest.mark.parametrize(
    ("waveforms", "settings", "message"),
    [
        (noise(2, 1, 4096), {"sampling_rate": 0}, "sampling_rate must be positive"),
        (noise(2, 1, 4096), {"bands": 0}, "bands must be"),
        (noise(2, 1, 4096), {"hop": 0}, "hop must be"),
        (noise(2, 1, 500), {}, "at least 1024 samples long"),
        ("sound", {}, "got str"),
    ],
)
def test_log_mel_checks_its_arguments(
    waveforms: Tensor, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        log_mel(waveforms, **{"sampling_rate": RATE, **settings})


def test_logits_are_checked() -> None:
    with pytest.raises(InvalidArgumentError, match=r"logits must be \[samples, classes\]"):
        label_divergence(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
