"""A small classifier of the attributes of demo sounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..metrics.audio import log_mel
from .classifier import stage
from .tones import NUM_CLASSES, SAMPLING_RATE

FLOOR = -60.0  # dB of full scale; softer levels are clamped


class ToneClassifier(nn.Module):
    """A convolutional network from waveforms [n, 1, samples] to logits of every attribute.

    Args:
        num_classes: Number of logits of each attribute.
        width: Channels of the first stage; each later stage doubles them.
        feature_dim: Length of the penultimate features.
    """

    def __init__(
        self, num_classes: Sequence[int] = NUM_CLASSES, width: int = 16, feature_dim: int = 64
    ) -> None:
        super().__init__()
        self.num_classes = tuple(num_classes)
        self.config = {
            "num_classes": list(num_classes),
            "width": width,
            "feature_dim": feature_dim,
        }
        self.trunk = nn.Sequential(
            stage(1, width), stage(width, 2 * width), stage(2 * width, 4 * width)
        )
        # Keeps the position in frequency for all attributes, and in time for the rhythm.
        self.pool = nn.AdaptiveAvgPool2d((8, 8))
        self.project = nn.Linear(4 * width * 64, feature_dim)
        self.head = nn.Linear(feature_dim, sum(num_classes))

    def forward(self, waveforms: Tensor) -> tuple[Tensor, ...]:
        """Returns logits [n, num_classes] of each attribute."""
        logits: Tensor = self.head(self.features(waveforms).relu())
        return torch.split(logits, list(self.num_classes), dim=1)

    def features(self, waveforms: Tensor) -> Tensor:
        """Returns penultimate features [n, feature_dim], before the last nonlinearity."""
        pictures = log_mel(waveforms, SAMPLING_RATE)[:, None].clamp(min=FLOOR) / 25 + 1
        features: Tensor = self.project(self.pool(self.trunk(pictures)).flatten(1))
        return features
