"""Tiny versions of the diffusers transformers from GLM-Image to Mochi."""

from __future__ import annotations

import warnings

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.models.transformers.transformer_ideogram4 import (
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
)
from torch import Tensor, nn

from ._tiny import TinyModel, diffusers_model, grid_ids, named, noise, rising


def _text_mask(x: Tensor, tokens: int) -> Tensor:
    """A mask of the text [batch, tokens] whose last quarter is padding."""
    mask = torch.ones(len(x), tokens, dtype=torch.long)
    mask[:, tokens - tokens // 4 :] = 0
    return mask


def _grid(*sizes: int) -> Tensor:
    """Coordinates [cells, axes] of a grid's cells in row-major order."""
    axes = torch.meshgrid(*[torch.arange(size) for size in sizes], indexing="ij")
    return torch.stack(axes, dim=-1).flatten(0, -2)


def _call_glm(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    prior = (torch.arange(64) % 16).expand(len(x), -1)
    return model(
        hidden_states=x,
        encoder_hidden_states=noise(len(x), 6, 16),
        prior_token_id=prior,
        prior_token_drop=torch.zeros_like(prior, dtype=torch.bool),
        timestep=t - 1,
        target_size=torch.tensor([[128.0, 128.0]]).repeat(len(x), 1),
        crop_coords=torch.zeros(len(x), 2),
        return_dict=False,
    )[0]


def _call_helios(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    frames = torch.arange(16 + 2 + 2 + 4).expand(len(x), -1)
    long, mid, short, current = frames.split([16, 2, 2, 4], dim=1)
    return model(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=noise(len(x), 6, 16),
        indices_hidden_states=current,
        indices_latents_history_short=short,
        indices_latents_history_mid=mid,
        indices_latents_history_long=long,
        latents_history_short=noise(len(x), 4, 2, 8, 8, seed=2),
        latents_history_mid=noise(len(x), 4, 2, 8, 8, seed=3),
        latents_history_long=noise(len(x), 4, 16, 8, 8, seed=4),
        return_dict=False,
    )[0]


def _call_hidream(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(
        hidden_states=x,
        timesteps=t,
        encoder_hidden_states_t5=noise(len(x), 4, 16),
        encoder_hidden_states_llama3=noise(4, len(x), 4, 16, seed=2),
        pooled_embeds=noise(len(x), 16, seed=3),
        return_dict=False,
    )[0]


def _build_hunyuan_image() -> nn.Module:
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=2,
        patch_size=(1, 1),
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
    )
    model.context_embedder_2 = type(model.context_embedder_2)(16, 32, 32)  # else 2048 wide
    return model


def _build_hunyuan_video_15() -> nn.Module:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_refiner_layers=2,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    )
    model.context_embedder_2 = type(model.context_embedder_2)(16, 32, 32)  # else 2048 wide
    return model


def _call_hunyuan_video_15(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    no_image = torch.zeros_like(x)
    return model(
        hidden_states=torch.cat([x, no_image, no_image[:, :1]], dim=1),
        image_embeds=torch.zeros(len(x), 4, 16),
        timestep=t,
        encoder_hidden_states=noise(len(x), 8, 16),
        encoder_attention_mask=_text_mask(x, 8),
        encoder_hidden_states_2=noise(len(x), 4, 16, seed=2),
        encoder_attention_mask_2=_text_mask(x, 4),
        return_dict=False,
    )[0]


def _call_framepack(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    first, window, before, half, quarter = torch.arange(1 + 4 + 1 + 2 + 16).split([1, 4, 1, 2, 16])
    return model(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=noise(len(x), 8, 16),
        encoder_attention_mask=_text_mask(x, 8),
        pooled_projections=noise(len(x), 16, seed=2),
        image_embeds=noise(len(x), 4, 16, seed=3),
        indices_latents=window,
        guidance=torch.full((len(x),), 6000.0),
        latents_clean=noise(len(x), 4, 2, 8, 8, seed=4),
        indices_latents_clean=torch.cat([first, before]),
        latents_history_2x=noise(len(x), 4, 2, 8, 8, seed=5),
        indices_latents_history_2x=half,
        latents_history_4x=noise(len(x), 4, 16, 8, 8, seed=6),
        indices_latents_history_4x=quarter,
        return_dict=False,
    )[0]


def _call_hunyuan_dit(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    predicted = model(
        x,
        t,
        encoder_hidden_states=noise(len(x), 4, 16),
        text_embedding_mask=_text_mask(x, 4),
        encoder_hidden_states_t5=noise(len(x), 8, 16, seed=2),
        text_embedding_mask_t5=_text_mask(x, 8),
        image_meta_size=torch.tensor([[128.0, 128.0, 128.0, 128.0, 0.0, 0.0]]).repeat(len(x), 1),
        style=torch.zeros(len(x), dtype=torch.long),
        image_rotary_emb=get_2d_rotary_pos_embed(16, ((0, 0), (8, 8)), (8, 8), output_type="pt"),
        return_dict=False,
    )[0]
    return predicted.chunk(2, dim=1)[0]


def _call_ideogram(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    batch, padding, text, image = len(x), 2, 6, 64
    places = torch.cat(
        [
            torch.zeros(padding, 3, dtype=torch.long),
            torch.arange(text)[:, None].expand(text, 3),
            torch.cat([torch.zeros(image, 1, dtype=torch.long), _grid(8, 8)], dim=1) + 65536,
        ]
    )
    lengths = torch.tensor([padding, text, image])
    roles = torch.tensor([0, LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR])
    segments = torch.tensor([-1, 1, 1])
    predicted = model(
        hidden_states=torch.cat([torch.zeros(batch, padding + text, x.shape[-1]), x], dim=1),
        timestep=1 - t / 1000,
        encoder_hidden_states=noise(batch, padding + text + image, 16),
        position_ids=places.expand(batch, -1, -1),
        segment_ids=segments.repeat_interleave(lengths).expand(batch, -1),
        indicator=roles.repeat_interleave(lengths).expand(batch, -1),
        return_dict=False,
    )[0]
    return predicted[:, padding + text :]


def _call_joy_image_edit(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    picture = noise(len(x), 1, *x.shape[1:], seed=2)
    return model(
        hidden_states=torch.cat([picture, x[:, None]], dim=1),
        timestep=t,
        encoder_hidden_states=noise(len(x), 6, 16),
        return_dict=False,
    )[0][:, -1]


def _call_joy_image_edit_plus(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    picture = noise(len(x), 4 * 8, *x.shape[2:], seed=2)
    return model(
        hidden_states=torch.cat([x, picture], dim=1),
        timestep=t,
        encoder_hidden_states=noise(len(x), 8, 16),
        encoder_hidden_states_mask=_text_mask(x, 8),
        shape_list=[[(1, 8, 8), (1, 4, 8)]] * len(x),
        return_dict=False,
    )[0][:, : x.shape[1]]


def _build_kandinsky_5() -> nn.Module:
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=32,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=128,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
        visual_cond=True,
    )
    for name, module in model.named_modules():
        if name.endswith("modulation.out_layer"):
            module.reset_parameters()  # they start at zero, which shuts every block's gates
    return model


def _call_kandinsky_5(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    no_picture = torch.zeros_like(x)
    return model(
        hidden_states=torch.cat([x, no_picture, no_picture[..., :1]], dim=-1),
        encoder_hidden_states=noise(len(x), 6, 16),
        pooled_projections=noise(len(x), 8, seed=2),
        timestep=t,
        visual_rope_pos=[torch.arange(4), torch.arange(4), torch.arange(4)],
        text_rope_pos=torch.arange(6),
        scale_factor=(1.0, 2.0, 2.0),
        sparse_params=None,
        return_dict=True,
    ).sample


def _call_kandinsky_6(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    no_picture = torch.zeros_like(x)
    return model(
        hidden_states=torch.cat([x, no_picture, no_picture[..., :1]], dim=-1),
        audio_hidden_states=noise(len(x), 12, 4, seed=3),
        encoder_hidden_states=noise(len(x), 6, 16),
        pooled_projections=noise(len(x), 8, seed=2),
        timestep=t,
        return_dict=False,
    )[0]


def _call_kandinsky_6_sr(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    no_anchor = torch.zeros_like(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return model(
            hidden_states=torch.cat([x, no_anchor, no_anchor[..., :1]], dim=-1),
            timestep=t,
            return_dict=False,
        )[0]


def _call_krea_2(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    image_places = grid_ids(8, 8)
    return model(
        hidden_states=x,
        encoder_hidden_states=noise(len(x), 8, 3, 16),
        timestep=t / 1000,
        position_ids=torch.cat([torch.zeros(8, 3), image_places]),
        encoder_attention_mask=_text_mask(x, 8).bool(),
        return_dict=False,
    )[0]


def _call_ltx_2(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    text_mask = _text_mask(x, 8)
    return model(
        hidden_states=x,
        audio_hidden_states=noise(len(x), 12, 8, seed=2),
        encoder_hidden_states=noise(len(x), 8, 16),
        audio_encoder_hidden_states=noise(len(x), 8, 16, seed=3),
        timestep=t,
        sigma=t,
        encoder_attention_mask=text_mask,
        audio_encoder_attention_mask=text_mask,
        num_frames=2,
        height=4,
        width=8,
        fps=24.0,
        audio_num_frames=12,
        isolate_modalities=False,
        return_dict=False,
    )[0]


def _call_latte(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    predicted = model(
        hidden_states=x,
        encoder_hidden_states=noise(len(x), 6, 16),
        timestep=t,
        enable_temporal_attentions=True,
        return_dict=False,
    )[0]
    return predicted.chunk(2, dim=1)[0]


def _build_longcat_audio() -> nn.Module:
    model = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32,
        dit_depth=3,
        dit_heads=2,
        dit_text_dim=16,
        latent_dim=8,
    )
    for zero in (model.adaln_global_mlp.mlp[-1], model.norm_out.linear, model.proj_out):
        zero.reset_parameters()  # else the prediction is zero whatever the blocks do
    return model


def _call_longcat_audio(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(
        hidden_states=x,
        encoder_hidden_states=noise(len(x), 8, 16),
        encoder_attention_mask=_text_mask(x, 8).bool(),
        timestep=t / 1000,
        attention_mask=torch.ones(x.shape[:2], dtype=torch.bool),
        latent_cond=torch.zeros_like(x),
    ).sample


def _call_longcat_image(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    text_places = torch.arange(8)[:, None] * torch.tensor([[0, 1, 1]])
    return model(
        hidden_states=x,
        timestep=t / 1000,
        guidance=None,
        encoder_hidden_states=noise(len(x), 8, 16),
        txt_ids=text_places,
        img_ids=torch.cat([torch.ones(64, 1), _grid(8, 8) + 8], dim=1),
        return_dict=False,
    )[0]


def _call_minimax_h3(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    text, audio, video = torch.arange(6 + 8 + 64).split([6, 8, 64])
    places = torch.zeros(78, 3)
    places[text, 0] = torch.arange(6.0)
    places[audio, 0] = 6 + torch.arange(8.0) / 2
    places[video] = _grid(4, 4, 4) + torch.tensor([6.0, 0.0, 0.0])
    modality = torch.arange(3).repeat_interleave(torch.tensor([6, 8, 64]))
    time = 1 - t[:1] / 1000  # one for the whole batch: the rows of the packed sequence have times
    return model(
        hidden_states=x,
        audio_hidden_states=noise(len(x), 8, 4, seed=2),
        encoder_hidden_states=noise(len(x), 6, 16),
        timestep=torch.cat([time, time.square()]),
        timestep_indices=(modality == 1).long(),
        token_tags=modality,
        position_ids=places,
        video_indices=video,
        audio_indices=audio,
        text_indices=text,
        return_dict=False,
    )[0]


def _call_mochi(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype")
        return model(
            hidden_states=x,
            encoder_hidden_states=noise(len(x), 8, 16),
            timestep=t,
            encoder_attention_mask=_text_mask(x, 8).bool(),
            return_dict=False,
        )[0]


CANNOT_RUN: dict[str, str] = {}

MODELS: dict[str, TinyModel] = {
    "GlmImageTransformer2DModel": TinyModel(
        build=diffusers_model(
            "GlmImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=32,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=16,
        ),
        call=_call_glm,
        shape=(4, 16, 16),
        note="A block calls its one `ff` twice, on the image and on the text; with input images "
        "the pipeline calls the model before the loop to fill `kv_caches` that all steps read.",
    ),
    "HeliosTransformer3DModel": TinyModel(
        build=diffusers_model(
            "HeliosTransformer3DModel",
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=64,
            num_layers=3,
            rope_dim=(4, 6, 6),
        ),
        call=_call_helios,
        shape=(4, 4, 8, 8),
        blocks=("blocks",),
        note="Tokens of past frames come before those of the latents: their timestep is always 0, "
        "and `attn2` skips them. The pipeline runs the denoising loop once for every chunk.",
    ),
    "HiDreamImageTransformer2DModel": TinyModel(
        build=diffusers_model(
            "HiDreamImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[16, 16],
            text_emb_dim=16,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(16, 16),
            llama_layers=[0, 1, 2, 3, 3, 3],
        ),
        call=_call_hidream,
        shape=(4, 16, 16),
        blocks=("double_stream_blocks", "single_stream_blocks"),
        note="Every element wraps the block as `.block`; the model cuts off part of a block's "
        "output and appends other text for the next; experts get as many tokens as are routed to "
        "them, also none. `timesteps`, not `timestep`.",
    ),
    "HunyuanImageTransformer2DModel": TinyModel(
        build=_build_hunyuan_image,
        call=named(
            text=(8, 16),
            timestep_r=None,
            guidance=None,
            encoder_attention_mask=lambda x: _text_mask(x, 8),
            encoder_hidden_states_2=lambda x: noise(len(x), 4, 16, seed=2),
            encoder_attention_mask_2=lambda x: _text_mask(x, 4),
        ),
        shape=(8, 8, 8),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        refiners=("context_embedder.token_refiner.refiner_blocks",),
        note="The refiner takes the timestep.",
    ),
    "HunyuanVideo15Transformer3DModel": TinyModel(
        build=_build_hunyuan_video_15,
        call=_call_hunyuan_video_15,
        shape=(4, 2, 8, 8),
        refiners=("context_embedder.token_refiner.refiner_blocks",),
        note="The refiner takes the timestep.",
    ),
    "HunyuanVideoFramepackTransformer3DModel": TinyModel(
        build=diffusers_model(
            "HunyuanVideoFramepackTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            num_single_layers=3,
            num_refiner_layers=2,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
            has_image_proj=True,
            image_proj_dim=16,
            has_clean_x_embedder=True,
        ),
        call=_call_framepack,
        shape=(4, 4, 8, 8),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        refiners=("context_embedder.token_refiner.refiner_blocks",),
        note="Tokens of past frames come before those of the latents; padding of the text is cut "
        "off with a batch of 1 and masked otherwise. The refiner takes the timestep. The pipeline "
        "runs the denoising loop once for every section.",
    ),
    "HunyuanVideoTransformer3DModel": TinyModel(
        build=diffusers_model(
            "HunyuanVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            num_single_layers=3,
            num_refiner_layers=2,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        call=named(
            text=(8, 16),
            encoder_attention_mask=lambda x: _text_mask(x, 8),
            pooled_projections=lambda x: noise(len(x), 16, seed=2),
            guidance=lambda x: torch.full((len(x),), 6000.0),
        ),
        shape=(4, 4, 8, 8),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        refiners=("context_embedder.token_refiner.refiner_blocks",),
        note="The refiner takes the timestep.",
    ),
    "HunyuanDiT2DModel": TinyModel(
        build=diffusers_model(
            "HunyuanDiT2DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            patch_size=2,
            sample_size=16,
            hidden_size=32,
            num_layers=8,
            mlp_ratio=4.3637,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            text_len=4,
            text_len_t5=8,
            use_style_cond_and_image_meta_size=False,
        ),
        call=_call_hunyuan_dit,
        shape=(4, 16, 16),
        blocks=("blocks",),
        note="A U inside one list: blocks after the middle one take the output of a block before "
        "it as `skip`, the last in first out.",
    ),
    "Ideogram4Transformer2DModel": TinyModel(
        build=diffusers_model(
            "Ideogram4Transformer2DModel",
            in_channels=8,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=16,
            mrope_section=(4, 2, 2),
        ),
        call=_call_ideogram,
        shape=(64, 8),
        blocks=("layers",),
        note="One stream of padding, text and image. The pipeline has a second model of this "
        "class for the unconditional prediction, which sees the image tokens alone.",
    ),
    "JoyImageEditPlusTransformer3DModel": TinyModel(
        build=diffusers_model(
            "JoyImageEditPlusTransformer3DModel",
            patch_size=[1, 2, 2],
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=16,
            num_layers=3,
            rope_dim_list=[4, 6, 6],
        ),
        call=_call_joy_image_edit_plus,
        shape=(64, 4, 1, 2, 2),
        blocks=("double_blocks",),
        note="Latents are patches [batch, patches, channels, 1, 2, 2], pictures to edit after the "
        "target; the pipeline writes those back into the latents in place at every step.",
    ),
    "JoyImageEditTransformer3DModel": TinyModel(
        build=diffusers_model(
            "JoyImageEditTransformer3DModel",
            patch_size=[1, 2, 2],
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=16,
            num_layers=3,
            rope_dim_list=[4, 6, 6],
        ),
        call=_call_joy_image_edit,
        shape=(4, 1, 16, 16),
        blocks=("double_blocks",),
        note="The latents have 6 axes, the pictures to edit before the target; the pipeline "
        "writes those back into the latents in place at every step.",
    ),
    "Kandinsky5Transformer3DModel": TinyModel(
        build=_build_kandinsky_5,
        call=_call_kandinsky_5,
        shape=(4, 8, 8, 4),
        blocks=("visual_transformer_blocks",),
        refiners=("text_transformer_blocks",),
        note="Channels last. The blocks on the text take the timestep. Queries and keys are "
        "rounded to bfloat16 whatever the model's dtype. The pipeline writes the new latents into "
        "the same tensor at every step.",
    ),
    "Kandinsky6SRTransformer3DModel": TinyModel(
        build=diffusers_model(
            "Kandinsky6SRTransformer3DModel",
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=32,
            model_dim=32,
            ff_dim=128,
            num_visual_blocks=3,
            axes_dims=(4, 6, 6),
            nabla_window=(1, 1, 1),
        ),
        call=_call_kandinsky_6_sr,
        shape=(2, 16, 8, 4),
        blocks=("visual_transformer_blocks",),
        note="Channels last; flex attention under a block mask that is made of every step's "
        "queries and keys. The pipeline runs the denoising loop once for every group of tiles.",
    ),
    "Kandinsky6Transformer3DModel": TinyModel(
        build=diffusers_model(
            "Kandinsky6Transformer3DModel",
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=32,
            model_dim=32,
            ff_dim=128,
            num_text_blocks=2,
            num_visual_blocks=3,
            axes_dims=(4, 6, 6),
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        call=_call_kandinsky_6,
        shape=(4, 8, 8, 4),
        blocks=("visual_transformer_blocks",),
        refiners=("video_text_transformer_blocks", "audio_text_transformer_blocks"),
        note="Channels last. A block calls the attentions and feed-forwards inside its children "
        "`video_dec_block` and `audio_dec_block`, which have no forward and are never called. "
        "Returns video and audio. The blocks on the text take the timestep.",
    ),
    "Krea2Transformer2DModel": TinyModel(
        build=diffusers_model(
            "Krea2Transformer2DModel",
            in_channels=8,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            timestep_embed_dim=32,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            axes_dims_rope=(4, 6, 6),
        ),
        call=_call_krea_2,
        shape=(64, 8),
        refiners=("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks"),
        note="Attention of the layerwise blocks runs over layers of the text encoder, with "
        "batch x text tokens as its batch. No timestep reaches the text.",
    ),
    "LTX2VideoTransformer3DModel": TinyModel(
        build=diffusers_model(
            "LTX2VideoTransformer3DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=3,
            caption_channels=16,
            rope_type="split",
        ),
        call=_call_ltx_2,
        shape=(64, 8),
        note="Six attentions and two feed-forwards in a block, for video and audio; returns both. "
        "With `isolate_modalities` the two attentions between them are not called, and the "
        "pipeline makes up to three calls a step with batches of different size.",
    ),
    "LTXVideoTransformer3DModel": TinyModel(
        build=diffusers_model(
            "LTXVideoTransformer3DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=16,
        ),
        call=named(
            text=(8, 16),
            encoder_attention_mask=lambda x: _text_mask(x, 8),
            num_frames=2,
            height=4,
            width=8,
            rope_interpolation_scale=(8 / 25, 32, 32),
        ),
        shape=(64, 8),
    ),
    "LatteTransformer3DModel": TinyModel(
        build=diffusers_model(
            "LatteTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=16,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=16,
            video_length=4,
        ),
        call=_call_latte,
        shape=(4, 4, 16, 16),
        blocks=("transformer_blocks", "temporal_transformer_blocks"),
        note="Spatial and temporal blocks take turns; the first see batch x frames as their "
        "batch, the second batch x patches and have no cross-attention.",
    ),
    "LongCatAudioDiTTransformer": TinyModel(
        build=_build_longcat_audio,
        call=_call_longcat_audio,
        shape=(64, 8),
        blocks=("blocks",),
        note="The rotary embedding is kept between calls by an lru_cache on a method.",
    ),
    "LongCatImageTransformer2DModel": TinyModel(
        build=diffusers_model(
            "LongCatImageTransformer2DModel",
            in_channels=8,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 6, 6],
        ),
        call=_call_longcat_image,
        shape=(64, 8),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        note="Blocks return the text first, then the image.",
    ),
    "Lumina2Transformer2DModel": TinyModel(
        build=diffusers_model(
            "Lumina2Transformer2DModel",
            sample_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            num_layers=3,
            num_refiner_layers=3,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(32, 16, 16),
            cap_feat_dim=16,
        ),
        call=named(text=(8, 16), time=rising, encoder_attention_mask=lambda x: _text_mask(x, 8)),
        shape=(4, 16, 16),
        blocks=("noise_refiner", "layers"),
        refiners=("context_refiner",),
        note="`noise_refiner` works on the latents alone, `layers` on text and latents.",
    ),
    "MiniMaxH3Transformer3DModel": TinyModel(
        build=diffusers_model(
            "MiniMaxH3Transformer3DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            num_layers=3,
            num_refiner_layers=2,
            ffn_dim=64,
            in_channels=2,
            audio_in_channels=4,
            text_dim=16,
            freq_dim=32,
            time_embed_hidden_dim=32,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        call=_call_minimax_h3,
        shape=(64, 8),
        refiners=("token_refiner.refiner_blocks",),
        note="`timestep` holds the distinct times in the sequence, not one for every sample, and "
        "their number can change between steps. Returns video and audio.",
    ),
    "MiniMaxMusic3Transformer1DModel": TinyModel(
        build=diffusers_model(
            "MiniMaxMusic3Transformer1DModel",
            in_channels=8,
            condition_dim=16,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=16,
            ff_inner_dim=64,
            rotary_dim=8,
            fourier_embedding_dim=32,
        ),
        call=named(time=rising, encoder_hidden_states=lambda x: noise(len(x), x.shape[-1], 16)),
        shape=(8, 64),
        note="The timestep is a token before the latents, nothing is modulated; the feed-forward "
        "is two layers of the block itself, no module of its own.",
    ),
    "MochiTransformer3DModel": TinyModel(
        build=diffusers_model(
            "MochiTransformer3DModel",
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=32,
            max_sequence_length=8,
        ),
        call=_call_mochi,
        shape=(4, 4, 8, 8),
        note="Attention runs sample by sample without the padding; the last block leaves the text "
        "as it is.",
    ),
}
