"""The autoencoder: each frame by itself, all work at a quarter of its resolution."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class Encoded(BaseOutput):
    """Means and log-variances of the latents, [frames, latent_channels, height, width] each."""

    mean: Tensor
    log_variance: Tensor


@dataclass
class Decoded(BaseOutput):
    """Pictures, [frames, 3, height, width], about in [-1, 1]."""

    sample: Tensor


class FrameVAE(ModelMixin, ConfigMixin):
    """A variational autoencoder of small pictures, [frames, 3, height, width] in [-1, 1].

    Every square of 4 x 4 pixels is folded into channels first, so that no convolution runs at
    full resolution.

    Args:
        latent_channels: Channels of the latents, which are a quarter as high and wide.
        width: Channels inside.
        sample_size: Side of the pictures in pixels.
        scaling_factor: Brings latents to unit standard deviation.
    """

    config_name = "config.json"
    patch = 4

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        width: int = 64,
        sample_size: int = 32,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        pixels = 3 * self.patch**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(self.patch), *_convolutions(pixels, width, 2 * latent_channels)
        )
        self.decoder = nn.Sequential(
            *_convolutions(latent_channels, width, pixels), nn.PixelShuffle(self.patch)
        )

    def encode(self, pictures: Tensor) -> Encoded:
        """The distribution of the latents of pictures."""
        mean, log_variance = self.encoder(pictures).chunk(2, dim=1)
        return Encoded(mean=mean, log_variance=log_variance.clamp(-20, 10))

    def decode(self, latents: Tensor) -> Decoded:
        """The pictures that latents stand for."""
        return Decoded(sample=self.decoder(latents))

    def forward(self, pictures: Tensor) -> Decoded:
        """Pictures as they come back from their mean latents."""
        return self.decode(self.encode(pictures).mean)


class _Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, values: Tensor) -> Tensor:
        changed: Tensor = self.change(values)
        return values + changed


def _convolutions(inputs: int, width: int, outputs: int) -> list[nn.Module]:
    first, last = nn.Conv2d(inputs, width, 3, padding=1), nn.Conv2d(width, outputs, 3, padding=1)
    return [first, _Residual(width), nn.SiLU(), last]
