"""A small classifier of the demo sounds: judges samples, gives features to compare sets by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..metrics.audio import log_mel
from .tones import NUM_CLASSES, SAMPLING_RATE

FLOOR = -60.0  # dB of full scale; what is softer is not heard beside a note
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class ToneClassifier(nn.Module):
    """A convolutional network from waveforms [n, 1, samples] to logits of every attribute.

    Args:
        num_classes: Number of logits of each attribute.
        width: Channels of the first stage; each later one has twice as many as the one before.
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
            _stage(1, width), _stage(width, 2 * width), _stage(2 * width, 4 * width)
        )
        # Where in pitch matters to every attribute, where in time to the rhythm.
        self.pool = nn.AdaptiveAvgPool2d((8, 8))
        self.project = nn.Linear(4 * width * 64, feature_dim)
        self.head = nn.Linear(feature_dim, sum(num_classes))

    def forward(self, waveforms: Tensor) -> tuple[Tensor, ...]:
        """Logits of each attribute, [n, num_classes]."""
        logits: Tensor = self.head(self.features(waveforms).relu())
        return torch.split(logits, list(self.num_classes), dim=1)

    def features(self, waveforms: Tensor) -> Tensor:
        """Penultimate features [n, feature_dim], before the last nonlinearity."""
        pictures = log_mel(waveforms, SAMPLING_RATE)[:, None].clamp(min=FLOOR) / 25 + 1
        features: Tensor = self.project(self.pool(self.trunk(pictures)).flatten(1))
        return features


def save_classifier(classifier: ToneClassifier, folder: str | Path) -> None:
    """Write the weights in half precision and the configuration to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.cpu().half() for name, value in classifier.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(classifier.config, indent=2) + "\n")


def load_classifier(folder: str | Path) -> ToneClassifier:
    """The classifier that `save_classifier` wrote to `folder`, in float32 and evaluation mode."""
    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text())
    classifier = ToneClassifier(**config)
    classifier.load_state_dict(load_file(folder / WEIGHTS))
    return classifier.eval()


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution that halves the resolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
