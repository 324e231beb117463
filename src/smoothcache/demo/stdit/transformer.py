"""The transformer: spatial and temporal blocks in turn, each with an eye on the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

MODULATIONS = 6  # shift, scale and gate of the self-attention, and of the feed-forward
FREQUENCIES = 256
NUM_TIMESTEPS = 1000
LEAST_NOISE = 0.05  # the velocity is that of at least this much noise


class STDiTBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward over tokens [batch, frames, places, width].

    Args:
        width: Channels of a token.
        heads: Of either attention.
        along_time: Whether a token attends to those at its place in the other frames, instead of
            to those of its frame.
    """

    def __init__(self, width: int, heads: int, *, along_time: bool) -> None:
        super().__init__()
        self.along_time = along_time
        self.modulation = nn.Parameter(torch.zeros(MODULATIONS, width))
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = _attention(width, heads)
        self.cross_attn = _attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = FeedForward(width, activation_fn="gelu-approximate")

    def forward(self, tokens: Tensor, text: Tensor, text_mask: Tensor, time: Tensor) -> Tensor:
        """The tokens after this block; the modulation ``time`` is [batch, 6, width]."""
        parts = (time + self.modulation)[:, :, None, None].unbind(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        tokens = tokens + gate1 * self._within(self.norm1(tokens) * (1 + scale1) + shift1)
        tokens = tokens + self._from_text(tokens, text, text_mask)
        changed: Tensor = self.mlp(self.norm2(tokens) * (1 + scale2) + shift2)
        return tokens + gate2 * changed

    def _within(self, tokens: Tensor) -> Tensor:
        """Self-attention of each frame, or of each place along time."""
        groups = tokens.transpose(1, 2) if self.along_time else tokens
        attended: Tensor = self.attn(groups.flatten(0, 1)).view_as(groups)
        return attended.transpose(1, 2) if self.along_time else attended

    def _from_text(self, tokens: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        flat = tokens.flatten(1, 2)
        attended: Tensor = self.cross_attn(flat, text, attention_mask=text_mask)
        return attended.view_as(tokens)


@dataclass
class STDiTOutput(BaseOutput):
    """What the transformer predicts, like its input [batch, channels, frames, height, width]."""

    sample: Tensor


class STDiT(ModelMixin, ConfigMixin):
    """Predicts the velocity of latent clips from their noisy state, the timestep and a text.

    The layers predict the clip, which is simpler than noise, and the velocity follows from it.
    Source: Li and He, "Back to Basics: Let Denoising Generative Models Denoise", arXiv 2511.13720.

    Args:
        in_channels: Channels of the latents.
        patch_size: Side of the square of latents that becomes one token.
        width: Channels of a token.
        num_heads: Of every attention.
        depth: Number of spatial blocks, and of temporal ones.
        text_dim: Channels of the text encoder's output.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: int = 4,
        width: int = 96,
        num_heads: int = 4,
        depth: int = 4,
        text_dim: int = 64,
    ) -> None:
        super().__init__()
        patch = in_channels * patch_size**2
        self.patch_embed = nn.Linear(patch, width)
        self.timestep_waves = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, width)
        self.time_modulation = nn.Linear(width, MODULATIONS * width)
        self.caption_embedder = nn.Sequential(
            nn.Linear(text_dim, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.spatial_blocks = nn.ModuleList(
            STDiTBlock(width, num_heads, along_time=False) for _ in range(depth)
        )
        self.temporal_blocks = nn.ModuleList(
            STDiTBlock(width, num_heads, along_time=True) for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final_proj = nn.Linear(width, patch)
        self._start_as_identity()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> STDiTOutput | tuple[Tensor]:
        """Predicts noise minus clip.

        Args:
            hidden_states: Noisy latents, [batch, channels, frames, height, width].
            timestep: From 0 (clip) to 1000 (noise), [batch].
            encoder_hidden_states: The text, [batch, tokens, text_dim].
            encoder_attention_mask: True or 1 where a token counts, [batch, tokens]; None if all do.
            return_dict: Whether to return an object instead of a tuple.
        """
        tokens = self.patch_embed(self._patches(hidden_states))
        tokens = tokens + _positions(tokens)
        embedded = self.timestep_waves(timestep).to(tokens.dtype)
        embedded = nn.functional.silu(self.timestep_embedder(embedded))
        time = self.time_modulation(embedded).unflatten(1, (MODULATIONS, -1))
        text = self.caption_embedder(encoder_hidden_states)
        if encoder_attention_mask is None:
            encoder_attention_mask = text.new_ones(text.shape[:2])
        mask = (1 - encoder_attention_mask[:, None].to(tokens.dtype)) * -10000.0
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial(tokens, text, mask, time)
            tokens = temporal(tokens, text, mask, time)
        shift, scale = self.final_modulation(embedded)[:, None, None].chunk(2, dim=-1)
        patches = self.final_proj(self.final_norm(tokens) * (1 + scale) + shift)
        clip = self._unpatched(patches, hidden_states.shape)
        noise_level = (timestep / NUM_TIMESTEPS).clamp(min=LEAST_NOISE).to(clip.dtype)
        sample = (hidden_states - clip) / noise_level.view(-1, 1, 1, 1, 1)
        return STDiTOutput(sample=sample) if return_dict else (sample,)

    def _patches(self, latents: Tensor) -> Tensor:
        """[batch, channels, frames, height, width] -> [batch, frames, places, patch]."""
        side = self.config.patch_size
        cut = latents.unflatten(4, (-1, side)).unflatten(3, (-1, side))
        return cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)

    def _unpatched(self, patches: Tensor, shape: torch.Size) -> Tensor:
        _, channels, _, height, _ = shape
        side = self.config.patch_size
        cut = patches.unflatten(3, (channels, side, side)).unflatten(2, (height // side, -1))
        return cut.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)

    def _start_as_identity(self) -> None:
        """Weights such that every block first adds nothing, and the prediction is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        silent = [self.time_modulation, self.final_modulation, self.final_proj]
        silent += [b.cross_attn.to_out[0] for b in [*self.spatial_blocks, *self.temporal_blocks]]
        for linear in silent:
            nn.init.zeros_(linear.weight)


def _attention(width: int, heads: int) -> Attention:
    return Attention(width, heads=heads, dim_head=width // heads, bias=True, qk_norm="rms_norm")


def _positions(tokens: Tensor) -> Tensor:
    """Where and when each token is, as sines and cosines: [frames, places, width].

    A third of the channels each for time, height and width; frames are square.
    """
    _, frames, places, width = tokens.shape
    side = round(places**0.5)
    axes = [
        torch.arange(n, device=tokens.device, dtype=torch.float32) for n in (frames, side, side)
    ]
    grid = torch.meshgrid(*axes, indexing="ij")
    pairs = width // 6
    frequencies = 20.0 ** -(torch.arange(pairs, device=tokens.device) / pairs)
    angles = [axis.flatten(1)[..., None] * frequencies for axis in grid]
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1)
    return nn.functional.pad(waves, (0, width - waves.shape[-1])).to(tokens.dtype)
