"""KL-PaSST: divergence of the labels of sounds from the labels of their references."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from urllib.error import URLError

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, MissingPackageError
from ..optional import optional_module
from .result import MetricResult, mean_result
from .sound import check_as_many, mono
from .weights import MissingWeightsError, weights_digest

RATE = 32000
WINDOW = 10 * RATE
HOP = 5 * RATE
URL = "https://github.com/kkoutini/PaSST/releases/download/v0.0.1-audioset/passt-s-f128-p16-s10-ap.476-swa.pt"


class PasstLabels:
    """PaSST: logits of AudioSet's 527 classes for sounds of any length.

    Args:
        network: Function from waveforms [windows, 320000] at 32 kHz to logits [windows, classes].
        digest: Digest of the weights; computed if the network is a module.
        name: Name in results.
        device: Device of the network.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        digest: str | None = None,
        name: str = "PaSST",
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = device
        self.network = network
        self.digest = weights_digest(network) if isinstance(network, nn.Module) else digest
        self.name = name

    @classmethod
    def load(cls, *, device: torch.device | str = "cpu") -> PasstLabels:
        """Loads the network of hear21passt, which downloads its weights once.

        Args:
            device: Device of the network.

        Returns:
            The classifier.

        Raises:
            MissingPackageError: If hear21passt, or a package that it needs, is not installed.
            MissingWeightsError: If the weights are neither local nor downloadable.
        """
        try:
            base = optional_module("hear21passt.base", extra="passt")
        except (RuntimeError, OSError, AttributeError) as error:
            raise MissingPackageError(
                f"hear21passt is installed, but does not load ({error}). Install the torchvision "
                f"and the torchaudio that belong to torch {torch.__version__}."
            ) from error
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                network = base.get_basic_model(mode="logits")
        except (URLError, OSError) as error:
            folder = f"{torch.hub.get_dir()}/checkpoints"
            raise MissingWeightsError(
                f"the weights of PaSST could not be downloaded ({error}). Download {URL} on a "
                f"machine with a network, and put it into '{folder}'."
            ) from error
        name = "PaSST passt_s_swa_p16_128_ap476"
        return cls(network.to(device).eval(), name=name, device=device)

    @torch.no_grad()
    def __call__(self, waveform: Tensor, sampling_rate: int) -> Tensor:
        """Returns logits [classes] of a sound [channels, samples]: the mean over windows of 10 s.

        Windows start every 5 s; the last one is padded with silence.
        """
        sound = mono(waveform, sampling_rate, rate=RATE)
        starts = range(0, max(HOP, len(sound) - HOP), HOP)
        windows = torch.zeros(len(starts), WINDOW)
        for row, start in enumerate(starts):
            part = sound[start : start + WINDOW]
            windows[row, : len(part)] = part
        # One window at a time, to save memory.
        scores = [self.network(window[None].to(self.device))[0] for window in windows]
        return torch.stack(scores).float().mean(dim=0).cpu()


def kl_passt(
    sounds: Sequence[Tensor],
    references: Sequence[Tensor],
    sampling_rate: int,
    labels: PasstLabels,
    *,
    reference_rate: int | None = None,
) -> MetricResult:
    """Computes the mean KL divergence of class probabilities of sounds and their references.

    As in stable-audio-metrics: KL(sound || reference) of the softmax over classes, with 1e-6 added
    to the reference.

    Args:
        sounds: Waveforms [channels, samples] each; lengths may differ.
        references: Real or uncached sound for each sound.
        sampling_rate: Sampling rate of the sounds in Hz.
        labels: The classifier.
        reference_rate: Sampling rate of the references; the same by default.

    Returns:
        The mean divergence, with its standard error over sounds.

    Raises:
        InvalidArgumentError: If the numbers of references and sounds differ, or a sound is invalid.

    Source: Koutini et al., arXiv 2110.05069; Evans et al., "Stable Audio Open", arXiv 2407.14358.

    Example:
        A fake classifier replaces PaSST, whose weights must be downloaded.

        >>> import torch
        >>> labels = PasstLabels(lambda windows: windows[:, :4], name="made up")
        >>> sounds = [torch.rand(1, 32000) for _ in range(2)]
        >>> abs(kl_passt(sounds, sounds, 32000, labels).value) < 1e-4
        True
    """
    check_as_many("references", sounds, references)
    divergences = []
    for sound, reference in zip(sounds, references, strict=True):
        ours = labels(sound, sampling_rate).double().log_softmax(dim=0)
        theirs = labels(reference, reference_rate or sampling_rate).double().softmax(dim=0)
        if ours.shape != theirs.shape:
            raise InvalidArgumentError(
                f"the labels differ in number: {len(ours)} and {len(theirs)} classes."
            )
        divergences.append((ours.exp() * (ours - (theirs + 1e-6).log())).sum())
    return mean_result(
        "kl_passt",
        torch.stack(divergences),
        unit="nats",
        protocol=f"{labels.name}, windows of 10 s every 5 s, KL(sound || reference + 1e-6)",
        weights=labels.digest,
    )
