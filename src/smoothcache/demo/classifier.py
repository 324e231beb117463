"""A small classifier of the demo images, and storage of the demo's classifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"

Classifier = TypeVar("Classifier", bound=nn.Module)


class ShapeClassifier(nn.Module):
    """A convolutional network from images [n, 3, 32, 32] in [-1, 1] to class logits.

    Args:
        num_classes: Number of logits.
        width: Channels of the first stage; each later stage doubles them.
        feature_dim: Length of the penultimate features.
    """

    def __init__(self, num_classes: int = 10, width: int = 24, feature_dim: int = 64) -> None:
        super().__init__()
        self.config = {"num_classes": num_classes, "width": width, "feature_dim": feature_dim}
        self.trunk = nn.Sequential(
            stage(3, width), stage(width, 2 * width), stage(2 * width, 4 * width)
        )
        self.project = nn.Linear(4 * width * 16, feature_dim)
        self.head = nn.Linear(feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns class logits [n, num_classes]."""
        logits: Tensor = self.head(self.features(images).relu())
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Returns penultimate features [n, feature_dim], before the last nonlinearity."""
        features: Tensor = self.project(self.trunk(images).flatten(1))
        return features

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Returns feature maps after each stage, [n, channels, height, width]."""
        found = []
        for stage in self.trunk:
            images = stage(images)
            found.append(images)
        return found


def save_classifier(classifier: nn.Module, folder: str | Path) -> None:
    """Writes the weights in half precision and the classifier's ``config`` to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.cpu().half() for name, value in classifier.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(classifier.config, indent=2) + "\n")


def load_classifier(folder: str | Path) -> ShapeClassifier:
    """Loads an image classifier written by `save_classifier`, in float32 and evaluation mode."""
    return load_as(ShapeClassifier, folder)


def load_as(kind: type[Classifier], folder: str | Path) -> Classifier:
    """Loads a classifier written by `save_classifier`, in float32 and evaluation mode."""
    folder = Path(folder)
    classifier = kind(**json.loads((folder / CONFIG).read_text()))
    classifier.load_state_dict(load_file(folder / WEIGHTS))
    return classifier.eval()


def stage(inputs: int, outputs: int) -> nn.Sequential:
    """Returns a convolution stage that halves the resolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
