"""Pipelines that diffusers would load, far too small to be of use: two blocks, random weights."""

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


def build_audio_pipeline() -> Any:
    """A Stable Audio of one second at 16 kHz, as the audio demo has it; needs torchsde."""
    import warnings

    from diffusers import (
        AutoencoderOobleck,
        CosineDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    text = T5Config(
        vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1, dropout_rate=0.0
    )
    transformer = StableAudioDiTModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=16,
        cross_attention_input_dim=16,
        time_proj_dim=16,
        global_states_input_dim=32,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
        vae = AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[16, 16],
            channel_multiples=[1, 1],
            decoder_channels=8,
            decoder_input_channels=4,
            audio_channels=1,
            sampling_rate=16_000,
        )
    pipeline = StableAudioPipeline(
        vae=vae.eval(),
        text_encoder=T5EncoderModel(text).eval(),
        projection_model=StableAudioProjectionModel(16, 16, min_value=0, max_value=2).eval(),
        tokenizer=ByT5Tokenizer(extra_ids=0, model_max_length=48),
        transformer=transformer.eval(),
        scheduler=CosineDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500, sigma_data=1.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(folder: Path) -> Path:
    build_pipeline().save_pretrained(folder)
    return folder


def build_clip_pipeline(*, depth: int = 2) -> Any:
    """The video demo's kind of pipeline with random weights that do say something."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    from smoothcache.demo.stdit import ClipPipeline, FrameVAE, STDiT

    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = STDiT(width=24, num_heads=2, depth=depth, text_dim=16)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # it starts as the identity
    pipeline = ClipPipeline(
        ByT5Tokenizer(extra_ids=0),
        T5EncoderModel(config).eval(),
        transformer.eval(),
        FrameVAE(width=8).eval(),
        FlowMatchEulerDiscreteScheduler(shift=2.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
