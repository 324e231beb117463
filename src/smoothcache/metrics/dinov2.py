"""Features of DINOv2, for FD-DINOv2."""

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
        name: What to call it in results.

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
        """Load a model.

        Args:
            source: A folder, or a name on the Hugging Face hub.
            device: Where it runs.
            local_files_only: Never ask the network.

        Returns:
            The extractor.

        Raises:
            MissingPackageError: If transformers is not installed.
            MissingWeightsError: If the weights are neither there nor to be downloaded.
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
        """Name of the feature -> length of its vector."""
        return {"class_token": int(self.model.config.hidden_size)}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Class tokens [images, size] of uint8 images [images, 3, height, width]."""
        check_images(images)
        pixels = images.to(self.model.device).float()
        pixels = interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True)
        pixels = pixels.round().clamp(0, 255) / 255
        mean, deviation = (
            torch.tensor(x, device=pixels.device)[:, None, None] for x in (MEAN, DEVIATION)
        )
        output = self.model((pixels - mean) / deviation)
        return {"class_token": output.last_hidden_state[:, 0].float()}
