"""The metrics by name: which network each needs, what of it, and against what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..checks import listed
from ..errors import InvalidArgumentError
from .source import Kind

Collects = Literal["statistics", "scores", "rows", "values", "nothing"]
Against = Literal["statistics", "rows", "pairs", "prompts", "nothing"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: What the user calls it.
        kind: Of samples.
        network: Name of the network; empty if there is none.
        feature: Which of the network's features.
        collects: What is kept of the samples.
        against: What they are measured against.
        what: In words.
    """

    name: str
    kind: Kind
    network: str
    feature: str
    collects: Collects
    against: Against
    what: str

    @property
    def is_of_samples(self) -> bool:
        """Whether it compares images with those of the uncached run, and not with real data."""
        return self.against == "pairs" and self.kind == "image"

    @property
    def key(self) -> str:
        """Of what it collects; metrics that collect the same share it."""
        if self.collects == "values":
            return self.name
        return f"{self.network}.{self.feature}.{self.collects}"


def _image(
    name: str, network: str, feature: str, collects: Collects, against: Against, what: str
) -> Metric:
    return Metric(name, "image", network, feature, collects, against, what)


def _sound(
    name: str, network: str, feature: str, collects: Collects, against: Against, what: str
) -> Metric:
    return Metric(name, "sound", network, feature, collects, against, what)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _image("fid", "inception", "pool", "statistics", "statistics", "FID, ADM's protocol"),
        _image("sfid", "inception", "spatial", "statistics", "statistics", "sFID, likewise"),
        _image("is", "inception", "logits", "scores", "nothing", "Inception Score, likewise"),
        _image("precision", "inception", "pool", "rows", "rows", "precision, k = 3"),
        _image("recall", "inception", "pool", "rows", "rows", "recall, k = 3"),
        _image("kid", "inception", "pool", "rows", "rows", "KID: unbiased, for few samples"),
        _image("fd_dinov2", "dinov2", "class_token", "statistics", "statistics", "FD-DINOv2"),
        _image(
            "fd_efficientnet",
            "efficientnet",
            "pool",
            "statistics",
            "statistics",
            "Frechet distance by a packaged network, offline; no FID",
        ),
        _image("cmmd", "clip336", "embedding", "rows", "rows", "CMMD"),
        _image("clip_score", "clip", "", "values", "prompts", "CLIP score"),
        _image("pick_score", "pickscore", "", "values", "prompts", "PickScore"),
        _image("psnr", "", "", "values", "pairs", "PSNR to the samples of the same numbers, dB"),
        _image("ssim", "", "", "values", "pairs", "SSIM, likewise"),
        _image("lpips", "lpips", "", "values", "pairs", "LPIPS, likewise"),
        _image(
            "perceptual",
            "efficientnet",
            "",
            "values",
            "pairs",
            "perceptual distance, likewise, offline",
        ),
        _sound("fd_openl3_music", "openl3_music", "", "statistics", "statistics", "FD-OpenL3"),
        _sound("fd_openl3_env", "openl3_env", "", "statistics", "statistics", "FD-OpenL3"),
        _sound("kl_passt", "passt", "", "values", "pairs", "KL-PaSST, to the sounds of same names"),
        _sound("clap_score", "clap", "", "values", "prompts", "CLAP score"),
        Metric("vbench", "clip", "", "", "nothing", "nothing", "VBench's total score, per cent"),
    )
}
"""Name -> metric."""


def metrics_named(names: list[str], kind: Kind) -> list[Metric]:
    """The metrics of these names.

    Raises:
        InvalidArgumentError: If there is none of a name, or it is of other samples.
    """
    if not names:
        raise InvalidArgumentError(f"name at least one metric; there are {listed(METRICS, 30)}.")
    chosen = []
    for name in dict.fromkeys(names):
        if name not in METRICS:
            raise InvalidArgumentError(
                f"there is no metric {name!r}; there are {listed(METRICS, 30)}."
            )
        metric = METRICS[name]
        if metric.kind != kind:
            fitting = [x.name for x in METRICS.values() if x.kind == kind]
            raise InvalidArgumentError(
                f"{name} is measured on {metric.kind}s, and these are {kind}s; of them "
                f"{listed(fitting, 20)} can be measured."
            )
        chosen.append(metric)
    return chosen
