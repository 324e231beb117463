"""The networks that metrics need: loaded when the first metric asks for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..checks import listed
from ..errors import InvalidArgumentError
from ..metrics.clap import ClapEncoder
from ..metrics.clip import ClipEncoder
from ..metrics.dinov2 import DinoFeatures
from ..metrics.inception import InceptionFeatures
from ..metrics.lpips import Lpips
from ..metrics.openl3 import OpenL3Embeddings
from ..metrics.passt import PasstLabels
from ..metrics.perceptual import EfficientNetFeatures

Loader = Callable[[str | None, str], Any]


def _source(kind: Any, default: str) -> Loader:
    return lambda weights, device: kind.load(weights or default, device=device)


LOADERS: Mapping[str, Loader] = {
    "inception": lambda weights, device: InceptionFeatures(weights, device=device),
    "efficientnet": lambda weights, device: EfficientNetFeatures(weights, device=device),
    "dinov2": _source(DinoFeatures, "facebook/dinov2-large"),
    "clip": _source(ClipEncoder, "openai/clip-vit-large-patch14"),
    "clip336": _source(ClipEncoder, "openai/clip-vit-large-patch14-336"),
    "pickscore": _source(ClipEncoder, "yuvalkirstain/PickScore_v1"),
    "clap": _source(ClapEncoder, "laion/clap-htsat-fused"),
    "openl3_music": lambda weights, device: OpenL3Embeddings.load("music", weights, device=device),
    "openl3_env": lambda weights, device: OpenL3Embeddings.load("env", weights, device=device),
    "passt": lambda weights, device: PasstLabels.load(device=device),
    "lpips": lambda weights, device: Lpips("alex", trunk=weights).to(device),
}
"""Name of a network -> what loads it, from a file or folder of weights, onto a device."""


class Networks:
    """Networks by name.

    Args:
        given: Networks that are used as they are.
        weights: Files or folders of weights, by the network's name; others are downloaded once.
        device: Where they run.

    Raises:
        InvalidArgumentError: If there is no network of a name.
    """

    def __init__(
        self, given: Mapping[str, Any], weights: Mapping[str, str], device: str = "cpu"
    ) -> None:
        for name in (*given, *weights):
            if name not in LOADERS:
                raise InvalidArgumentError(
                    f"there is no network {name!r}; there are {listed(LOADERS, 20)}."
                )
        self._loaded = dict(given)
        self._weights = weights
        self._device = device

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = LOADERS[name](self._weights.get(name), self._device)
        return self._loaded[name]
