"""Features and values of the samples of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..metrics.features import describe
from ..metrics.fidelity import psnr, ssim
from ..metrics.inception_score import InceptionScore
from ..metrics.openl3 import SIZE
from ..metrics.perceptual import perceptual_distance
from ..metrics.statistics import Statistics
from .collected import Collector, Rows
from .networks import Networks
from .registry import Metric
from .source import Chunk, Source

HIGHEST_DECIBELS = 150.0  # stands for an image that equals its reference


@dataclass(frozen=True)
class Protocol:
    """What metrics depend on beside their samples.

    Attributes:
        num_groups: For the spread of Frechet distances.
        split_size: Of the Inception Score.
        subset_size: Of KID.
    """

    num_groups: int = 10
    split_size: int = 5000
    subset_size: int = 1000


def collector(metric: Metric, networks: Networks, protocol: Protocol) -> Collector | None:
    """An empty collector of a metric; None if it collects nothing."""
    if metric.collects == "nothing":
        return None
    if metric.collects in ("rows", "values"):
        return Rows()
    network = networks[metric.network]
    if metric.collects == "scores":
        return InceptionScore(network.sizes[metric.feature], split_size=protocol.split_size)
    if metric.kind == "sound":
        size, extractor = 2 * SIZE, describe_sound(network)
    else:
        size, extractor = network.sizes[metric.feature], describe(network)
    return Statistics(size, num_groups=protocol.num_groups, extractor=extractor)


def describe_sound(network: Any) -> str:
    """Name and weights of a network of sounds."""
    return f"OpenL3 {network.content} ({network.digest})"


def measure_chunk(
    chunk: Chunk,
    metrics: Sequence[Metric],
    collectors: dict[str, Collector],
    networks: Networks,
    source: Source,
    reference: Source | None,
) -> None:
    """Takes a chunk into the collectors. Each network sees it once."""
    features: dict[str, dict[str, Tensor]] = {}
    seen: set[str] = set()
    for metric in metrics:
        if metric.key not in collectors or metric.key in seen:
            continue
        seen.add(metric.key)
        collected = collectors[metric.key]
        if metric.collects == "values":
            values = VALUES[metric.name](chunk, networks, source, reference)
            collected.update(values, chunk.numbers)
        elif metric.kind == "sound":
            rows = networks[metric.network](chunk.samples[0], source.sampling_rate)
            collected.update(rows, chunk.numbers.expand(len(rows)))
        else:
            if metric.network not in features:
                features[metric.network] = networks[metric.network](chunk.samples)
            made = features[metric.network][metric.feature].detach().float().cpu()
            collected.update(made, chunk.numbers)


Values = Callable[[Chunk, Networks, Source, Source | None], Tensor]


def _pair(chunk: Chunk, reference: Source | None) -> tuple[Tensor, Tensor]:
    if reference is None:
        raise InvalidArgumentError("a metric of pairs needs a reference.")
    other = reference.like(chunk)
    if other.shape != chunk.samples.shape:
        raise InvalidArgumentError(
            f"the images in '{reference.path}' are {list(other.shape[2:])} pixels, the samples "
            f"{list(chunk.samples.shape[2:])}."
        )
    return chunk.samples.float() / 255, other.float() / 255


def _psnr(chunk: Chunk, networks: Networks, source: Source, reference: Source | None) -> Tensor:
    return psnr(*_pair(chunk, reference)).clamp(max=HIGHEST_DECIBELS)


def _ssim(chunk: Chunk, networks: Networks, source: Source, reference: Source | None) -> Tensor:
    return ssim(*_pair(chunk, reference))


def _lpips(chunk: Chunk, networks: Networks, source: Source, reference: Source | None) -> Tensor:
    network = networks["lpips"]
    values: Tensor = network(*(x.to(network.shift.device) for x in _pair(chunk, reference)))
    return values


def _perceptual(
    chunk: Chunk, networks: Networks, source: Source, reference: Source | None
) -> Tensor:
    return perceptual_distance(*_pair(chunk, reference), networks["efficientnet"])


def _clip(chunk: Chunk, networks: Networks, source: Source, reference: Source | None) -> Tensor:
    cosines = _cosines(chunk, networks["clip"], source)
    return 100 * cosines.clamp(min=0)


def _pick(chunk: Chunk, networks: Networks, source: Source, reference: Source | None) -> Tensor:
    encoder = networks["pickscore"]
    scale = float(encoder.model.logit_scale.exp())
    scaled: Tensor = scale * _cosines(chunk, encoder, source)
    return scaled


def _cosines(chunk: Chunk, encoder: Any, source: Source) -> Tensor:
    products = encoder.images(chunk.samples) * encoder.texts(source.prompts(chunk.numbers))
    cosines: Tensor = products.sum(dim=1).cpu()
    return cosines


def _clap(chunk: Chunk, networks: Networks, source: Source, reference: Source | None) -> Tensor:
    encoder = networks["clap"]
    sound = encoder.sound(chunk.samples[0], source.sampling_rate)
    (text,) = encoder.texts(source.prompts(chunk.numbers))
    cosine: Tensor = (sound @ text).cpu()
    return cosine[None]


def _passt(chunk: Chunk, networks: Networks, source: Source, reference: Source | None) -> Tensor:
    if reference is None:
        raise InvalidArgumentError("kl_passt needs a folder of reference sounds.")
    labels = networks["passt"]
    ours = labels(chunk.samples[0], source.sampling_rate).double().log_softmax(dim=0)
    theirs = labels(reference.like(chunk)[0], reference.sampling_rate).double().softmax(dim=0)
    divergence: Tensor = (ours.exp() * (ours - (theirs + 1e-6).log())).sum()
    return divergence[None]


VALUES: dict[str, Values] = {
    "psnr": _psnr,
    "ssim": _ssim,
    "lpips": _lpips,
    "perceptual": _perceptual,
    "clip_score": _clip,
    "pick_score": _pick,
    "clap_score": _clap,
    "kl_passt": _passt,
}


def take_all(
    source: Source,
    metrics: Sequence[Metric],
    networks: Networks,
    reference: Source | None,
    share: tuple[int, int],
    protocol: Protocol,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, Collector]:
    """What one rank collects of its share of the samples: rank and size."""
    collectors: dict[str, Collector] = {}
    for metric in metrics:
        made = collector(metric, networks, protocol)
        if made is not None:
            collectors[metric.key] = made
    if collectors:
        with torch.no_grad():
            for chunk in source.chunks(*share):
                measure_chunk(chunk, metrics, collectors, networks, source, reference)
                advance(len(chunk.numbers))
    return collectors
