"""Real architectures at full size with random weights, and how each is sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from zoo.layouts import STDiT3

Call = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """An architecture and how it is sampled.

    Attributes:
        build: The model's class.
        full: Its configuration at full size.
        tiny: What differs in the tiny one.
        shape: Of the latents, with the batch.
        small: The same of the tiny one.
        call: Calls the model once; returns what is subtracted from the latents.
        steps: Of a sample.
        published: Files of published schedules.
        is_one_graph: Whether PyTorch can compile it with ``fullgraph=True``; its blocks it can.
        compiled: How it is compiled first: DiT as a whole, for its aim is the highest; what is
            larger by blocks, because the whole would take minutes.
    """

    build: Callable[..., nn.Module]
    full: Mapping[str, Any]
    tiny: Mapping[str, Any]
    shape: tuple[int, ...]
    small: tuple[int, ...]
    call: Call
    steps: int
    published: Mapping[str, str] = field(default_factory=dict)
    is_one_graph: bool = True
    compiled: str = "blocks"


# ------------------------------------------------------------------------------------- one call


def _like(x: Tensor, *shape: int) -> Tensor:
    """Conditions, the same in every call."""
    return torch.linspace(-1, 1, shape[-1], device=x.device, dtype=x.dtype).expand(shape)


def _dit(model: Any, x: Tensor, t: Tensor) -> Tensor:
    classes = torch.arange(len(x), device=x.device) % 10
    out: Tensor = model(x, t, classes).sample[:, : x.shape[1]]
    return out


def _audio(model: Any, x: Tensor, t: Tensor) -> Tensor:
    config, batch = model.config, len(x)
    angles = torch.linspace(0, 1, x.shape[-1] + 1, device=x.device)[:, None]
    angles = angles * torch.ones(config.attention_head_dim // 2, device=x.device)
    out: Tensor = model(
        x,
        t.to(x.dtype) / 1000,
        encoder_hidden_states=_like(x, batch, 130, config.cross_attention_input_dim),
        global_hidden_states=_like(x, batch, 1, config.global_states_input_dim),
        rotary_embedding=(angles.cos(), angles.sin()),
    ).sample
    return out


def _wan(model: Any, x: Tensor, t: Tensor) -> Tensor:
    out: Tensor = model(x, t, _like(x, len(x), 512, model.config.text_dim)).sample
    return out


def _open_sora(model: Any, x: Tensor, t: Tensor) -> Tensor:
    captions = _like(x, len(x), 1, *model.y_embedder.y_embedding.shape)
    fps = torch.full((1,), 24.0, device=x.device)
    size = {"height": torch.tensor([480.0]), "width": torch.tensor([854.0])}  # read by the host
    out: Tensor = model(x, t, captions, fps=fps, **size)
    return out[:, : x.shape[1]]


def _flux(model: Any, x: Tensor, t: Tensor) -> Tensor:
    config, batch, tokens = model.config, len(x), x.shape[1]
    side = round(tokens**0.5)
    places = torch.arange(tokens, device=x.device)
    ids = torch.stack([0 * places, places // side, places % side], dim=1).to(x.dtype)
    out: Tensor = model(
        x,
        encoder_hidden_states=_like(x, batch, 512, config.joint_attention_dim),
        pooled_projections=_like(x, batch, config.pooled_projection_dim),
        timestep=t.to(x.dtype) / 1000,
        img_ids=ids,
        txt_ids=torch.zeros(512, 3, device=x.device, dtype=x.dtype),
        guidance=torch.full_like(t, 3.5, dtype=x.dtype),
    ).sample
    return out


# ------------------------------------------------------------------------------------ the cases

DIT = {"num_layers": 28, "in_channels": 4, "out_channels": 8, "patch_size": 2}
FILES = {
    "published alpha 0.08": "50-N-3-threshold-0.08.json",
    "published alpha 0.18": "50-N-3-threshold-0.18.json",
}


def _dit_case(images: int) -> Case:
    """DiT-XL/2 for so many images, with guidance in the same batch."""
    return Case(
        diffusers.DiTTransformer2DModel,
        {**DIT, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32},
        {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8},
        (2 * images, 4, 32, 32),
        (2 * images, 4, 8, 8),
        _dit,
        steps=50,
        published=FILES,
        compiled="whole",
    )


CASES: Mapping[str, Case] = {
    "dit-8": _dit_case(8),
    "dit-32": _dit_case(32),
    "dit-1": _dit_case(1),
    "stable-audio": Case(
        diffusers.StableAudioDiTModel,
        {"num_layers": 24},
        {
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 8,
            "cross_attention_input_dim": 8,
            "global_states_input_dim": 8,
            "time_proj_dim": 8,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
        },
        (2, 64, 1024),
        (2, 4, 16),
        _audio,
        steps=100,
        is_one_graph=False,  # diffusers 0.42 warns while it makes the output
    ),
    "flux": Case(
        diffusers.FluxTransformer2DModel,
        {"guidance_embeds": True},
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
            "in_channels": 4,
        },
        (1, 4096, 64),
        (1, 16, 4),
        _flux,
        steps=28,
    ),
    "wan-1.3b": Case(  # 33 frames, 2 s; guidance would call it once more, at the same cost
        diffusers.WanTransformer3DModel,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "ffn_dim": 32,
            "num_layers": 2,
            "text_dim": 16,
            "freq_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
        },
        (1, 16, 9, 60, 104),
        (1, 4, 2, 4, 4),
        _wan,
        steps=12,  # of 50 in earnest: more of the same would not fit the time
    ),
    "open-sora": Case(  # v1.2: 51 frames, 2 s, and as above without guidance; rectified flow
        STDiT3,
        {"width": 1152, "heads": 16, "depth": 28, "caption_width": 4096, "caption_tokens": 300},
        {"width": 32, "heads": 2, "depth": 2, "caption_width": 16, "caption_tokens": 6},
        (1, 4, 15, 60, 106),
        (1, 4, 2, 8, 8),
        _open_sora,
        steps=30,
        is_one_graph=False,  # it reads the size of the picture on the host
    ),
}
