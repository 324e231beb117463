"""LPIPS: distance of images in a classifier's features, weighted by human judgements."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, MissingPackageError
from ..version import how_to_install
from .fidelity import _check_pair
from .result import MetricResult, mean_result
from .weights import fill, load_weights, weights_digest, weights_file

Network = Literal["alex", "vgg"]
URLS = {
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
}
# Layers in the order of torchvision's weights file: (channels, kernel, stride, padding) of a
# convolution with ReLU, or the kernel of a max pooling. Distances are taken after tapped layers.
ALEX: tuple[tuple[int, int, int, int] | int, ...] = (
    *((64, 11, 4, 2), 3, (192, 5, 1, 2), 3),
    *((384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)),
)
VGG: tuple[tuple[int, int, int, int] | int, ...] = tuple(
    2 if x == 0 else (x, 3, 1, 1)
    for x in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
)
LAYERS = {"alex": ALEX, "vgg": VGG}
TAPS = {"alex": (0, 2, 4, 5, 6), "vgg": (1, 4, 8, 12, 16)}


class Lpips(nn.Module):
    """LPIPS 0.1 with AlexNet or VGG16 features and the published channel weights.

    Args:
        network: ``"alex"``, the authors' recommendation, or ``"vgg"``.
        trunk: File of torchvision's classifier weights; downloaded once by default.
        heads: File of the channel weights; by default from torchmetrics or lpips.

    Raises:
        MissingWeightsError: If the trunk's weights are neither local nor downloadable.
        MissingPackageError: If no package with the heads is installed.
        FileFormatError: If a file holds other weights.

    Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric",
        arXiv 1801.03924.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        network: Network = "alex",
        *,
        trunk: str | os.PathLike[str] | None = None,
        heads: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if network not in LAYERS:
            raise InvalidArgumentError(f"network must be 'alex' or 'vgg', got {network!r}.")
        self.network_name = network
        what = f"LPIPS's {network} trunk"
        self.features = _trunk(network)
        path = weights_file(trunk, url=URLS[network], what=what)
        state = load_weights(path, what=what)
        kept = {k.removeprefix("features."): v for k, v in state.items() if k[:9] == "features."}
        fill(self.features, kept, file=str(path), what=what)
        channels = [_channels(network, tap) for tap in TAPS[network]]
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(x)) for x in channels)
        path = Path(heads) if heads is not None else _packaged_heads(network)
        state = load_weights(path, what="LPIPS's heads")
        found = {str(i): x.flatten() for i, x in enumerate(state.values())}
        fill(self.heads, found, file=str(path), what="LPIPS's heads")
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.eval().requires_grad_(False)
        self.digest = weights_digest(self)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Returns the distance of each pair of images.

        Args:
            images: Images in [0, 1]; [batch, 3, height, width].
            reference: References of the same shape.

        Returns:
            Distances [batch].
        """
        total = torch.zeros(len(images), device=images.device)
        taps = zip(self._taps(images), self._taps(reference), self.heads, strict=True)
        for ours, theirs, head in taps:
            apart = (_unit(ours) - _unit(theirs)).square()
            total = total + (apart * head[:, None, None]).sum(dim=1).mean(dim=(1, 2))
        return total

    def _taps(self, images: Tensor) -> list[Tensor]:
        x = (2 * images - 1 - self.shift) / self.scale
        taps = []
        number = -1
        for layer in self.features:
            x = layer(x)
            number += not isinstance(layer, nn.Conv2d)  # a convolution counts with its ReLU
            if number in TAPS[self.network_name] and isinstance(layer, nn.ReLU):
                taps.append(x)
        return taps


def lpips(images: Tensor, reference: Tensor, network: Lpips) -> MetricResult:
    """Computes the mean LPIPS of images and their references.

    Args:
        images: Images in [0, 1]; [batch, 3, height, width], at least 32 pixels on a side.
        reference: References of the same shape.
        network: The network.

    Returns:
        The mean distance, with its standard error over images.

    Raises:
        InvalidArgumentError: If the images have the wrong shape or values.

    Example:
        The network's weights are downloaded, so this example is not run as a test.

        >>> import torch
        >>> images = torch.rand(2, 3, 64, 64)
        >>> result = lpips(0.9 * images, images, Lpips("alex"))  # doctest: +SKIP
    """
    images, reference = _check_pair(images, reference)
    if images.shape[1] != 3 or min(images.shape[2:]) < 32:
        raise InvalidArgumentError(
            "lpips takes colour images [batch, 3, height, width] of at least 32 pixels on a side, "
            f"got {list(images.shape)}."
        )
    values = torch.cat(
        [
            network(ours, theirs)
            for ours, theirs in zip(
                torch.split(images, 16), torch.split(reference, 16), strict=True
            )
        ]
    )
    protocol = f"LPIPS 0.1, {network.network_name}, images at their own size"
    return mean_result("lpips", values, unit="", protocol=protocol, weights=network.digest)


def _trunk(network: Network) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for layer in LAYERS[network]:
        if isinstance(layer, int):
            layers.append(nn.MaxPool2d(layer, stride=2))
        else:
            outputs, kernel, stride, padding = layer
            layers += [nn.Conv2d(channels, outputs, kernel, stride, padding), nn.ReLU()]
            channels = outputs
    return nn.Sequential(*layers)


def _channels(network: Network, tap: int) -> int:
    layer = LAYERS[network][tap]
    return layer if isinstance(layer, int) else layer[0]


def _packaged_heads(network: Network) -> Path:
    """Returns the channel weights of an installed package, without importing the package."""
    for package, inside in (
        ("torchmetrics", f"functional/image/lpips_models/{network}.pth"),
        ("lpips", f"weights/v0.1/{network}.pth"),
    ):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / inside
            if path.is_file():
                return path
    raise MissingPackageError(
        f"This needs torchmetrics, which is not installed: {how_to_install('metrics')}"
    )


def _unit(maps: Tensor) -> Tensor:
    return maps / (maps.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
