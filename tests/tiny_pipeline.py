"""A pipeline that diffusers would load, far too small to be of use: two blocks, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CLASSES = 10


def build_pipeline() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1001,  # the pipeline's null class has the index 1000
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(folder: Path) -> Path:
    build_pipeline().save_pretrained(folder)
    return folder
