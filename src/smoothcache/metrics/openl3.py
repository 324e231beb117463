"""FD-OpenL3: Frechet distance of audio embeddings."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import InvalidArgumentError, MissingPackageError
from .frechet import frechet_from_statistics
from .result import MetricResult
from .sound import at_peak, checked, resampled
from .statistics import Gaussian, Statistics
from .weights import fill, load_weights, weights_digest, weights_file

RATE = 48000
WINDOW = RATE
HOP = RATE // 2
SIZE = 512
Content = Literal["music", "env"]


class OpenL3Embeddings:
    """OpenL3: 512 values for every window of 1 s, one window every 0.5 s; mel256 input.

    Args:
        network: Function from windows [windows, 1, 48000] to embeddings [windows, 512].
        content: Training data: ``"music"``, or ``"env"`` for environmental sounds.
        digest: Digest of the weights; computed if the network is a module.
        device: Device of the network.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        content: Content,
        digest: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = device
        if content not in ("music", "env"):
            raise InvalidArgumentError(f"content must be 'music' or 'env', got {content!r}.")
        self.network = network
        self.content = content
        self.digest = weights_digest(network) if isinstance(network, nn.Module) else digest

    @classmethod
    def load(
        cls,
        content: Content,
        weights: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> OpenL3Embeddings:
        """Loads the network of torchopenl3.

        Args:
            content: ``"music"`` for MusicCaps and Song Describer, ``"env"`` for AudioCaps.
            weights: File of the weights; by default torchopenl3's is downloaded once.
            device: Device of the network.

        Returns:
            The network, ready for sounds.

        Raises:
            MissingPackageError: If torchopenl3, or a package that it needs, is not installed.
            MissingWeightsError: If the weights are neither local nor downloadable.
            FileFormatError: If the file contains other weights.
        """
        try:
            models = importlib.import_module("torchopenl3.models")
        except ModuleNotFoundError as error:
            raise MissingPackageError(
                f"This needs {error.name}, which is not installed: pip install --no-deps "
                "torchopenl3 && pip install librosa julius resampy soundfile nnAudio six. "
                "(torchopenl3 asks for a version of resampy that suits no current numpy.)"
            ) from error
        url = (
            "https://github.com/torchopenl3/torchopenl3-models/raw/master/"
            f"torchopenl3_mel256_{content}_{SIZE}.pth.tar"
        )
        what = f"OpenL3 ({content})"
        path = weights_file(weights, url=url, what=what)
        network: nn.Module = models.PytorchOpenl3(
            content_type=content, input_repr="mel256", embedding_size=SIZE
        )
        fill(network, load_weights(Path(path), what=what), file=str(path), what=what)
        return cls(network.to(device).eval(), content=content, device=device)

    @torch.no_grad()
    def __call__(self, waveform: Tensor, sampling_rate: int, *, bandwidth: int = 44100) -> Tensor:
        """Returns embeddings [windows, 1024] of a sound: left channel, then right channel.

        A mono sound is used for both channels.
        """
        sound = resampled(at_peak(checked(waveform)), sampling_rate, bandwidth)
        sound = resampled(sound, bandwidth, RATE)  # OpenL3 listens at 48 kHz
        sides = [self._windows(channel) for channel in sound]
        embeddings = [
            torch.cat(
                [self.network(x.to(self.device)).float().cpu() for x in torch.split(side, 32)]
            )
            for side in sides
        ]
        return torch.cat([embeddings[0], embeddings[-1]], dim=1)

    @staticmethod
    def _windows(channel: Tensor) -> Tensor:
        """Returns windows [windows, 1, samples], the first centred on the beginning."""
        centred = pad(channel, (WINDOW // 2, 0))
        over = max(len(centred) - WINDOW, 0)
        whole = WINDOW + -(-over // HOP) * HOP
        return pad(centred, (0, whole - len(centred))).unfold(0, WINDOW, HOP)[:, None]


def openl3_statistics(
    sounds: Iterable[Tensor],
    sampling_rate: int,
    embeddings: OpenL3Embeddings,
    *,
    num_groups: int = 10,
) -> Statistics:
    """Computes statistics of the embeddings of all windows of all sounds.

    All windows of a sound are in one group, so the spread is over sounds.

    Args:
        sounds: [channels, samples] each; they may differ in length.
        sampling_rate: Sampling rate in Hz.
        embeddings: The network.
        num_groups: As for ``Statistics``.

    Returns:
        Statistics of 1024 features; their samples are windows.

    Raises:
        InvalidArgumentError: If a sound is not valid.
        MissingPackageError: If scipy is not installed.

    Example:
        A fake network replaces OpenL3, whose weights must be downloaded.

        >>> import torch
        >>> embeddings = OpenL3Embeddings(lambda windows: windows[:, 0, :512], content="env")
        >>> statistics = openl3_statistics([torch.rand(2, 44100)], 44100, embeddings, num_groups=1)
        >>> statistics.count
        2
    """
    extractor = f"OpenL3 {embeddings.content} ({embeddings.digest})"
    statistics = Statistics(2 * SIZE, num_groups=num_groups, extractor=extractor)
    for number, sound in enumerate(sounds):
        rows = embeddings(sound, sampling_rate)
        statistics.update(rows, torch.full((len(rows),), number))
    return statistics


def fd_openl3(
    samples: Statistics, reference: Gaussian, *, weights: str | None = None
) -> MetricResult:
    """Computes FD-OpenL3. The number of samples in the result is the number of windows.

    Args:
        samples: ``openl3_statistics`` of the samples.
        reference: ``openl3_statistics(...).gaussian()`` of real sounds, of the same content.
        weights: Digest of the network.

    Returns:
        The distance, with the standard error of the jackknife over groups of sounds.

    Raises:
        InvalidArgumentError: If they are not comparable, or there are too few samples.

    Source: Evans et al., "Stable Audio Open", arXiv 2407.14358; stable-audio-metrics.

    Example:
        Random features replace OpenL3's, whose weights must be downloaded.

        >>> import torch
        >>> samples = Statistics(2)
        >>> samples.update(torch.randn(100, 2))
        >>> mean, covariance = samples.gaussian().mean, samples.gaussian().covariance
        >>> result = fd_openl3(samples, Gaussian(mean + 2, covariance))
        >>> round(result.value, 6)  # (2 - 0)^2 for each of 2 features
        8.0
    """
    protocol = (
        "OpenL3 mel256, 512 features a channel, left and right joined, windows of 1 s every 0.5 s, "
        "peak at -1 dB, bandwidth of 44.1 kHz"
    )
    return frechet_from_statistics(
        "fd_openl3", samples, reference, protocol=protocol, weights=weights
    )
