"""CLAP score: how well sounds match their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..optional import optional_module
from .result import MetricResult, mean_result
from .sound import check_as_many, mono
from .weights import pretrained, weights_digest


class ClapEncoder:
    """A CLAP model of transformers.

    Args:
        model: A ``ClapModel``.
        feature_extractor: Its ``ClapFeatureExtractor``.
        tokenizer: Its tokenizer.
        name: Name in results.
    """

    def __init__(
        self, model: Any, feature_extractor: Any, tokenizer: Any, *, name: str = "CLAP"
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer
        self.name = name
        self.digest = weights_digest(model)

    @classmethod
    def load(
        cls,
        source: str = "laion/clap-htsat-fused",
        *,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
    ) -> ClapEncoder:
        """Loads a model.

        Args:
            source: A folder, or a name on the Hugging Face hub. ``laion/clap-htsat-fused`` is the
                conversion of ``630k-audioset-fusion-best``, the field's usual checkpoint.
            device: Device of the network.
            local_files_only: Whether to use only local files.

        Returns:
            The encoder.

        Raises:
            MissingPackageError: If transformers is not installed.
            MissingWeightsError: If the weights are neither local nor downloadable.
        """
        transformers = optional_module("transformers", extra="evaluate")
        kinds = (
            *(transformers.ClapModel, transformers.ClapFeatureExtractor),
            transformers.AutoTokenizer,
        )
        model, feature_extractor, tokenizer = (
            pretrained(kind.from_pretrained, source, what="CLAP", local_files_only=local_files_only)
            for kind in kinds
        )
        return cls(model.to(device), feature_extractor, tokenizer, name=source)

    @torch.no_grad()
    def sound(self, waveform: Tensor, sampling_rate: int) -> Tensor:
        """Returns the normalised embedding of a sound.

        The model uses random excerpts of sounds longer than 10 s, with a fixed seed.

        Args:
            waveform: [channels, samples] or [samples].
            sampling_rate: Sampling rate in Hz.

        Returns:
            Embedding [size] of norm 1.
        """
        rate = int(self.feature_extractor.sampling_rate)
        sound = mono(waveform, sampling_rate, rate=rate)
        whole = (sound * 32767).trunc() / 32767  # quantised as in a 16-bit file
        with _numpy_seed(0):
            inputs = self.feature_extractor(
                whole.numpy(), sampling_rate=rate, return_tensors="pt"
            ).to(self.model.device)
        output = self.model.audio_model(**inputs).pooler_output
        return _unit(self.model.audio_projection(output))[0]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Returns normalised embeddings of texts.

        Args:
            texts: Texts such as prompts; longer ones are truncated to the model's limit.

        Returns:
            Embeddings [texts, size] of norm 1.
        """
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(self.model.device)
        output = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return _unit(self.model.text_projection(output))


def clap_score(
    sounds: Sequence[Tensor], sampling_rate: int, prompts: Sequence[str], encoder: ClapEncoder
) -> MetricResult:
    """Computes the CLAP score: the cosine similarity of sound and prompt.

    Args:
        sounds: [channels, samples] each; they may differ in length.
        sampling_rate: Sampling rate in Hz.
        prompts: One for each sound.
        encoder: The model. Scores of different checkpoints are not comparable.

    Returns:
        The mean cosine, with its standard error over sounds.

    Raises:
        InvalidArgumentError: If the numbers of prompts and sounds differ, or a sound is invalid.

    Source: Wu et al., arXiv 2211.06687; prepared as in stable-audio-metrics: mono, 48 kHz, peak at
        -1 dB, 16 bits.

    Example:
        A fake encoder replaces CLAP, whose weights must be downloaded.

        >>> from types import SimpleNamespace
        >>> import torch
        >>> encoder = SimpleNamespace(
        ...     sound=lambda waveform, sampling_rate: torch.tensor([1.0, 0.0]),
        ...     texts=lambda texts: torch.tensor([[0.6, 0.8]]),
        ...     name="made up",
        ...     digest=None,
        ... )
        >>> print(clap_score([torch.zeros(1, 48000)], 48000, ["rain"], encoder))
        clap_score 0.6 (n = 1)
    """
    check_as_many("prompts", sounds, prompts)
    cosines = [
        encoder.sound(sound, sampling_rate) @ encoder.texts([prompt])[0]
        for sound, prompt in zip(sounds, prompts, strict=True)
    ]
    return mean_result(
        "clap_score",
        torch.stack(cosines),
        unit="",
        protocol=f"{encoder.name}, mono, peak at -1 dB, 16 bits",
        weights=encoder.digest,
    )


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator, which the feature extractor uses, and restores it."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def _unit(embeddings: Tensor) -> Tensor:
    unit: Tensor = embeddings.float() / embeddings.float().norm(dim=1, keepdim=True)
    return unit
