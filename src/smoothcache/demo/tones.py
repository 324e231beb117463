"""The data set of the audio demo: short sounds of one repeated note, with captions.

Each sound has a timbre, a pitch and a rhythm, such as "a bell playing a high note twice". Sounds
are sums of decaying partials, and the data is determined by a seed. Times are in seconds and
frequencies in hertz unless stated otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLING_RATE = 16_000
NUM_SAMPLES = 16_384
SECONDS = NUM_SAMPLES / SAMPLING_RATE
BEAT = 256 / SAMPLING_RATE  # notes begin at multiples of it
CHUNK = 64
MOST_NOTES = 3


@dataclass(frozen=True)
class Timbre:
    """Parameters of the notes of one instrument.

    Attributes:
        ratios: Frequency of each partial relative to the note.
        levels: Amplitude of each partial.
        decay: Decay rate of the first partial, per second.
        damping: Additional decay rate per unit of ratio above 1, per second.
        attack: Attack time in seconds.
        noise: Amplitude of the noise at the beginning of a note.
        glide: Relative excess of the initial frequency.
    """

    ratios: tuple[float, ...]
    levels: tuple[float, ...]
    decay: float = 0.0
    damping: float = 0.0
    attack: float = 0.004
    noise: float = 0.0
    glide: float = 0.0


TIMBRES = {
    "flute": Timbre((1, 2), (1.0, 0.12), decay=0.5, attack=0.05),
    "organ": Timbre((1, 3, 5), (0.8, 0.45, 0.3), decay=0.5, attack=0.012),
    "string": Timbre((1, 2, 3, 4), (0.9, 0.6, 0.35, 0.2), decay=5.0, damping=2.5),
    "bell": Timbre((1, 2.76, 4.07), (0.8, 0.5, 0.3), decay=3.5, damping=0.5, attack=0.002),
    "drum": Timbre((1,), (1.0,), decay=24.0, noise=0.5, glide=0.6),
}
PITCHES = {"low": 165.0, "middle": 330.0, "high": 660.0, "very high": 1320.0}
RHYTHMS = {"once": 1, "twice": 2, "three times": 3}
ATTRIBUTES = {"timbre": tuple(TIMBRES), "pitch": tuple(PITCHES), "rhythm": tuple(RHYTHMS)}
NUM_CLASSES = tuple(map(len, ATTRIBUTES.values()))


def generate(num_sounds: int | Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Generates sounds and their attributes.

    Args:
        num_sounds: Number of sounds with random attributes, or the attributes as an integer tensor
            of shape [n, 3]: timbre, pitch and rhythm.
        seed: Seed of everything else.

    Returns:
        Waveforms of shape [n, 1, 16384] in [-1, 1], and attributes of shape [n, 3].

    Example:
        >>> waveforms, attributes = generate(4, seed=0)
        >>> waveforms.shape, attributes.shape
        (torch.Size([4, 1, 16384]), torch.Size([4, 3]))
    """
    rng = torch.Generator().manual_seed(seed)
    if isinstance(num_sounds, Tensor):
        attributes = num_sounds.long()
    else:
        columns = [torch.randint(n, (num_sounds,), generator=rng) for n in NUM_CLASSES]
        attributes = torch.stack(columns, dim=1)
    sounds = [_play(chunk, rng) for chunk in torch.split(attributes, CHUNK)]
    return torch.cat(sounds)[:, None], attributes


def caption(attributes: Sequence[int] | Tensor) -> str:
    """Returns the caption of a sound with these attributes [3].

    >>> caption([3, 2, 1])
    'a bell playing a high note twice'
    """
    timbre, pitch, rhythm = (
        names[int(i)] for names, i in zip(ATTRIBUTES.values(), attributes, strict=True)
    )
    article = "an" if timbre[0] in "aeiou" else "a"
    return f"{article} {timbre} playing a {pitch} note {rhythm}"


def all_attributes() -> Tensor:
    """Returns all combinations of attributes, [60, 3], with the rhythm changing fastest."""
    return torch.cartesian_prod(*(torch.arange(n) for n in NUM_CLASSES))


def _play(attributes: Tensor, rng: torch.Generator) -> Tensor:
    """Returns waveforms [n, samples] of one chunk."""
    sounds = torch.empty(len(attributes), NUM_SAMPLES)
    for timbre, instrument in enumerate(TIMBRES.values()):
        chosen = attributes[:, 0] == timbre
        if chosen.any():
            sounds[chosen] = _play_instrument(instrument, attributes[chosen, 1:], rng)
    return sounds


def _play_instrument(timbre: Timbre, notes: Tensor, rng: torch.Generator) -> Tensor:
    """Returns waveforms [n, samples] of one instrument, for pitches and rhythms [n, 2]."""
    n = len(notes)
    frequency = torch.tensor(list(PITCHES.values()))[notes[:, 0]]
    local, length = _local_times(1 + notes[:, 1], rng)
    attack = timbre.attack * _uniform((n, 1, 1), 0.8, 1.25, rng)
    envelope = (local / attack).clamp(0, 1) * ((length - local) / 0.02).clamp(0, 1)
    decay = _uniform((n, 1, 1), 0.8, 1.25, rng)
    phase = 2 * math.pi * frequency[:, None, None] * _glided(local, timbre.glide)
    sound = torch.zeros_like(local)
    for ratio, level in zip(timbre.ratios, timbre.levels, strict=True):
        rate = decay * (timbre.decay + timbre.damping * (ratio - 1))
        levels = level * _uniform((n, 1, 1), 0.8, 1.2, rng)
        sound += levels * torch.exp(-rate * local.clamp(min=0)) * (ratio * phase).sin()
    if timbre.noise:
        hiss = torch.randn(local.shape, generator=rng)
        sound += timbre.noise * hiss * torch.exp(-local.clamp(min=0) / 0.012)
    loudness = _uniform((n, 1), 0.35, 0.5, rng)
    return (loudness * (envelope * sound).sum(dim=1)).clamp(-1, 1)


def _local_times(counts: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns the time since each note's start [n, notes, samples], and note lengths [n, 1, 1].

    Notes that are not part of a rhythm have a negative time throughout.
    """
    n = len(counts)
    spacing = (SECONDS - 0.06) / counts
    number = torch.arange(MOST_NOTES)
    late = torch.randint(4, (n, MOST_NOTES), generator=rng)
    start = BEAT * (((0.02 + number * spacing[:, None]) / BEAT).ceil() + late)
    start = torch.where(number < counts[:, None], start, 2 * SECONDS)
    time = torch.arange(NUM_SAMPLES) / SAMPLING_RATE
    return time - start[..., None], (0.85 * spacing)[:, None, None]


def _glided(time: Tensor, glide: float) -> Tensor:
    """Warps time so that the frequency starts at `1 + glide` times its value and soon settles."""
    settling = 0.02
    passed = time.clamp(min=0)
    return passed + glide * settling * (1 - torch.exp(-passed / settling))


def _uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)
