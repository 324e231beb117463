"""Audio metrics: fidelity to the uncached sounds of the same seeds, and quality of sets.

Waveforms are [batch, channels, samples] of any amplitude; full scale is 1. Sounds are compared
pairwise, and functions return one value per sound.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..errors import InvalidArgumentError
from .fidelity import _check_same

RESOLUTIONS = (1024, 512, 256)
"""Window lengths of the STFT in samples; the hop is a quarter of the window."""
FLOOR = 1e-10  # power of silence relative to full scale: -100 dB
WINDOW, HOP, BANDS = 1024, 128, 64


def signal_to_noise_ratio(waveforms: Tensor, reference: Tensor) -> Tensor:
    """Returns the power of the reference over the power of the difference, in dB; inf if equal.

    The ratio includes phases: two sounds that are perceptually identical may have 0 dB. Spectral
    distances are closer to perception.

    Args:
        waveforms: [batch, channels, samples].
        reference: Uncached samples of the same shape.

    Returns:
        One value per sound, [batch]; minus infinity where the reference is silent and the
        sound is not.

    Raises:
        InvalidArgumentError: If the waveforms have the wrong shape or are not finite.

    Example:
        >>> tone = torch.ones(1, 1, 2048)
        >>> signal_to_noise_ratio(1.1 * tone, tone).round(decimals=2)
        tensor([20.])
    """
    waveforms, reference = _check_pair(waveforms, reference)
    noise = (waveforms - reference).square().flatten(1).mean(dim=1)
    signal = reference.square().flatten(1).mean(dim=1)
    ratio = 10 * (signal.log10() - noise.log10())
    return torch.where(noise == 0, torch.full_like(noise, math.inf), ratio)


def log_spectral_distance(waveforms: Tensor, reference: Tensor) -> Tensor:
    """Returns the RMS difference of the power spectra in dB, averaged over frames; 0 if equal.

    Windows have 1024 samples with a hop of 256. Power is clamped to -100 dB of full scale.

    Args:
        waveforms: [batch, channels, samples], at least 1024 samples.
        reference: Uncached samples of the same shape.

    Returns:
        One value per sound, in dB, [batch].

    Raises:
        InvalidArgumentError: If the waveforms have the wrong shape or are not finite.

    Source: Gray and Markel, "Distance measures for speech processing", 1976.

    Example:
        >>> noise = torch.randn(1, 1, 4096)
        >>> log_spectral_distance(0.5 * noise, noise).round(decimals=1)
        tensor([6.])
    """
    waveforms, reference = _check_pair(waveforms, reference)
    ours, theirs = (_decibels(_power(x, WINDOW, WINDOW // 4)) for x in (waveforms, reference))
    frames = (ours - theirs).square().mean(dim=-2).sqrt()
    return frames.flatten(1).mean(dim=1)


def multi_resolution_stft_distance(waveforms: Tensor, reference: Tensor) -> Tensor:
    """Returns the STFT distance over windows of 1024, 512 and 256 samples; 0 if equal.

    The distance is the mean over resolutions of the spectral convergence (the norm of the
    difference of the magnitudes over the norm of the reference's) plus the mean absolute difference
    of log magnitudes. Source: Yamamoto et al., "Parallel WaveGAN", arXiv 1910.11480, equations 3
    to 6; the paper's windows are 1200, 600 and 240 samples. Magnitudes are clamped to -100 dB of
    full scale.

    Args:
        waveforms: [batch, channels, samples], at least 1024 samples.
        reference: Uncached samples of the same shape.

    Returns:
        One value per sound, dimensionless, [batch].

    Raises:
        InvalidArgumentError: If the waveforms have the wrong shape or are not finite.

    Example:
        >>> tone = torch.linspace(0, 400, 4096).sin()[None, None]
        >>> multi_resolution_stft_distance(tone, tone)
        tensor([0.])
    """
    waveforms, reference = _check_pair(waveforms, reference)
    distances = []
    for window in RESOLUTIONS:
        ours, theirs = (
            _power(x, window, window // 4).clamp(min=FLOOR).sqrt().flatten(1)
            for x in (waveforms, reference)
        )
        convergence = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
        distances.append(convergence + (ours.log() - theirs.log()).abs().mean(dim=1))
    return torch.stack(distances).mean(dim=0)


def log_mel(
    waveforms: Tensor,
    sampling_rate: int,
    *,
    bands: int = BANDS,
    window: int = WINDOW,
    hop: int = HOP,
) -> Tensor:
    """Returns log-mel spectrograms.

    Triangular bands of equal width in mel (HTK's formula), from 0 Hz to half the sampling rate.
    A sine of amplitude 1 is near 0 dB; -100 dB is the floor.

    Args:
        waveforms: [batch, channels, samples], at least one window long; the power of the channels
            is averaged.
        sampling_rate: Sampling rate in Hz.
        bands: Number of mel bands.
        window: Length of the Hann window, in samples.
        hop: Hop between frames, in samples.

    Returns:
        Power in dB, [batch, bands, frames], low bands first; the first frame is centred at the
        start. Differentiable.

    Raises:
        InvalidArgumentError: If an argument is invalid.

    Example:
        >>> log_mel(torch.zeros(2, 1, 16384), 16000).shape
        torch.Size([2, 64, 129])
    """
    check_count("bands", bands, least=1)
    check_count("window", window, least=2)
    check_count("hop", hop, least=1)
    if check_number("sampling_rate", sampling_rate) <= 0:
        raise InvalidArgumentError(f"sampling_rate must be positive, got {sampling_rate}.")
    _check_waveforms("waveforms", waveforms, least=window)
    power = _power(waveforms.float(), window, hop).mean(dim=1)
    return _decibels(_mel_bands(bands, window, float(sampling_rate)).to(power.device) @ power)


def label_divergence(logits: Tensor, reference: Tensor) -> float:
    """Returns the mean KL(reference || sample) of a classifier's class probabilities.

    Args:
        logits: Logits of the samples; [samples, classes].
        reference: Logits of the references, of the same shape.

    Returns:
        The divergence in nats; never negative, and 0 if all probabilities are equal.

    Raises:
        InvalidArgumentError: If the logits have the wrong shape or are not finite.

    Source: Koutini et al., "Efficient training of audio transformers with Patchout", arXiv
    2110.05069, is the classifier of the paper's KL(PaSST); any classifier can be used.

    Example:
        >>> label_divergence(torch.zeros(1, 2), torch.zeros(1, 2))
        0.0
    """
    logits, reference = _check_same(logits, reference)
    if logits.ndim != 2:
        raise InvalidArgumentError(f"logits must be [samples, classes], got {list(logits.shape)}.")
    ours, theirs = (x.double().log_softmax(dim=1) for x in (logits, reference))
    return max(0.0, float((theirs.exp() * (theirs - ours)).sum(dim=1).mean()))


def _power(waveforms: Tensor, window: int, hop: int) -> Tensor:
    """Returns power [batch, channels, frequencies, frames]; a sine of amplitude 1 peaks at 1."""
    shape = torch.hann_window(window, device=waveforms.device)
    flat = waveforms.flatten(0, 1)
    spectra = torch.stft(flat, window, hop, window=shape, return_complex=True) * (2 / shape.sum())
    power = spectra.real.square() + spectra.imag.square()
    return power.reshape(*waveforms.shape[:2], *power.shape[1:])


def _decibels(power: Tensor) -> Tensor:
    return 10 * power.clamp(min=FLOOR).log10()


@lru_cache
def _mel_bands(bands: int, window: int, sampling_rate: float) -> Tensor:
    """Returns the weights of frequencies in each mel band, [bands, frequencies]."""
    frequencies = torch.linspace(0, sampling_rate / 2, window // 2 + 1)
    mels = 2595 * torch.log10(1 + frequencies / 700)
    edges = torch.linspace(0, float(mels[-1]), bands + 2)
    rising = (mels - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - mels) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


def _check_pair(waveforms: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    waveforms, reference = _check_same(waveforms, reference)
    _check_waveforms("waveforms", waveforms, least=WINDOW)
    return waveforms, reference


def _check_waveforms(name: str, values: Tensor, *, least: int) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 3:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InvalidArgumentError(f"{name} must be [batch, channels, samples], got {got}.")
    if values.shape[-1] < least or not values.numel():
        raise InvalidArgumentError(
            f"{name} must be at least {least} samples long, the length of a window, got "
            f"{list(values.shape)}."
        )
