"""Tiny versions of diffusers' transformers, AceStep to Flux."""

from __future__ import annotations

import warnings
from functools import partial

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0
from torch import Tensor, nn

from ._tiny import TinyModel, diffusers_model, grid_ids, named, noise, per_thousand, redraw

_SIDE = 12
_TEXT = 8


def _text(x: Tensor, width: int = 32, length: int = _TEXT) -> Tensor:
    return noise(len(x), length, width)


def _call_ace_step(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(
        hidden_states=x,
        timestep=t / 1000,
        timestep_r=t / 1000,
        encoder_hidden_states=_text(x),
        context_latents=noise(len(x), x.shape[1], 16, seed=2),
        return_dict=False,
    )[0]


def _call_allegro(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    frames, height, width = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
    *frequencies, along_t, along_h, along_w = get_3d_rotary_pos_embed_allegro(
        embed_dim=24,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
        interpolation_scale=(2.2, 2.0, 2.0),
    )
    places = torch.cartesian_prod(along_t.long(), along_h.long(), along_w.long())
    return model(
        hidden_states=x,
        encoder_hidden_states=_text(x),
        encoder_attention_mask=torch.ones(len(x), _TEXT),
        timestep=t,
        image_rotary_emb=(frequencies, tuple(places.T[:, None].contiguous())),
        return_dict=False,
    )[0]


def _call_any_flow(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    timestep = t[:, None].expand(-1, x.shape[1])
    return model(
        hidden_states=x,
        timestep=timestep,
        r_timestep=0.95 * timestep,
        encoder_hidden_states=_text(x),
        return_dict=False,
    )[0]


def _call_any_flow_far(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    timestep = t[:, None].expand(-1, x.shape[1])
    tokens = x.shape[3] * x.shape[4] // 4
    cache = {
        layer: {
            "full_cache": noise(2, len(x), 4, tokens, 16, seed=2 + layer),
            "compressed_cache": torch.zeros(2, len(x), 4, 0, 16),
        }
        for layer in range(3)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without")
        return model(
            hidden_states=x,
            timestep=timestep,
            r_timestep=0.95 * timestep,
            encoder_hidden_states=_text(x),
            chunk_partition=[1, x.shape[1]],
            kv_cache=cache,
            kv_cache_flag={"num_cached_chunks": 1, "is_cache_step": False},
            return_dict=False,
        )[0]


def _build_bria_fibo2() -> nn.Module:
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=4,
        n_refiner_layers=3,
        n_heads=4,
        cap_feat_dim=32,
        injection_layer_ids=(1, 3),
        perceiver_num_layers=2,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(32, 16, 16),
    )
    return redraw(model, "cross_attn_gate")


def _call_chrono_edit(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    condition = noise(len(x), 5, *x.shape[2:], seed=2)
    return model(
        hidden_states=torch.cat([x, condition], dim=1),
        timestep=t,
        encoder_hidden_states=_text(x, length=512),
        encoder_hidden_states_image=noise(len(x), _TEXT, 32, seed=3),
        return_dict=False,
    )[0]


def _video_rope(x: Tensor) -> tuple[Tensor, Tensor]:
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    return get_3d_rotary_pos_embed(
        embed_dim=16,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=x.shape[1],
        device=x.device,
    )


def _build_cog_view(model_class: str, **config: object) -> nn.Module:
    return getattr(diffusers, model_class)(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=32,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=24,
        **config,
    )


def _call_cog_view(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    size = torch.full((len(x), 2), 192.0)
    return model(
        hidden_states=x,
        encoder_hidden_states=_text(x, length=16),
        timestep=t,
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros(len(x), 2),
        return_dict=False,
    )[0]


def _call_consis_id(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(
        hidden_states=torch.cat([x, noise(*x.shape, seed=2)], dim=2),
        encoder_hidden_states=_text(x),
        timestep=t,
        image_rotary_emb=_video_rope(x),
        id_cond=noise(len(x), 24, seed=3),
        id_vit_hidden=[noise(len(x), 6, 16, seed=4), noise(len(x), 6, 16, seed=5)],
        return_dict=False,
    )[0]


def _call_cosmos3(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    batch, _, frames, height, width = x.shape
    grid = (frames, height // 2, width // 2)
    text = torch.arange(_TEXT).expand(3, -1)
    vision = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)
    vision = vision + torch.tensor([[_TEXT + 15000], [0], [0]])
    und_len, per_sample = batch * _TEXT, vision.shape[1]
    of_vision = torch.arange(und_len, und_len + batch * per_sample)
    return torch.cat(
        model(
            input_ids=torch.arange(und_len) % 64,
            text_indexes=torch.arange(und_len),
            position_ids=torch.cat([text.repeat(1, batch), vision.repeat(1, batch)], dim=1),
            und_len=und_len,
            sequence_length=und_len + len(of_vision),
            vision_tokens=list(x.split(1)),
            vision_token_shapes=[grid] * batch,
            vision_sequence_indexes=of_vision,
            vision_mse_loss_indexes=of_vision,
            vision_timesteps=t.repeat_interleave(per_sample),
            vision_noisy_frame_indexes=[torch.arange(frames)] * batch,
            return_dict=False,
        )[0]
    )


def _build_cosmos() -> nn.Module:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        text_embed_dim=32,
        adaln_lora_dim=8,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    return redraw(model, "pos_emb_t", "pos_emb_h", "pos_emb_w")


def _call_cosmos(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(
        hidden_states=x,
        timestep=0.25 * torch.log(0.08 * t),
        encoder_hidden_states=_text(x),
        fps=30,
        return_dict=False,
    )[0]


def _call_dit(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    labels = torch.full((len(x),), 3)
    return model(x, timestep=t.long(), class_labels=labels, return_dict=False)[0][:, : x.shape[1]]


def _build_dream_lite() -> nn.Module:
    model = diffusers.DreamLiteTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=64,
        num_layers=3,
        norm_num_groups=8,
        cross_attention_dim=32,
        use_linear_projection=True,
        qk_norm="rms_norm",
        num_kv_heads=1,
        ff_mult=6,
    )
    for block in model.transformer_blocks:
        block.attn1.set_processor(DreamLiteAttnProcessor2_0())
        block.attn2.set_processor(DreamLiteAttnProcessor2_0())
    return model


def _call_dream_lite(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(x, encoder_hidden_states=_text(x), timestep=t, return_dict=False)[0]


def _call_easy_animate(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(x, t, encoder_hidden_states=_text(x), return_dict=False)[0]


def _build_ernie_image() -> nn.Module:
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=64,
        num_attention_heads=4,
        num_layers=3,
        ffn_hidden_size=192,
        in_channels=8,
        out_channels=8,
        text_in_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    linears = ("adaLN_modulation.1", "final_linear")
    return redraw(model, *(f"{x}.weight" for x in linears), *(f"{x}.bias" for x in linears))


def _text_ids() -> Tensor:
    ids = torch.zeros(_TEXT, 4)
    ids[:, 3] = torch.arange(_TEXT)
    return ids


_TOKENS = (_SIDE * _SIDE, 16)
_DUAL_AND_SINGLE = ("transformer_blocks", "single_transformer_blocks")

MODELS: dict[str, TinyModel] = {
    "AceStepTransformer1DModel": TinyModel(
        build=diffusers_model(
            "AceStepTransformer1DModel",
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            sliding_window=16,
            encoder_hidden_size=32,
        ),
        call=_call_ace_step,
        shape=(256, 8),
        blocks=("layers",),
        note=(
            "Blocks alternate between a sliding-window mask and none. Latents are [length, "
            "channels]; modulation comes from one shared projection, no layer of a block's own."
        ),
    ),
    "AllegroTransformer3DModel": TinyModel(
        build=diffusers_model(
            "AllegroTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=3,
            cross_attention_dim=48,
            sample_height=16,
            sample_width=16,
            sample_frames=2,
            caption_channels=32,
        ),
        call=_call_allegro,
        shape=(4, 2, 16, 16),
        note="norm3 of each block is never called; cross-attention has no norm before it.",
    ),
    "AnyFlowFARTransformer3DModel": TinyModel(
        build=diffusers_model(
            "AnyFlowFARTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=64,
            ffn_dim=192,
            num_layers=3,
            rope_max_seq_len=32,
            chunk_partition=(1, 2),
        ),
        call=_call_any_flow_far,
        shape=(2, 4, 16, 16),
        blocks=("blocks",),
        note=(
            "Denoises a video chunk by chunk. Between chunks, the same blocks run once more to "
            "write keys and values into kv_cache, which they then read at every step: such a call "
            "is no step, returns no sample and must run in full. Block sequences lengthen from "
            "chunk to chunk (keys, values) and the attention writes its cache in place. Also takes "
            "a second, target timestep. Timesteps and modulation are per token."
        ),
    ),
    "AnyFlowTransformer3DModel": TinyModel(
        build=diffusers_model(
            "AnyFlowTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=64,
            ffn_dim=192,
            num_layers=3,
            rope_max_seq_len=32,
        ),
        call=_call_any_flow,
        shape=(3, 4, 16, 16),
        blocks=("blocks",),
        note="Takes a second, target timestep. Timesteps per frame, modulation per token.",
    ),
    "AuraFlowTransformer2DModel": TinyModel(
        build=diffusers_model(
            "AuraFlowTransformer2DModel",
            sample_size=24,
            num_mmdit_layers=3,
            num_single_dit_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=64,
        ),
        call=named(text=(_TEXT, 32), time=per_thousand),
        shape=(4, 24, 24),
        blocks=("joint_transformer_blocks", "single_transformer_blocks"),
        note=(
            "The feed-forward part reads the block's input plus gated attention, but the residual "
            "that it is added to is the block's input: the attention's output enters the stream "
            "only through the feed-forward part, and is lost where that is reused. Joint blocks "
            "return (text, latents)."
        ),
    ),
    "BriaFibo2Transformer2DModel": TinyModel(
        build=_build_bria_fibo2,
        call=named(
            time=per_thousand,
            encoder_hidden_states=lambda x: noise(len(x), 3, _TEXT, 32),
            encoder_attention_mask=None,
            context_latents=None,
        ),
        shape=(4, 24, 24),
        blocks=("noise_refiner", "layers"),
        refiners=("perceiver.layers",),
        note=(
            "noise_refiner sees latents alone, layers also the text that the perceiver condensed. "
            "Only some of the layers have cross-attention, each with a text of its own. The "
            "perceiver takes no timestep, so it repeats its work at every step. A norm follows "
            "each attention and feed-forward part before the gate. In layers, the modulation runs "
            "twice, for noisy and for clean tokens. With padded text, the text tokens move behind "
            "the latents. The pipeline may swap the prompt in mid-run, and runs "
            "the negative prompt as a call of its own, of another length. Starts with the gates of "
            "its cross-attention at zero; they are made random here."
        ),
    ),
    "BriaFiboTransformer2DModel": TinyModel(
        build=diffusers_model(
            "BriaFiboTransformer2DModel",
            in_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            axes_dims_rope=[4, 6, 6],
            text_encoder_dim=16,
        ),
        call=named(
            text=(_TEXT, 32),
            text_encoder_layers=lambda x: [
                noise(len(x), _TEXT, 16, seed=2 + layer) for layer in range(6)
            ],
            txt_ids=lambda x: torch.zeros(_TEXT, 3),
            img_ids=lambda x: grid_ids(_SIDE, _SIDE),
        ),
        shape=_TOKENS,
        blocks=_DUAL_AND_SINGLE,
        note=(
            "Before every block, half of the text's channels are replaced by another layer of the "
            "text encoder, so what a block adds to that half is lost. caption_projection is a "
            "list of projections, one for each block, that all run before the first block."
        ),
    ),
    "BriaTransformer2DModel": TinyModel(
        build=diffusers_model(
            "BriaTransformer2DModel",
            in_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            axes_dims_rope=[4, 6, 6],
        ),
        call=named(
            text=(_TEXT, 32),
            txt_ids=lambda x: torch.zeros(_TEXT, 3),
            img_ids=lambda x: grid_ids(_SIDE, _SIDE),
        ),
        shape=_TOKENS,
        blocks=_DUAL_AND_SINGLE,
        note=(
            "Single blocks join text and latents and part them again: both lists return (text, "
            "latents). Their attention has no output projection, only the block has one."
        ),
    ),
    "ChromaTransformer2DModel": TinyModel(
        build=diffusers_model(
            "ChromaTransformer2DModel",
            in_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=32,
            approximator_hidden_dim=64,
            approximator_layers=2,
        ),
        call=named(
            text=(_TEXT, 32),
            time=per_thousand,
            txt_ids=lambda x: torch.zeros(_TEXT, 3),
            img_ids=lambda x: grid_ids(_SIDE, _SIDE),
            attention_mask=lambda x: torch.ones(len(x), _TEXT + x.shape[1], dtype=torch.bool),
        ),
        shape=_TOKENS,
        blocks=_DUAL_AND_SINGLE,
        refiners=("distilled_guidance_layer.layers",),
        note=(
            "distilled_guidance_layer computes the modulation of all blocks from the timestep in "
            "one go, [batch, entries, width]; it must run at every step. Blocks have no "
            "modulation layers; each is given its slice as temb."
        ),
    ),
    "ChronoEditTransformer3DModel": TinyModel(
        build=diffusers_model(
            "ChronoEditTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=9,
            out_channels=4,
            text_dim=32,
            freq_dim=64,
            ffn_dim=144,
            num_layers=3,
            image_dim=32,
            added_kv_proj_dim=48,
            rope_max_seq_len=32,
        ),
        call=_call_chrono_edit,
        shape=(4, 3, _SIDE, _SIDE),
        blocks=("blocks",),
        note=(
            "The text must have 512 tokens, since cross-attention takes what comes before them for "
            "the image, and attends to that separately. The pipeline may drop frames in mid-run: "
            "sequences get shorter from one step to the next."
        ),
    ),
    "CogVideoXTransformer3DModel": TinyModel(
        build=diffusers_model(
            "CogVideoXTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=32,
            text_embed_dim=32,
            num_layers=3,
            sample_width=16,
            sample_height=16,
            sample_frames=9,
            max_text_seq_length=_TEXT,
            use_rotary_positional_embeddings=True,
        ),
        call=named(text=(_TEXT, 32), image_rotary_emb=lambda x: _video_rope(x)),
        shape=(3, 4, 16, 16),
        note=(
            "Blocks return (latents, text), as does their attention; the feed-forward part runs "
            "once, on text and latents joined. Attention writes into its queries in place."
        ),
    ),
    "CogView3PlusTransformer2DModel": TinyModel(
        build=partial(_build_cog_view, "CogView3PlusTransformer2DModel"),
        call=_call_cog_view,
        shape=(4, 24, 24),
        note=(
            "Blocks return (latents, text), as does their attention; the feed-forward part runs "
            "once, on text and latents joined."
        ),
    ),
    "CogView4Transformer2DModel": TinyModel(
        build=partial(_build_cog_view, "CogView4Transformer2DModel", rope_axes_dim=(16, 16)),
        call=_call_cog_view,
        shape=(4, 24, 24),
        note=(
            "The feed-forward part of a block runs twice in every forward: on latents, then on "
            "text. Blocks return (latents, text), as does their attention, which writes into its "
            "queries and keys in place. Positional arguments."
        ),
    ),
    "ConsisIDTransformer3DModel": TinyModel(
        build=diffusers_model(
            "ConsisIDTransformer3DModel",
            num_attention_heads=3,
            attention_head_dim=16,
            in_channels=8,
            out_channels=4,
            time_embed_dim=32,
            text_embed_dim=32,
            num_layers=6,
            sample_width=16,
            sample_height=16,
            sample_frames=9,
            max_text_seq_length=_TEXT,
            use_rotary_positional_embeddings=True,
            is_train_face=True,
            is_kps=False,
            cross_attn_interval=2,
            cross_attn_dim_head=16,
            cross_attn_num_heads=2,
            LFE_id_dim=24,
            LFE_vit_dim=16,
            LFE_depth=2,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=4,
            LFE_output_dim=32,
            LFE_num_scale=2,
        ),
        call=_call_consis_id,
        shape=(3, 4, 16, 16),
        blocks=("transformer_blocks", "perceiver_cross_attention"),
        refiners=("local_facial_extractor.layers",),
        note=(
            "After every second block, the model itself calls an element of "
            "perceiver_cross_attention, with the face first and the latents second, and adds what "
            "it returns: a branch without a residual of its own. local_facial_extractor.layers is "
            "a list of lists [attention, feed-forward] that takes no timestep."
        ),
    ),
    "Cosmos3OmniTransformer": TinyModel(
        build=diffusers_model(
            "Cosmos3OmniTransformer",
            head_dim=16,
            hidden_size=64,
            intermediate_size=192,
            latent_channel=4,
            num_attention_heads=4,
            num_hidden_layers=3,
            num_key_value_heads=2,
            patch_latent_dim=16,
            rope_axes_dim=(4, 2, 2),
            vocab_size=64,
        ),
        call=_call_cosmos3,
        shape=(4, 2, 16, 16),
        blocks=("layers",),
        note=(
            "No batch axis: all samples are packed into one sequence [tokens, width] and attend to "
            "each other. A layer takes and returns (text, latents), positionally; its attention "
            "has the weights of both, mlp is the text's and mlp_moe_gen the latents'. The text "
            "sees neither latents nor timestep, so its half is the same at every step. lm_head is "
            "never called. Takes and returns lists of latents."
        ),
    ),
    "CosmosTransformer3DModel": TinyModel(
        build=_build_cosmos,
        call=_call_cosmos,
        shape=(4, 2, 16, 16),
        note=(
            "Each block first adds a learned position embedding to its input, so the residual of "
            "the block contains it. All block arguments are positional. Published checkpoints also "
            "concatenate a padding mask to the latents, which needs torchvision and is off here."
        ),
    ),
    "DiTTransformer2DModel": TinyModel(
        build=diffusers_model(
            "DiTTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            sample_size=24,
            num_embeds_ada_norm=10,
        ),
        call=_call_dit,
        shape=(4, 24, 24),
        note=(
            "Every block embeds the raw timestep itself, in norm1. After the last block, the model "
            "calls transformer_blocks[0].norm1.emb once more for the final modulation: the first "
            "block's module, from outside of it. Predicts a variance too."
        ),
    ),
    "DreamLiteTransformer2DModel": TinyModel(
        build=_build_dream_lite,
        call=_call_dream_lite,
        shape=(64, _SIDE, _SIDE),
        note=(
            "Part of a U-Net, no denoiser by itself: the timestep is ignored, and the input is "
            "added to the output. attn1 is None in the stages without self-attention. The U-Net "
            "gives all of its attentions a processor that shares keys and values between heads."
        ),
    ),
    "EasyAnimateTransformer3DModel": TinyModel(
        build=diffusers_model(
            "EasyAnimateTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=16,
            sample_height=16,
            num_layers=3,
            mmdit_layers=3,
            time_embed_dim=32,
            add_norm_text_encoder=True,
            text_embed_dim=32,
        ),
        call=_call_easy_animate,
        shape=(4, 2, 16, 16),
        note=(
            "Blocks return (latents, text), as does their attention, which writes into its queries "
            "and keys in place. Blocks from mmdit_layers on, if there are any, use one "
            "feed-forward part for latents and text and call it twice. Positional arguments."
        ),
    ),
    "ErnieImageTransformer2DModel": TinyModel(
        build=_build_ernie_image,
        call=named(text_bth=lambda x: _text(x), text_lens=lambda x: torch.full((len(x),), _TEXT)),
        shape=(8, _SIDE, _SIDE),
        blocks=("layers",),
        note=(
            "Within blocks the tokens are the first axis and the batch the second, [tokens, batch, "
            "width], latents before text; attention alone is given [batch, tokens, width]. All "
            "blocks share one modulation, a list of six tensors. Starts with modulation and output "
            "projection at zero, so it would predict zeros; they are made random here."
        ),
    ),
    "Flux2Transformer2DModel": TinyModel(
        build=diffusers_model(
            "Flux2Transformer2DModel",
            in_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            timestep_guidance_channels=64,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        call=named(
            text=(_TEXT, 32),
            time=per_thousand,
            guidance=lambda x: torch.full((len(x),), 4.0),
            txt_ids=lambda x: _text_ids().expand(len(x), -1, -1),
            img_ids=lambda x: grid_ids(_SIDE, _SIDE, 4).expand(len(x), -1, -1),
        ),
        shape=_TOKENS,
        blocks=_DUAL_AND_SINGLE,
        note=(
            "In single blocks one projection makes queries, keys, values and MLP, and one output "
            "projection serves both; the feed-forward part is inside the attention module. Blocks "
            "share three modulation layers of the model. Variants with a key-value cache drop the "
            "reference tokens after the first step: sequences get shorter."
        ),
    ),
    "Flux3Transformer2DModel": TinyModel(
        build=diffusers_model(
            "Flux3Transformer2DModel",
            in_channels=16,
            cond_in_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            timestep_channels=64,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        call=named(
            text=(_TEXT, 32),
            time=per_thousand,
            txt_ids=lambda x: _text_ids(),
            img_ids=lambda x: grid_ids(_SIDE, _SIDE, 4),
            image_cond_hidden_states=lambda x: noise(len(x), 16, 16, seed=2),
            image_cond_ids=lambda x: grid_ids(4, 4, 4, plane=10),
        ),
        shape=_TOKENS,
        blocks=("mode_blocks.image", "single_transformer_blocks"),
        refiners=("txt_mode_blocks", "mode_blocks.image_cond"),
        note=(
            "mode_blocks is a dict of lists, whose image_cond runs on the reference image, if "
            "there is one. Refiners are modulated by timestep zero, so they repeat their work at "
            "every step. Attention and feed-forward part of a block are side by side, with one "
            "gate. Single blocks take and return text and latents, (text, latents)."
        ),
    ),
    "FluxTransformer2DModel": TinyModel(
        build=diffusers_model(
            "FluxTransformer2DModel",
            in_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        call=named(
            text=(_TEXT, 32),
            time=per_thousand,
            guidance=lambda x: torch.full((len(x),), 3.5),
            pooled_projections=lambda x: noise(len(x), 32, seed=2),
            txt_ids=lambda x: torch.zeros(_TEXT, 3),
            img_ids=lambda x: grid_ids(_SIDE, _SIDE),
        ),
        shape=_TOKENS,
        blocks=_DUAL_AND_SINGLE,
        note=(
            "Single blocks join text and latents and part them again: both lists return (text, "
            "latents). Their attention has no output projection, only the block has one."
        ),
    ),
}

CANNOT_RUN: dict[str, str] = {}
