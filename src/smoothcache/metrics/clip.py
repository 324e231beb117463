"""CLIP metrics: agreement of images with their prompts, and CMMD between sets of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import InvalidArgumentError
from ..optional import optional_module
from .features import check_images
from .kid import gaussian_mmd, mmd_spread_words
from .result import MetricResult, mean_result
from .weights import pretrained, weights_digest

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder:
    """A CLIP model of transformers.

    As a ``FeatureExtractor`` it has one feature, ``embedding``: the normalised embedding of images
    resized to a square without a crop, as used by CMMD.

    Args:
        model: A ``CLIPModel``.
        tokenizer: Its tokenizer; None if no texts are encoded.
        name: Name in results.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, name: str = "CLIP") -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.digest = weights_digest(model)

    @classmethod
    def load(
        cls,
        source: str = "openai/clip-vit-large-patch14",
        *,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
    ) -> ClipEncoder:
        """Loads a model and its tokenizer.

        Args:
            source: A folder, or a name on the Hugging Face hub. CMMD is defined with
                ``openai/clip-vit-large-patch14-336``.
            device: Device of the network.
            local_files_only: Whether to use only local files.

        Returns:
            The encoder.

        Raises:
            MissingPackageError: If transformers is not installed.
            MissingWeightsError: If the weights are neither local nor downloadable.
        """
        transformers = optional_module("transformers", extra="evaluate")
        model, tokenizer = (
            pretrained(kind.from_pretrained, source, what="CLIP", local_files_only=local_files_only)
            for kind in (transformers.CLIPModel, transformers.AutoTokenizer)
        )
        return cls(model.to(device), tokenizer, name=source)

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of feature vectors, by name."""
        return {"embedding": int(self.model.config.projection_dim)}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Returns embeddings of uint8 images [images, 3, height, width], uncropped."""
        return {"embedding": self.images(images, crop=False)}

    @torch.no_grad()
    def images(self, images: Tensor, *, crop: bool = True) -> Tensor:
        """Returns normalised embeddings of images.

        Args:
            images: uint8 images [images, 3, height, width].
            crop: Whether to centre-crop after resizing the shorter side, as CLIP's preprocessing
                does; otherwise the image is resized to a square.

        Returns:
            Embeddings [images, size] of norm 1.

        Raises:
            InvalidArgumentError: If the images have the wrong shape or values.
        """
        check_images(images)
        size = int(self.model.config.vision_config.image_size)
        pixels = images.to(self.model.device).float()
        height, width = pixels.shape[2:]
        target = (size, size)
        if crop:
            short = min(height, width)
            target = (height * size // short, width * size // short)
        pixels = interpolate(pixels, target, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        pixels = pixels[:, :, top : top + size, left : left + size] / 255
        mean, deviation = (
            torch.tensor(x, device=pixels.device)[:, None, None] for x in (MEAN, DEVIATION)
        )
        pooled = self.model.vision_model((pixels - mean) / deviation).pooler_output
        return _unit(self.model.visual_projection(pooled))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Returns normalised embeddings of texts.

        Args:
            texts: Texts such as prompts; longer ones are truncated to the model's limit.

        Returns:
            Embeddings [texts, size] of norm 1.

        Raises:
            InvalidArgumentError: If the encoder has no tokenizer.
        """
        if self.tokenizer is None:
            raise InvalidArgumentError(
                "this CLIP encoder has no tokenizer, so it cannot encode texts; pass a tokenizer."
            )
        limit = int(self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self.model.device)
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return _unit(self.model.text_projection(pooled))


def clip_score(
    images: Tensor, prompts: Sequence[str], encoder: ClipEncoder, *, batch_size: int = 64
) -> MetricResult:
    """Computes the CLIP score: 100 times the cosine similarity of image and prompt, at least 0.

    Args:
        images: uint8, [images, 3, height, width].
        prompts: One for each image.
        encoder: The model. Scores of different models are not comparable.
        batch_size: Number of images per batch.

    Returns:
        The mean score, with its standard error over images.

    Raises:
        InvalidArgumentError: If the numbers of prompts and images differ.

    Source: Hessel et al., "CLIPScore", arXiv 2104.08718, whose factor is 2.5; 100 is usual for
        generated images.

    Example:
        A fake encoder replaces CLIP, whose weights must be downloaded.

        >>> from types import SimpleNamespace
        >>> import torch
        >>> encoder = SimpleNamespace(
        ...     images=lambda images: torch.tensor([[1.0, 0.0]]),
        ...     texts=lambda texts: torch.tensor([[0.6, 0.8]]),
        ...     name="made up",
        ...     digest=None,
        ... )
        >>> images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        >>> print(clip_score(images, ["a cat"], encoder))
        clip_score 60 (n = 1)
    """
    cosines = _cosines(images, prompts, encoder, batch_size)
    return mean_result(
        "clip_score",
        100 * cosines.clamp(min=0),
        unit="",
        protocol=f"{encoder.name}, shorter side resized (bicubic), middle crop",
        weights=encoder.digest,
    )


def pick_score(
    images: Tensor, prompts: Sequence[str], encoder: ClipEncoder, *, batch_size: int = 64
) -> MetricResult:
    """Computes PickScore: a human preference model's logit for image and prompt.

    Args:
        images: uint8, [images, 3, height, width].
        prompts: One for each image.
        encoder: ``ClipEncoder.load("yuvalkirstain/PickScore_v1")``.
        batch_size: Number of images per batch.

    Returns:
        The mean score, with its standard error over images.

    Raises:
        InvalidArgumentError: If the numbers of prompts and images differ.

    Source: Kirstain et al., "Pick-a-Pic", arXiv 2305.01569.

    Example:
        A fake encoder replaces PickScore's model, whose weights must be downloaded.

        >>> from types import SimpleNamespace
        >>> import torch
        >>> encoder = SimpleNamespace(
        ...     images=lambda images: torch.tensor([[1.0, 0.0]]),
        ...     texts=lambda texts: torch.tensor([[0.6, 0.8]]),
        ...     model=SimpleNamespace(logit_scale=torch.tensor(100.0).log()),
        ...     name="made up",
        ...     digest=None,
        ... )
        >>> images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        >>> print(pick_score(images, ["a cat"], encoder))
        pick_score 60 (n = 1)
    """
    scale = encoder.model.logit_scale.exp().item()
    return mean_result(
        "pick_score",
        scale * _cosines(images, prompts, encoder, batch_size),
        unit="",
        protocol=f"{encoder.name}, shorter side resized (bicubic), middle crop",
        weights=encoder.digest,
    )


def cmmd(embeddings: Tensor, reference: Tensor, *, weights: str | None = None) -> MetricResult:
    """Computes CMMD: the maximum mean discrepancy of CLIP embeddings, times 1000.

    It does not assume Gaussian features and needs fewer samples than FID.

    Args:
        embeddings: Feature ``embedding`` of the samples by ``ClipEncoder``; [samples, size].
        reference: Embeddings of real images or uncached samples; [references, size].
        weights: Digest of the encoder.

    Returns:
        The distance, with the standard error of the jackknife over groups of samples.

    Raises:
        InvalidArgumentError: If sizes differ, or embeddings do not have norm 1.

    Source: Jayasumana et al., "Rethinking FID", arXiv 2401.09603: Gaussian kernel of width 10.

    Example:
        >>> import torch
        >>> across, up = torch.eye(2)
        >>> print(cmmd(across.repeat(20, 1), up.repeat(20, 1)))
        cmmd 19.9003 ± 0 (n = 20)
    """
    for name, values in (("embeddings", embeddings), ("reference", reference)):
        if values.ndim == 2 and not torch.allclose(
            values.double().norm(dim=1), values.new_ones(len(values)).double(), atol=1e-3
        ):
            raise InvalidArgumentError(f"{name} must have length 1, as returned by ClipEncoder.")
    value, spread = gaussian_mmd(embeddings, reference, sigma=10)
    return MetricResult(
        "cmmd",
        1000 * value,
        num_samples=len(embeddings),
        unit="",
        protocol="Gaussian kernel of width 10, biased estimate, times 1000; images squeezed square",
        spread=None if spread is None else 1000 * spread,
        spread_of=None if spread is None else mmd_spread_words(len(embeddings)),
        num_references=len(reference),
        weights=weights,
    )


def _cosines(
    images: Tensor, prompts: Sequence[str], encoder: ClipEncoder, batch_size: int
) -> Tensor:
    if len(images) != len(prompts):
        raise InvalidArgumentError(
            f"there are {len(images)} images and {len(prompts)} prompts; each image needs one."
        )
    return torch.cat(
        [
            (
                encoder.images(images[start : start + batch_size])
                * encoder.texts(prompts[start : start + batch_size])
            ).sum(dim=1)
            for start in range(0, len(images), batch_size)
        ]
    )


def _unit(embeddings: Tensor) -> Tensor:
    unit: Tensor = embeddings.float() / embeddings.float().norm(dim=1, keepdim=True)
    return unit
