"""Inception v3 as in ADM's evaluator: features for FID and sFID, and class logits."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from .weights import fill, load_weights, weights_digest, weights_file

WHAT = "Inception v3 (TensorFlow 2015)"
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SPATIAL_CHANNELS = 7


class InceptionFeatures:
    """TensorFlow's Inception graph of 2015, with the weights that torch-fidelity converted.

    ``pool`` is ``pool_3`` with 2048 values. ``spatial`` is the first 7 channels of
    ``mixed_6/conv``, 17 x 17 x 7 = 2023 values in the order of ADM's reference statistics (row,
    column, channel). ``logits`` are the logits of 1008 classes without bias, as in ADM's Inception
    Score.

    Args:
        weights: File of the weights. By default torch-fidelity's file is downloaded once.
        device: Device of the network.

    Raises:
        MissingWeightsError: If the weights are neither local nor downloadable.
        FileFormatError: If the file contains other weights.
    """

    name = WHAT

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        path = weights_file(weights, url=URL, what=WHAT, hash_prefix="6726825d")
        with torch.device("meta"):
            network = Inception()
        network.to_empty(device="cpu")
        fill(network, load_weights(path, what=WHAT), file=str(path), what=WHAT)
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.digest = weights_digest(network)

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of feature vectors, by name."""
        return {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": 1008}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Returns features of uint8 images [images, 3, height, width] of any size."""
        pixels = _resized(images.to(self.device, torch.float32), 299)
        features: dict[str, Tensor] = self.network((pixels - 128) / 128)
        return features


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU. ``kernel`` is [height, width]."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        normal: Tensor = self.bn(self.conv(x))
        return normal.relu()


# A branch: consecutive convolutions as (name, outputs, (height, width)). A name ending in "a" and
# the following name ending in "b" are applied to the same input and concatenated. Names are as in
# the weights file. The pooling branch of a block comes last.
Branch = Sequence[tuple[str, int, tuple[int, int]]]
ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)
WIDE, TALL = (1, 7), (7, 1)


def _a(pooled: int) -> list[Branch]:
    return [
        [("branch1x1", 64, ONE)],
        [("branch5x5_1", 48, ONE), ("branch5x5_2", 64, FIVE)],
        [("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, THREE), ("branch3x3dbl_3", 96, THREE)],
        [("branch_pool", pooled, ONE)],
    ]


def _c(width: int) -> list[Branch]:
    single = [("branch7x7_1", width, ONE), ("branch7x7_2", width, WIDE), ("branch7x7_3", 192, TALL)]
    double = [("branch7x7dbl_1", width, ONE)]
    double += [(f"branch7x7dbl_{2 + i}", width, (TALL, WIDE)[i % 2]) for i in range(3)]
    double += [("branch7x7dbl_5", 192, WIDE)]
    return [[("branch1x1", 192, ONE)], single, double, [("branch_pool", 192, ONE)]]


def _e() -> list[Branch]:
    flat, high = (1, 3), (3, 1)
    return [
        [("branch1x1", 320, ONE)],
        [("branch3x3_1", 384, ONE), ("branch3x3_2a", 384, flat), ("branch3x3_2b", 384, high)],
        [
            *(("branch3x3dbl_1", 448, ONE), ("branch3x3dbl_2", 384, THREE)),
            *(("branch3x3dbl_3a", 384, flat), ("branch3x3dbl_3b", 384, high)),
        ],
        [("branch_pool", 192, ONE)],
    ]


class Mixed(nn.Module):
    """Parallel branches whose outputs are concatenated along the channels.

    Args:
        inputs: Number of input channels.
        branches: The branches.
        strided: Whether the last convolution of each branch has stride 2, with the pooled input as
            the last branch.
        largest: Whether the pooling branch uses max pooling instead of average pooling.
    """

    def __init__(
        self,
        inputs: int,
        branches: Sequence[Branch],
        *,
        strided: bool = False,
        largest: bool = False,
    ) -> None:
        super().__init__()
        self.branches = [[name for name, _, _ in branch] for branch in branches]
        self.strided, self.largest = strided, largest
        for branch in branches:
            channels = inputs
            for name, outputs, kernel in branch:
                halves = strided and name == branch[-1][0]
                stride = 2 if halves else 1
                layer = Convolution(channels, outputs, kernel, stride, same=not halves)
                self.add_module(name, layer)
                if not name.endswith("a"):
                    channels = outputs

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for names in self.branches:
            value = self._pooled(x) if names == ["branch_pool"] else x
            for name in names:
                if name.endswith("a"):
                    outputs.append(self.get_submodule(name)(value))
                elif name.endswith("b"):
                    outputs.append(self.get_submodule(name)(value))
                    break
                else:
                    value = self.get_submodule(name)(value)
            else:
                outputs.append(value)
        if self.strided:
            outputs.append(max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.largest:
            return max_pool2d(x, 3, stride=1, padding=1)
        # TensorFlow's average pooling excludes padding.
        return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Inception(nn.Module):
    """The network, with submodule names of torch-fidelity's weights file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, THREE, 2, same=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, THREE, same=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, THREE)
        self.Conv2d_3b_1x1 = Convolution(64, 80, ONE)
        self.Conv2d_4a_3x3 = Convolution(80, 192, THREE, same=False)
        self.Mixed_5b = Mixed(192, _a(32))
        self.Mixed_5c = Mixed(256, _a(64))
        self.Mixed_5d = Mixed(288, _a(64))
        narrow: list[Branch] = [[("branch3x3", 384, THREE)], _a(0)[2]]
        narrow[1] = [(name, (64, 96, 96)[i], k) for i, (name, _, k) in enumerate(narrow[1])]
        self.Mixed_6a = Mixed(288, narrow, strided=True)
        self.Mixed_6b = Mixed(768, _c(128))
        self.Mixed_6c = Mixed(768, _c(160))
        self.Mixed_6d = Mixed(768, _c(160))
        self.Mixed_6e = Mixed(768, _c(192))
        last: list[Branch] = [
            [("branch3x3_1", 192, ONE), ("branch3x3_2", 320, THREE)],
            [
                *(("branch7x7x3_1", 192, ONE), ("branch7x7x3_2", 192, WIDE)),
                *(("branch7x7x3_3", 192, TALL), ("branch7x7x3_4", 192, THREE)),
            ],
        ]
        self.Mixed_7a = Mixed(768, last, strided=True)
        self.Mixed_7b = Mixed(1280, _e())
        self.Mixed_7c = Mixed(2048, _e(), largest=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns features of pixels [images, 3, 299, 299] in [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        before_6d = x
        x = self.Mixed_6e(self.Mixed_6d(before_6d))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool = x.mean(dim=(2, 3))
        # One small convolution is computed twice to avoid a hook.
        spatial = self.Mixed_6d.get_submodule("branch1x1")(before_6d)[:, :SPATIAL_CHANNELS]
        return {
            "pool": pool,
            "spatial": spatial.permute(0, 2, 3, 1).flatten(1),
            "logits": pool @ self.fc.weight.T,
        }


def _resized(x: Tensor, size: int) -> Tensor:
    """Resizes bilinearly as TensorFlow 1: pixel i is at i * input / output, no antialiasing."""
    for dim in (2, 3):
        length = x.shape[dim]
        place = torch.arange(size, device=x.device, dtype=x.dtype) * (length / size)
        before = place.floor().long().clamp(max=length - 1)
        after = (before + 1).clamp(max=length - 1)
        weight = (place - before).reshape([-1 if d == dim else 1 for d in range(4)])
        first, second = x.index_select(dim, before), x.index_select(dim, after)
        x = first + (second - first) * weight
    return x
