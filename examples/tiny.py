"""The pipelines of the examples, far too small to be of use: random weights, to try scripts out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import diffusers
import torch
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT = 16  # width of every text encoder
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
T5 = {"vocab_size": 259, "d_model": TEXT, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1}


def dit() -> diffusers.DiTPipeline:
    """Like facebook/DiT-XL-2-256."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, sample_size=8, num_embeds_ada_norm=1000
    )
    return _quiet(diffusers.DiTPipeline(transformer, _image_vae(4), diffusers.DDIMScheduler()))


def stable_audio() -> diffusers.StableAudioPipeline:
    """Like stabilityai/stable-audio-open-1.0."""
    torch.manual_seed(0)
    transformer = diffusers.StableAudioDiTModel(
        **HEADS, sample_size=32, in_channels=4, out_channels=4, num_key_value_attention_heads=1,
        cross_attention_dim=TEXT, cross_attention_input_dim=TEXT, time_proj_dim=16,
        global_states_input_dim=2 * TEXT,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[4, 8], channel_multiples=[1, 1],
        decoder_channels=8, decoder_input_channels=4, audio_channels=1, sampling_rate=1000,
    )  # fmt: skip
    projection = diffusers.StableAudioProjectionModel(TEXT, TEXT, min_value=0, max_value=512)
    scheduler = diffusers.CosineDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500)
    return _quiet(
        diffusers.StableAudioPipeline(
            vae, T5EncoderModel(T5Config(**T5)), projection, _bytes(), transformer, scheduler
        )
    )


def wan() -> diffusers.WanPipeline:
    """Like Wan-AI/Wan2.1-T2V-1.3B-Diffusers."""
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=TEXT,
        freq_dim=16, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    text_encoder = UMT5EncoderModel(UMT5Config(**T5))
    return _quiet(
        diffusers.WanPipeline(_bytes(), text_encoder, vae, scheduler, transformer=transformer)
    )


def flux() -> diffusers.FluxPipeline:
    """Like black-forest-labs/FLUX.1-dev."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        **HEADS, num_single_layers=2, in_channels=16, joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return _quiet(
        diffusers.FluxPipeline(
            scheduler,
            _image_vae(4),
            CLIPTextModel(_clip()),
            _words(),
            T5EncoderModel(T5Config(**T5)),
            _bytes(),
            transformer,
        )
    )


def stable_diffusion_3() -> diffusers.StableDiffusion3Pipeline:
    """Like stabilityai/stable-diffusion-3.5-large."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=8, patch_size=2, in_channels=4, out_channels=4,
        caption_projection_dim=16, joint_attention_dim=2 * TEXT, pooled_projection_dim=2 * TEXT,
    )  # fmt: skip
    clips = [CLIPTextModelWithProjection(_clip()) for _ in range(2)]
    t5 = T5EncoderModel(T5Config(**{**T5, "d_model": 2 * TEXT}))
    return _quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer,
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            _image_vae(4),
            clips[0],
            _words(),
            clips[1],
            _words(),
            t5,
            _bytes(),
        )
    )


def options(description: str, *, steps: int, alpha: float, samples: int) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help=f"solver steps ({steps})")
    parser.add_argument(
        "--alpha", type=float, default=alpha, help=f"largest error of a reuse ({alpha})"
    )
    parser.add_argument(
        "--samples", type=int, default=samples, help=f"samples to calibrate on ({samples})"
    )
    parser.add_argument("--tiny", action="store_true", help="random weights, to try the script out")
    return parser.parse_args()


def open_sora() -> tuple:
    """An STDiT3 of the zoo of benchmarks, and what encodes a list of texts for it."""
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from zoo.layouts import CAPTION_TOKENS, CAPTION_WIDTH, STDiT3

    torch.manual_seed(0)

    def encode(texts: list[str]) -> dict[str, torch.Tensor]:
        shape = (len(texts), 1, CAPTION_TOKENS, CAPTION_WIDTH)
        seed = torch.Generator().manual_seed(len("".join(texts)))
        return {
            "y": torch.randn(shape, generator=seed),
            "mask": torch.ones(len(texts), CAPTION_TOKENS, dtype=torch.long),
        }

    return STDiT3().eval(), encode


def _image_vae(channels: int) -> diffusers.AutoencoderKL:
    """Halves the resolution once."""
    return diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        shift_factor=0.0,
    )  # fmt: skip


def _bytes() -> ByT5Tokenizer:
    """Needs no vocabulary: every byte is a token."""
    return ByT5Tokenizer(extra_ids=0, model_max_length=64)


def _words() -> CLIPTokenizer:
    """Knows no word, which is enough."""
    return CLIPTokenizer(model_max_length=77)


def _clip() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=8, hidden_size=TEXT, intermediate_size=32, projection_dim=TEXT,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=77,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe
