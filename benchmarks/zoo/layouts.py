"""Layouts from outside of diffusers: those of published repositories, and oddities alone."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

from ._tiny import TinyModel, noise

WIDTH, HEADS, DEPTH = 64, 2, 3
CHANNELS, SIDE, PATCH = 4, 16, 2
CAPTION_WIDTH, CAPTION_TOKENS = 48, 8
FREQUENCIES = 256

approx_gelu = functools.partial(nn.GELU, approximate="tanh")


# --------------------------------------------------------------------------- parts that many share


def sinusoids(t: Tensor, dim: int = FREQUENCIES) -> Tensor:
    """Cosines and sines [batch, dim] of timesteps [batch] at falling frequencies."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    """[batch, tokens, width] to [batch, heads, tokens, width / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of [batch, heads, tokens, channels], with the heads put together again."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def plain_norm(width: int = WIDTH) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def unpatchify(tokens: Tensor, side: int = SIDE) -> Tensor:
    return F.fold(tokens.transpose(1, 2), (side, side), PATCH, stride=PATCH)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(t).to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(width)
        self.linear = nn.Linear(width, out_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale, 1e-6)


# ------------------------------------------------------------------------------- as in timm


class Attention(nn.Module):
    """Layout of timm's attention; ``rope`` is a function and no submodule, as in Open-Sora."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rope: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.rotary_emb = rope

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        return self.proj_drop(self.proj(attend(q, k, v)))


class Mlp(nn.Module):
    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(hidden))


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class TimmParts(NamedTuple):
    attention: Callable[..., nn.Module] = Attention
    mlp: Callable[..., nn.Module] = Mlp
    patch_embed: Callable[..., nn.Module] = PatchEmbed


@functools.cache
def timm_parts() -> TimmParts:
    """The real classes of timm where it can be imported, with torchvision; else the ones above."""
    try:
        from timm.models import vision_transformer as timm
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision for another torch
        return TimmParts()
    return TimmParts(timm.Attention, timm.Mlp, timm.PatchEmbed)


# ---------------------------------------------------------------------------- original DiT


class LabelEmbedder(nn.Module):
    """A table of classes; the row after the last class stands for none."""

    def __init__(self, num_classes: int, width: int, dropout_prob: float = 0.1) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        if train:
            dropped = torch.rand(len(labels), device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int, parts: TimmParts) -> None:
        super().__init__()
        self.norm1 = plain_norm(width)
        self.attn = parts.attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = plain_norm(width)
        self.mlp = parts.mlp(width, hidden_features=4 * width, act_layer=approx_gelu, drop=0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(
            6, dim=-1
        )
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Predicts noise and, in the channels after it, a variance."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        parts = timm_parts()
        self.x_embedder = parts.patch_embed(SIDE, PATCH, CHANNELS, WIDTH)
        self.t_embedder = TimestepEmbedder()
        self.y_embedder = LabelEmbedder(self.num_classes, WIDTH)
        positions = torch.randn(1, self.x_embedder.num_patches, WIDTH)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(WIDTH, HEADS, parts) for _ in range(DEPTH))
        self.final_layer = FinalLayer(WIDTH, PATCH * PATCH * 2 * CHANNELS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Guides the first half of a batch; what the second half holds does not count."""
        half, _ = x.chunk(2)
        noises, rest = self.forward(torch.cat([half, half]), t, y).split(CHANNELS, dim=1)
        given, free = noises.chunk(2)
        guided = free + cfg_scale * (given - free)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def _call_dit(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    labels = torch.arange(len(x)) % DiT.num_classes
    y = torch.cat([labels, torch.full_like(labels, DiT.num_classes)])
    output = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), y, cfg_scale=4.0)
    return output[: len(x), :CHANNELS]


# ------------------------------------------------------------------------- Open-Sora 1.2 (STDiT3)


class Rotary(nn.Module):
    """Turns pairs of channels by angles that grow with the token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = 10_000 ** (-torch.arange(0, dim, 2) / dim)
        self.freqs = nn.Parameter(frequencies, requires_grad=False)

    def rotate_queries_or_keys(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * self.freqs
        return turned(x, torch.stack([angles.cos(), angles.sin()], dim=-1))


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Turns neighbouring channels; the turns [..., tokens, channels / 2, 2] are (cos, sin)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


class SizeEmbedder(TimestepEmbedder):
    def forward(self, sizes: Tensor, batch: int) -> Tensor:
        """Embeds sizes [1 or batch, n] one by one: [batch, n * width]."""
        sizes = sizes.expand(batch, -1)
        return super().forward(sizes.flatten()).unflatten(0, sizes.shape).flatten(1)


class CaptionEmbedder(nn.Module):
    def __init__(self, in_channels: int, width: int, tokens: int) -> None:
        super().__init__()
        self.y_proj = Mlp(in_channels, width, width, act_layer=approx_gelu)
        self.register_buffer("y_embedding", torch.randn(tokens, in_channels) / in_channels**0.5)

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption)


class PositionEmbedding2D(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10_000 ** (-torch.arange(0, dim // 2, 2) / (dim // 2)))

    def forward(self, height: int, width: int, scale: float) -> Tensor:
        """Positions [1, height * width, dim]."""
        rows, columns = (self._sides(size, scale) for size in (height, width))
        rows = rows[:, None].expand(-1, width, -1)
        columns = columns[None].expand(height, -1, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None]

    def _sides(self, size: int, scale: float) -> Tensor:
        angles = torch.arange(size, device=self.inv_freq.device)[:, None] / scale * self.inv_freq
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PatchEmbed3D(nn.Module):
    def __init__(self, patch: tuple[int, int, int], in_chans: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_chans, width, patch, stride=patch)
        self.norm = None

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class MultiHeadCrossAttention(nn.Module):
    """Captions of all samples lie one after another in a batch of one; a mask keeps them apart."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, cond: Tensor, lengths: list[int]) -> Tensor:
        batch, tokens, width = x.shape
        q = split_heads(self.q_linear(x).reshape(1, -1, width), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.kv_linear(cond).chunk(2, -1))
        own = torch.block_diag(*(x.new_ones(tokens, length) for length in lengths)).bool()
        return self.proj_drop(self.proj(attend(q, k, v, own).reshape(batch, tokens, width)))


class STDiT3Block(nn.Module):
    """Attends within frames, or with ``temporal`` within places; all else is the same in both."""

    def __init__(
        self,
        width: int,
        heads: int,
        temporal: bool = False,
        rope: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = plain_norm(width)
        self.attn = Attention(width, heads, qkv_bias=True, qk_norm=True, rope=rope)
        self.cross_attn = MultiHeadCrossAttention(width, heads)
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width, 4 * width, act_layer=approx_gelu)
        self.drop_path = nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        mask: list[int],
        x_mask: Tensor | None = None,
        t0: Tensor | None = None,
        T: int = 1,
        S: int = 1,
    ) -> Tensor:
        table = self._modulation(t)
        if x_mask is not None and t0 is not None:
            noisy = x_mask.repeat_interleave(S, dim=1)[:, None, :, None]
            table = torch.where(noisy, table, self._modulation(t0))
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(1)
        hidden = modulate(self.norm1(x), shift1, scale1).unflatten(1, (T, S))
        if self.temporal:
            hidden = hidden.transpose(1, 2)
        hidden = self.attn(hidden.flatten(0, 1)).unflatten(0, (len(x), -1))
        if self.temporal:
            hidden = hidden.transpose(1, 2)
        x = x + self.drop_path(gate1 * hidden.flatten(1, 2))
        x = x + self.cross_attn(x, y, mask)
        hidden = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + self.drop_path(gate2 * hidden)

    def _modulation(self, t: Tensor) -> Tensor:
        """Shifts, scales and gates [batch, 6, 1, width]."""
        return (self.scale_shift_table + t.unflatten(-1, (6, -1)))[:, :, None]


class T2IFinalLayer(nn.Module):
    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(width)
        self.linear = nn.Linear(width, out_width)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, None]).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class STDiT3(nn.Module):
    """Open-Sora v1.2; its published size is 1152, 16, 28, 4096, 300."""

    patch_size = (1, 2, 2)
    input_sq_size = 512

    def __init__(
        self,
        width: int = WIDTH,
        heads: int = HEADS,
        depth: int = DEPTH,
        caption_width: int = CAPTION_WIDTH,
        caption_tokens: int = CAPTION_TOKENS,
    ) -> None:
        super().__init__()
        self.pos_embed = PositionEmbedding2D(width)
        self.rope = Rotary(width // heads)
        self.x_embedder = PatchEmbed3D(self.patch_size, CHANNELS, width)
        self.t_embedder = TimestepEmbedder(width)
        self.fps_embedder = SizeEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(caption_width, width, caption_tokens)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(width, heads) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(
            STDiT3Block(width, heads, temporal=True, rope=self.rope.rotate_queries_or_keys)
            for _ in range(depth)
        )
        self.final_layer = T2IFinalLayer(width, math.prod(self.patch_size) * 2 * CHANNELS)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        T, H, W = (size // patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True))
        scale = (height[0].item() * width[0].item()) ** 0.5 / self.input_sq_size
        frame_rate = self.fps_embedder(fps[:, None], len(x))
        t = self.t_embedder(timestep) + frame_rate
        t_mlp, t0_mlp = self.t_block(t), None
        if x_mask is not None:
            t0_mlp = self.t_block(self.t_embedder(torch.zeros_like(timestep)) + frame_rate)
        y, lengths = self.encode_text(y, mask)
        tokens = self.x_embedder(x).unflatten(1, (T, H * W))
        tokens = (tokens + self.pos_embed(H, W, scale).to(tokens.dtype)).flatten(1, 2)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial(tokens, y, t_mlp, lengths, x_mask, t0_mlp, T, H * W)
            tokens = temporal(tokens, y, t_mlp, lengths, x_mask, t0_mlp, T, H * W)
        return self.unpatchify(self.final_layer(tokens, t), T, H, W)

    def encode_text(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
        """Packs captions [batch, 1, tokens, channels] without their padding: [1, all, width]."""
        y = self.y_embedder(y)[:, 0]
        if mask is None:
            return y.flatten(0, 1)[None], [y.shape[1]] * len(y)
        mask = mask.repeat(len(y) // len(mask), 1)
        return y[mask != 0][None], mask.sum(dim=1).tolist()

    def unpatchify(self, x: Tensor, T: int, H: int, W: int) -> Tensor:
        patches = x.unflatten(-1, (*self.patch_size, -1)).unflatten(1, (T, H, W))
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(
            len(x), -1, *(n * p for n, p in zip((T, H, W), self.patch_size, strict=True))
        )


def _call_stdit(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    caption = noise(len(x), 1, CAPTION_TOKENS, CAPTION_WIDTH, seed=2)
    mask = torch.arange(CAPTION_TOKENS) < 5 + torch.arange(len(x))[:, None] % 3
    output = model(
        torch.cat([x, x]),
        torch.cat([t, t]),
        y=torch.cat([caption, model.y_embedder.y_embedding.expand_as(caption)]),
        mask=mask.long(),
        fps=torch.tensor([24.0]),
        height=torch.tensor([64.0]),
        width=torch.tensor([64.0]),
    )
    given, free = output[:, :CHANNELS].chunk(2)
    return free + 7.0 * (given - free)


# ---------------------------------------------------------- Flux's reference code, Open-Sora 2.0


@dataclass
class MMDiTConfig:
    in_channels: int = 16
    vec_in_dim: int = 32
    context_in_dim: int = CAPTION_WIDTH
    hidden_size: int = WIDTH
    mlp_ratio: float = 4.0
    num_heads: int = HEADS
    depth: int = DEPTH
    depth_single_blocks: int = DEPTH
    axes_dim: tuple[int, ...] = (8, 12, 12)
    theta: int = 10_000
    guidance_embed: bool = True
    cond_embed: bool = False
    fused_qkv: bool = True


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.silu(self.in_layer(x)))


def axis_angles(ids: Tensor, axes: tuple[int, ...], theta: int) -> Tensor:
    """Angles [batch, tokens, channels / 2] for ids [batch, tokens, axes]."""
    exponents = [torch.arange(0, dim, 2, device=ids.device) / dim for dim in axes]
    return torch.cat([ids[..., i, None] * theta**-e for i, e in enumerate(exponents)], dim=-1)


class EmbedND(nn.Module):
    def __init__(self, axes_dim: tuple[int, ...], theta: int) -> None:
        super().__init__()
        self.axes_dim, self.theta = axes_dim, theta

    def forward(self, ids: Tensor) -> Tensor:
        angles = axis_angles(ids, self.axes_dim, self.theta)
        return torch.stack([angles.cos(), angles.sin()], dim=-1)[:, None]


class LigerEmbedND(EmbedND):
    """Gives cosines and sines apart, for halves of channels and not for neighbours."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = axis_angles(ids, self.axes_dim, self.theta).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def attend_in_place(q: Tensor, k: Tensor, v: Tensor, pe: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Attention with queries and keys turned by where their tokens lie."""
    if isinstance(pe, Tensor):
        return attend(turned(q, pe), turned(k, pe), v)
    cos, sin = (part[:, None] for part in pe)
    return attend(q * cos + half_turned(q) * sin, k * cos + half_turned(k) * sin, v)


def half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    """Holds the projections of a stream; the blocks below use these and never call it."""

    def __init__(self, dim: int, num_heads: int, fused_qkv: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q_proj = nn.Linear(dim, dim)
            self.k_proj = nn.Linear(dim, dim)
            self.v_proj = nn.Linear(dim, dim)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, pe: Tensor) -> Tensor:
        projections = self.qkv(x).chunk(3, -1) if self.fused_qkv else _projected_apart(self, x)
        q, k, v = (split_heads(part, self.num_heads) for part in projections)
        return self.proj(attend_in_place(*self.norm(q, k, v), v, pe))


class ModulationOut(NamedTuple):
    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    def __init__(self, dim: int, double: bool) -> None:
        super().__init__()
        self.multiplier = 6 if double else 3
        self.lin = nn.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        parts = self.lin(F.silu(vec))[:, None].chunk(self.multiplier, dim=-1)
        return ModulationOut(*parts[:3]), ModulationOut(*parts[3:]) if parts[3:] else None


class DoubleStreamBlock(nn.Module):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.num_heads = config.num_heads
        for stream in ("img", "txt"):
            attention = SelfAttention(dim, config.num_heads, config.fused_qkv)
            mlp = nn.Sequential(nn.Linear(dim, hidden), approx_gelu(), nn.Linear(hidden, dim))
            self.add_module(f"{stream}_mod", Modulation(dim, double=True))
            self.add_module(f"{stream}_norm1", plain_norm(dim))
            self.add_module(f"{stream}_attn", attention)
            self.add_module(f"{stream}_norm2", plain_norm(dim))
            self.add_module(f"{stream}_mlp", mlp)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        img_qkv = self.img_attn.qkv(modulate(self.img_norm1(img), *img_mod1[:2]))
        txt_qkv = self.txt_attn.qkv(modulate(self.txt_norm1(txt), *txt_mod1[:2]))
        img_q, img_k, img_v = (split_heads(x, self.num_heads) for x in img_qkv.chunk(3, dim=-1))
        txt_q, txt_k, txt_v = (split_heads(x, self.num_heads) for x in txt_qkv.chunk(3, dim=-1))
        img_q, img_k = self.img_attn.norm(img_q, img_k, img_v)
        txt_q, txt_k = self.txt_attn.norm(txt_q, txt_k, txt_v)
        q, k = torch.cat([txt_q, img_q], dim=2), torch.cat([txt_k, img_k], dim=2)
        attn = attend_in_place(q, k, torch.cat([txt_v, img_v], dim=2), pe)
        txt_attn, img_attn = attn.tensor_split([txt.shape[1]], dim=1)

        img = img + img_mod1.gate * self.img_attn.proj(img_attn)
        img = img + img_mod2.gate * self.img_mlp(modulate(self.img_norm2(img), *img_mod2[:2]))
        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_attn)
        txt = txt + txt_mod2.gate * self.txt_mlp(modulate(self.txt_norm2(txt), *txt_mod2[:2]))
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.num_heads, self.hidden_size, self.mlp_hidden_dim = config.num_heads, dim, hidden
        if config.fused_qkv:
            self.linear1 = nn.Linear(dim, 3 * dim + hidden)
        else:
            self.q_proj = nn.Linear(dim, dim)
            self.k_proj = nn.Linear(dim, dim)
            self.v_mlp = nn.Linear(dim, dim + hidden)
        self.linear2 = nn.Linear(dim + hidden, dim)
        self.norm = QKNorm(dim // config.num_heads)
        self.pre_norm = plain_norm(dim)
        self.mlp_act = approx_gelu()
        self.modulation = Modulation(dim, double=False)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        mod, _ = self.modulation(vec)
        projected = self.linear1(modulate(self.pre_norm(x), mod.shift, mod.scale))
        qkv, mlp = projected.split([3 * self.hidden_size, self.mlp_hidden_dim], dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        attn = attend_in_place(*self.norm(q, k, v), v, pe)
        return x + mod.gate * self.linear2(torch.cat([attn, self.mlp_act(mlp)], dim=2))


def _projected_apart(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


class DoubleStreamBlockProcessor:
    """Runs a block from outside: what it is given as ``attn`` is the whole block."""

    def __call__(
        self, attn: nn.Module, img: Tensor, txt: Tensor, vec: Tensor, pe: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = attn.img_mod(vec)
        txt_mod1, txt_mod2 = attn.txt_mod(vec)
        img_parts = _projected_apart(attn.img_attn, modulate(attn.img_norm1(img), *img_mod1[:2]))
        txt_parts = _projected_apart(attn.txt_attn, modulate(attn.txt_norm1(txt), *txt_mod1[:2]))
        img_q, img_k, img_v = (split_heads(part, attn.num_heads) for part in img_parts)
        txt_q, txt_k, txt_v = (split_heads(part, attn.num_heads) for part in txt_parts)
        img_q, img_k = attn.img_attn.norm(img_q, img_k, img_v)
        txt_q, txt_k = attn.txt_attn.norm(txt_q, txt_k, txt_v)
        q, k = torch.cat([txt_q, img_q], dim=2), torch.cat([txt_k, img_k], dim=2)
        joint = attend_in_place(q, k, torch.cat([txt_v, img_v], dim=2), pe)
        txt_attn, img_attn = joint.tensor_split([txt.shape[1]], dim=1)

        img = img + img_mod1.gate * attn.img_attn.proj(img_attn)
        img = img + img_mod2.gate * attn.img_mlp(modulate(attn.img_norm2(img), *img_mod2[:2]))
        txt = txt + txt_mod1.gate * attn.txt_attn.proj(txt_attn)
        txt = txt + txt_mod2.gate * attn.txt_mlp(modulate(attn.txt_norm2(txt), *txt_mod2[:2]))
        return img, txt


class SingleStreamBlockProcessor:
    def __call__(
        self, attn: nn.Module, x: Tensor, vec: Tensor, pe: tuple[Tensor, Tensor]
    ) -> Tensor:
        mod, _ = attn.modulation(vec)
        modulated = modulate(attn.pre_norm(x), mod.shift, mod.scale)
        v, mlp = attn.v_mlp(modulated).split([attn.hidden_size, attn.mlp_hidden_dim], dim=-1)
        parts = attn.q_proj(modulated), attn.k_proj(modulated), v
        q, k, v = (split_heads(part, attn.num_heads) for part in parts)
        joint = attend_in_place(*attn.norm(q, k, v), v, pe)
        return x + mod.gate * attn.linear2(torch.cat([joint, attn.mlp_act(mlp)], dim=2))


class ProcessedDoubleStreamBlock(DoubleStreamBlock):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.processor = DoubleStreamBlockProcessor()

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, pe: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.processor(self, img, txt, vec, pe)


class ProcessedSingleStreamBlock(SingleStreamBlock):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.processor = SingleStreamBlockProcessor()

    def forward(self, x: Tensor, vec: Tensor, pe: Any, **kwargs: Any) -> Tensor:
        return self.processor(self, x, vec, pe)


class MMDiTParts(nn.Module):
    double_block: type[nn.Module] = DoubleStreamBlock
    single_block: type[nn.Module] = SingleStreamBlock
    position_embedder: type[nn.Module] = EmbedND

    def __init__(self, params: MMDiTConfig) -> None:
        super().__init__()
        width = params.hidden_size
        self.params = params
        self.pe_embedder = self.position_embedder(params.axes_dim, params.theta)
        self.img_in = nn.Linear(params.in_channels, width)
        self.time_in = MLPEmbedder(FREQUENCIES, width)
        self.vector_in = MLPEmbedder(params.vec_in_dim, width)
        self.guidance_in = (
            MLPEmbedder(FREQUENCIES, width) if params.guidance_embed else nn.Identity()
        )
        self.txt_in = nn.Linear(params.context_in_dim, width)
        self.double_blocks = nn.ModuleList(self.double_block(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(
            self.single_block(params) for _ in range(params.depth_single_blocks)
        )
        self.final_layer = FinalLayer(width, params.in_channels)


class Flux(MMDiTParts):
    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        vec = self.time_in(sinusoids(1000 * timesteps)) + self.vector_in(y)
        vec = vec + self.guidance_in(sinusoids(1000 * guidance))
        img, txt = self.img_in(img), self.txt_in(txt)
        pe = self.pe_embedder(torch.cat([txt_ids, img_ids], dim=1))
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        both = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            both = block(both, vec=vec, pe=pe)
        return self.final_layer(both[:, txt.shape[1] :], vec)


class MMDiTModel(MMDiTParts):
    """Open-Sora 2.0: its class has no forward, which is another method put on the instance."""

    double_block = ProcessedDoubleStreamBlock
    single_block = ProcessedSingleStreamBlock
    position_embedder = LigerEmbedND

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.config = config
        self.cond_in = (
            nn.Linear(config.in_channels + PATCH * PATCH, config.hidden_size)
            if config.cond_embed
            else nn.Identity()
        )
        self.forward = self.forward_ckpt

    def forward_ckpt(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        vec = self.time_in(sinusoids(1000 * timesteps)) + self.vector_in(y_vec)
        img, txt = self.img_in(img) + self.cond_in(cond), self.txt_in(txt)
        pe = self.pe_embedder(torch.cat([txt_ids, img_ids], dim=1))
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        both = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            both = block(both, vec, pe)
        return self.final_layer(both[:, txt.shape[1] :], vec)


def _build_open_sora_2() -> nn.Module:
    return MMDiTModel(MMDiTConfig(guidance_embed=False, cond_embed=True, fused_qkv=False))


def _mmdit_inputs(x: Tensor, t: Tensor) -> dict[str, Tensor]:
    side = math.isqrt(x.shape[1])
    places = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side)).float()
    return {
        "img": x,
        "img_ids": places.expand(len(x), -1, -1),
        "txt": noise(len(x), CAPTION_TOKENS, CAPTION_WIDTH, seed=2),
        "txt_ids": torch.zeros(len(x), CAPTION_TOKENS, 3),
        "timesteps": t / 1000,
    }


def _call_flux(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    pooled = noise(len(x), model.params.vec_in_dim, seed=3)
    return model(**_mmdit_inputs(x, t), y=pooled, guidance=torch.full((len(x),), 4.0))


def _call_open_sora_2(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    pooled = noise(len(x), model.params.vec_in_dim, seed=3)
    frames = noise(*x.shape[:2], x.shape[2] + PATCH * PATCH, seed=4)
    return model(**_mmdit_inputs(x, t), y_vec=pooled, cond=frames)


# ------------------------------------------------------------------------ stable-audio-tools


def _build_stable_audio() -> nn.Module:
    from torch._dynamo import config

    kept = {"suppress_errors": config.suppress_errors, "cache_size_limit": config.cache_size_limit}
    with config.patch(kept), contextlib.redirect_stdout(io.StringIO()):  # the import alters both
        from stable_audio_tools.models.dit import DiffusionTransformer
    return DiffusionTransformer(
        io_channels=8,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        cond_token_dim=WIDTH // 2,
        project_cond_tokens=False,
        global_cond_dim=WIDTH,
        transformer_type="continuous_transformer",
        zero_init_branch_outputs=False,
    )


def _call_stable_audio(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(
        x,
        t / 1000,
        cross_attn_cond=noise(len(x), CAPTION_TOKENS, WIDTH // 2, seed=2),
        global_embed=noise(len(x), WIDTH, seed=3),
        cfg_scale=7.0,
    )


# ------------------------------------------------------------- oddities, each in a plain DiT


class PlainDiT(nn.Module):
    """Patches, time and text in, patches out; what is between is for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = PatchEmbed(SIDE, PATCH, CHANNELS, WIDTH)
        self.pos_embed = nn.Parameter(torch.randn(1, self.x_embedder.num_patches, WIDTH))
        self.t_embedder = TimestepEmbedder()
        self.y_embedder = CaptionEmbedder(CAPTION_WIDTH, WIDTH, CAPTION_TOKENS)
        self.final_layer = FinalLayer(WIDTH, PATCH * PATCH * CHANNELS)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        c, y = self.t_embedder(timestep), self.y_embedder(text)
        tokens = self.run_blocks(self.x_embedder(x) + self.pos_embed, c, y)
        return unpatchify(self.final_layer(tokens, c))

    def run_blocks(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


def _call_plain(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(x, t, text=noise(len(x), CAPTION_TOKENS, CAPTION_WIDTH, seed=2))


class RecycledTrunk(PlainDiT):
    """Feeds the trunk's output back into it, three times in one forward."""

    num_recycles = 3

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(DiTBlock(WIDTH, HEADS, TimmParts()) for _ in range(DEPTH))
        self.recycle_norm = nn.LayerNorm(WIDTH)
        self.recycle_proj = nn.Linear(WIDTH, WIDTH)

    def run_blocks(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        c, state = c + y.mean(dim=1), torch.zeros_like(x)
        for _ in range(self.num_recycles):
            state = x + self.recycle_proj(self.recycle_norm(state))
            for block in self.trunk:
                state = block(state, c)
        return state


class JointAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.to_add_out = nn.Linear(dim, dim)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.cat([self.to_q(image), self.add_q_proj(text)], dim=1)
        k = torch.cat([self.to_k(image), self.add_k_proj(text)], dim=1)
        v = torch.cat([self.to_v(image), self.add_v_proj(text)], dim=1)
        both = attend(*(split_heads(part, self.heads) for part in (q, k, v)))
        image, text = both.tensor_split([image.shape[1]], dim=1)
        return self.to_out[1](self.to_out[0](image)), self.to_add_out(text)


class SharedFeedForwardBlock(nn.Module):
    """Two streams, one feed-forward: it runs on the image's tokens and then on the text's."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm1_context = plain_norm(dim), plain_norm(dim)
        self.attn = JointAttention(dim, heads)
        self.norm2, self.norm2_context = plain_norm(dim), plain_norm(dim)
        self.ff = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim))

    def forward(self, image: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift1, gate1, shift2, gate2 = self.adaLN_modulation(c)[:, None].chunk(4, dim=-1)
        image_attn, text_attn = self.attn(self.norm1(image) + shift1, self.norm1_context(text))
        image, text = image + gate1 * image_attn, text + gate1 * text_attn
        image = image + gate2 * self.ff(self.norm2(image) + shift2)
        return image, text + gate2 * self.ff(self.norm2_context(text) + shift2)


class SharedFeedForward(PlainDiT):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SharedFeedForwardBlock(WIDTH, HEADS) for _ in range(DEPTH))

    def run_blocks(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x, y = block(x, y, c)
        return x


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fn(self.norm(x), **kwargs)


class EitherAttention(nn.Module):
    """Attends to the context where it is given one, else to itself: the same module for both."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parts = self.to_q(x), *self.to_kv(x if context is None else context).chunk(2, dim=-1)
        return self.to_out(attend(*(split_heads(part, self.heads) for part in parts)))


class GEGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class GatedFeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, 8 * dim), GEGLU(), nn.Dropout(0.0), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class NestedLists(PlainDiT):
    """Layers are lists of a self-attention, a cross-attention and a feed-forward, unnamed."""

    def __init__(self) -> None:
        super().__init__()
        self.to_time_cond = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.layers = nn.ModuleList([])
        for _ in range(DEPTH):
            parts = EitherAttention(WIDTH, HEADS), EitherAttention(WIDTH, HEADS)
            parts = *parts, GatedFeedForward(WIDTH)
            self.layers.append(nn.ModuleList([PreNorm(WIDTH, part) for part in parts]))

    def run_blocks(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        x = x + self.to_time_cond(c)[:, None]
        for attn, cross, ff in self.layers:
            x = attn(x) + x
            x = cross(x, context=y) + x
            x = ff(x) + x
        return x


class WeightedAttention(nn.Module):
    """Projections that are named ``wq`` and so on, and the context as second argument."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        parts = self.wq(x), self.wk(memory), self.wv(memory)
        return self.wo(attend(*(split_heads(part, self.heads) for part in parts)))


class GatedUnit(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class OddNamesBlock(nn.Module):
    """Neither attention nor feed-forward by name: a mixer, a reader and a channel unit."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.pre_mix, self.pre_read, self.pre_channel = (RMSNorm(dim) for _ in range(3))
        self.mixer = WeightedAttention(dim, heads)
        self.reader = WeightedAttention(dim, heads)
        self.channel = GatedUnit(dim, 4 * dim)
        self.time_shift = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        mix_shift, channel_shift = self.time_shift(F.silu(c))[:, None].chunk(2, dim=-1)
        mixed = self.pre_mix(x) + mix_shift
        x = x + self.mixer(mixed, mixed)
        x = x + self.reader(self.pre_read(x), y)
        return x + self.channel(self.pre_channel(x) + channel_shift)


class DictOfBlocks(PlainDiT):
    def __init__(self) -> None:
        super().__init__()
        names = ("early", "middle", "late")
        self.stages = nn.ModuleDict({name: OddNamesBlock(WIDTH, HEADS) for name in names})

    def run_blocks(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x, c, y)
        return x


class TextBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (plain_norm(dim) for _ in range(3))
        self.attn = Attention(dim, heads)
        self.cross_attn = EitherAttention(dim, heads)
        self.mlp = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim))

    def forward(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        shift1, gate1, shift2, gate2 = self.adaLN_modulation(c)[:, None].chunk(4, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) + shift1)
        x = x + self.cross_attn(self.norm2(x), y)
        return x + gate2 * self.mlp(self.norm3(x) + shift2)


class WrappedBlocks(PlainDiT):
    """Every block sits in the wrapper with which PyTorch checkpoints activations."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            checkpoint_wrapper(TextBlock(WIDTH, HEADS)) for _ in range(DEPTH)
        )

    def run_blocks(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c, y)
        return x


class RawLinearsBlock(nn.Module):
    """The feed-forward is no module: its two projections belong to the block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = plain_norm(dim)
        self.attn = Attention(dim, heads, qkv_bias=True)
        self.norm2 = plain_norm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, gate1, shift2, gate2 = self.adaLN_modulation(c)[:, None].chunk(4, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) + shift1)
        return x + gate2 * self.fc2(self.act(self.fc1(self.norm2(x) + shift2)))


class ParallelBlock(nn.Module):
    """Attention and MLP side by side, with one projection in and one out, as in ViT-22B."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.in_split = heads, [dim, dim, dim, 4 * dim]
        self.in_norm = plain_norm(dim)
        self.in_proj = nn.Linear(dim, sum(self.in_split), bias=False)
        self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.mlp_act = nn.GELU()
        self.out_proj = nn.Linear(5 * dim, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c)[:, None].chunk(3, dim=-1)
        *qkv, mlp = self.in_proj(modulate(self.in_norm(x), shift, scale)).split(self.in_split, -1)
        q, k, v = (split_heads(part, self.heads) for part in qkv)
        attn = attend(self.q_norm(q), self.k_norm(k), v)
        return x + gate * self.out_proj(torch.cat([attn, self.mlp_act(mlp)], dim=-1))


class SingleStream(PlainDiT):
    """Blocks of one class over the image's tokens; the text joins the time."""

    def __init__(self, block: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(WIDTH, HEADS) for _ in range(DEPTH))

    def run_blocks(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        c = c + y.mean(dim=1)
        for block in self.blocks:
            x = block(x, c)
        return x


# ------------------------------------------------------------------------------- the layouts

_IMAGE, _PACKED = (CHANNELS, SIDE, SIDE), (64, 16)

LAYOUTS: dict[str, TinyModel] = {
    "original-dit": TinyModel(
        DiT,
        _call_dit,
        _IMAGE,
        ("blocks",),
        note="the sampler calls forward_with_cfg, which calls self.forward: hooks on the model's "
        "__call__ never run; guidance doubles the batch; labels are dropped at random in training",
    ),
    "open-sora-v1.2": TinyModel(
        STDiT3,
        _call_stdit,
        (CHANNELS, 4, 8, 8),
        ("spatial_blocks", "temporal_blocks"),
        note="one block class in two lists that take turns; captions are packed into a batch of "
        "one; attention folds frames or places into the batch; the temporal attentions share a "
        "bound method of the model's rope; height and width are read by the host",
    ),
    "mmdit-flux-reference": TinyModel(
        lambda: Flux(MMDiTConfig()),
        _call_flux,
        _PACKED,
        ("double_blocks", "single_blocks"),
        note="img_attn and txt_attn are never called: the block uses their qkv, norm and proj; "
        "single blocks have attention and MLP in the same two projections",
    ),
    "mmdit-open-sora-2": TinyModel(
        _build_open_sora_2,
        _call_open_sora_2,
        _PACKED,
        ("double_blocks", "single_blocks"),
        note="forward is an attribute of the instance and the class has none; processors that are "
        "no modules run the blocks and reach into img_attn and txt_attn, which are never called; "
        "pe is a tuple",
    ),
    "recycled-trunk": TinyModel(
        RecycledTrunk,
        _call_plain,
        _IMAGE,
        ("trunk",),
        note="the list of blocks runs three times in one forward, each time on other inputs",
    ),
    "shared-ffn": TinyModel(
        SharedFeedForward,
        _call_plain,
        _IMAGE,
        ("blocks",),
        note="each block calls its feed-forward twice, for image and for text, of other lengths",
    ),
    "cross-only-names": TinyModel(
        NestedLists,
        _call_plain,
        _IMAGE,
        ("layers",),
        note="layers are lists that are never called; self- and cross-attention have the same "
        "class and widths and no names; the model adds the residuals",
    ),
    "cross-only-names-dict": TinyModel(
        DictOfBlocks,
        _call_plain,
        _IMAGE,
        ("stages",),
        note="blocks are in a ModuleDict; no part is called attention or feed-forward",
    ),
    "cross-only-names-wrapped": TinyModel(
        WrappedBlocks,
        _call_plain,
        _IMAGE,
        ("blocks",),
        note="each block is in a checkpoint wrapper, whose inner module has its name in the paths "
        "of modules but not in those of parameters",
    ),
    "raw-linears": TinyModel(
        lambda: SingleStream(RawLinearsBlock),
        _call_plain,
        _IMAGE,
        ("blocks",),
        note="the feed-forward is two projections of the block itself, so no module computes it",
    ),
    "parallel-block": TinyModel(
        lambda: SingleStream(ParallelBlock),
        _call_plain,
        _IMAGE,
        ("blocks",),
        note="no module is an attention or a feed-forward; only the block adds a residual",
    ),
}

if all(importlib.util.find_spec(name) for name in ("stable_audio_tools", "einops")):
    LAYOUTS["stable-audio-tools"] = TinyModel(
        _build_stable_audio,
        _call_stable_audio,
        (8, 128),
        ("transformer.layers",),
        note="guidance doubles the batch inside of forward, at some steps only if cfg_interval "
        "says so; layers run under torch.utils.checkpoint, without gradients too; a token for "
        "time and global conditioning is prepended, so layers see one token more",
    )
