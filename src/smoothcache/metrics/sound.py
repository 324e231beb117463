"""Preparation of waveforms for the networks of the audio metrics."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from ..checks import check_count
from ..errors import InvalidArgumentError
from ..optional import optional_module

PEAK = 10 ** (-1 / 20)  # -1 dB of full scale, as stable-audio-metrics scales all sounds


def mono(waveform: Tensor, sampling_rate: int, *, rate: int) -> Tensor:
    """Returns a sound as mono [samples] at another sampling rate, with its peak at -1 dB.

    Raises:
        InvalidArgumentError: If the sound is invalid; see ``checked``.
        MissingPackageError: If it must be resampled and scipy is not installed.
    """
    sound = checked(waveform).mean(dim=0, keepdim=True)
    return at_peak(resampled(sound, sampling_rate, rate))[0]


def checked(waveform: Tensor) -> Tensor:
    """Returns a validated sound as [channels, samples] in float32, with one or two channels.

    Args:
        waveform: Waveform [channels, samples] or [samples], roughly in [-1, 1].

    Raises:
        InvalidArgumentError: If it has the wrong shape or type, is empty or not finite.
    """
    if waveform.ndim == 1:
        waveform = waveform[None]
    if waveform.ndim != 2 or not waveform.numel() or not waveform.is_floating_point():
        raise InvalidArgumentError(
            "a sound must be [channels, samples] of floating point, got "
            f"{waveform.dtype} of shape {list(waveform.shape)}."
        )
    if len(waveform) > 2:
        raise InvalidArgumentError(
            f"a sound has one channel or two, got {len(waveform)}: are the dimensions swapped?"
        )
    if not waveform.isfinite().all():
        raise InvalidArgumentError("a sound contains NaN or infinity.")
    return waveform.detach().cpu().float()


def resampled(sound: Tensor, sampling_rate: int, rate: int) -> Tensor:
    """Returns a sound [channels, samples] at another sampling rate."""
    sampling_rate = check_count("sampling_rate", sampling_rate, least=1)
    if sampling_rate == rate:
        return sound
    signal = optional_module("scipy.signal", extra="evaluate")
    common = gcd(sampling_rate, rate)
    up, down = rate // common, sampling_rate // common
    return torch.from_numpy(signal.resample_poly(sound.double().numpy(), up, down, axis=1)).float()


def at_peak(sound: Tensor) -> Tensor:
    """Returns a sound with its peak at -1 dB; silence is unchanged."""
    peak = sound.abs().max()
    return sound * (PEAK / peak) if peak > 0 else sound


def check_as_many(what: str, sounds: Sequence[Tensor], others: Sequence[object]) -> None:
    """Refuses lists of different lengths and empty lists.

    Raises:
        InvalidArgumentError: If lengths differ or are 0.
    """
    if len(sounds) != len(others) or not sounds:
        raise InvalidArgumentError(
            f"there are {len(sounds)} sounds and {len(others)} {what}; each sound needs one."
        )
