"""DINOv2 features, for FD-DINOv2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..optional import optional_module
from .features import check_images
from .weights import pretrained, weights_digest

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
SIZE = 224


class DinoFeatures:
    """A DINOv2 model of transformers: a ``FeatureExtractor`` with one feature, ``class_token``.

    Args:
        model: A ``Dinov2Model``.
        name: Name in results.

    Source: Oquab et al., arXiv 2304.07193; Stein et al., arXiv 2306.04675, take ViT-L/14.
    """

    def __init__(self, model: Any, *, name: str = "DINOv2") -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.digest = weights_digest(model)

    @classmethod
    def load(
        cls,
        source: str = "facebook/dinov2-large",
        *,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
    ) -> DinoFeatures:
        """Loads a model.

        Args:
            source: A folder, or a name on the Hugging Face hub.
            device: Device of the network.
            local_files_only: Whether to use only local files.

        Returns:
            The extractor.

        Raises:
            MissingPackageError: If transformers is not installed.
            MissingWeightsError: If the weights are neither local nor downloadable.
        """
        transformers = optional_module("transformers", extra="evaluate")
        model = pretrained(
            transformers.Dinov2Model.from_pretrained,
            source,
            what="DINOv2",
            local_files_only=local_files_only,
        )
        return cls(model.to(device), name=source)

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of feature vectors, by name."""
        return {"class_token": int(self.model.config.hidden_size)}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Returns class tokens [images, size] of uint8 images [images, 3, height, width]."""
        check_images(images)
        pixels = images.to(self.model.device).float()
        pixels = interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True)
        pixels = pixels.round().clamp(0, 255) / 255
        mean, deviation = (
            torch.tensor(x, device=pixels.device)[:, None, None] for x in (MEAN, DEVIATION)
        )
        output = self.model((pixels - mean) / deviation)
        return {"class_token": output.last_hidden_state[:, 0].float()}
