"""A small classifier of the attributes of demo clips."""

from __future__ import annotations

from torch import Tensor, nn

from .classifier import stage
from .clips import ATTRIBUTES


class ClipClassifier(nn.Module):
    """A network from clips [n, frames, 3, 32, 32] in [-1, 1] to the logits of each attribute.

    Frames are encoded separately and then combined along time; clips may have any length.

    Args:
        width: Channels of the first stage; the later stages have twice as many.
        feature_dim: Length of the frame features and of the penultimate features.
    """

    def __init__(self, width: int = 16, feature_dim: int = 64) -> None:
        super().__init__()
        self.config = {"width": width, "feature_dim": feature_dim}
        self.trunk = nn.Sequential(
            stage(3, width), stage(width, 2 * width), stage(2 * width, 2 * width)
        )
        self.project = nn.Linear(2 * width * 16, feature_dim)
        self.along_time = nn.Sequential(
            nn.ReLU(),
            nn.Conv1d(feature_dim, feature_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(feature_dim, feature_dim, 3, padding=1),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(feature_dim, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Returns logits [n, values] by attribute."""
        features = self.features(clips).relu()
        return {name: head(features) for name, head in self.heads.items()}

    def features(self, clips: Tensor) -> Tensor:
        """Returns penultimate features [n, feature_dim], before the last nonlinearity."""
        frames = self.project(self.trunk(clips.flatten(0, 1)).flatten(1))
        in_time = frames.unflatten(0, clips.shape[:2]).transpose(1, 2)
        features: Tensor = self.along_time(in_time).mean(dim=2)
        return features
