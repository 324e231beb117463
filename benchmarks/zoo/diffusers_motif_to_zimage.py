"""Tiny models of the transformer classes of diffusers, from MotifVideo to ZImage."""

from __future__ import annotations

import functools
import warnings

import diffusers
import torch
from torch import Tensor, nn

from ._tiny import TinyModel, diffusers_model, grid_ids, named, noise, per_thousand, redraw


def _mask(x: Tensor, length: int) -> Tensor:
    return torch.ones(len(x), length, dtype=torch.bool)


def _call_motif_video(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    condition = noise(len(x), 5, *x.shape[2:], seed=1)
    return model(
        hidden_states=torch.cat((x, condition), dim=1),
        timestep=t,
        encoder_hidden_states=noise(len(x), 8, 32, seed=2),
        encoder_attention_mask=_mask(x, 8),
        return_dict=False,
    )[0]


def _build_nucleus() -> nn.Module:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=7,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        num_experts=8,
        moe_intermediate_dim=32,
        capacity_factors=2.0,
    )
    return redraw(model, "experts.gate_up_proj", "experts.down_proj")


def _call_omnigen(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    text, tokens = 8, x.shape[-2] * x.shape[-1] // 4
    length = text + 1 + tokens
    attended = torch.ones(length, length)
    attended[: text + 1] = attended[: text + 1].tril()
    return model(
        hidden_states=x,
        timestep=1 - t / 1000,
        input_ids=torch.arange(1, 1 + text).expand(len(x), -1),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=attended.expand(len(x), -1, -1),
        position_ids=torch.arange(length).expand(len(x), -1),
        return_dict=False,
    )[0]


def _build_prx() -> nn.Module:
    model = diffusers.PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=32,
        hidden_size=48,
        num_heads=2,
        depth=3,
        axes_dim=[12, 12],
    )
    return redraw(model, "modulation.lin.weight", "modulation.lin.bias")


def _call_pixart(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    sample = model(
        x,
        encoder_hidden_states=noise(len(x), 8, 32),
        encoder_attention_mask=_mask(x, 8),
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return sample.chunk(2, dim=1)[0]


def _call_prior(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(
        x,
        timestep=t,
        proj_embedding=noise(len(x), 32, seed=1),
        encoder_hidden_states=noise(len(x), 77, 32, seed=2),
        attention_mask=_mask(x, 77),
    ).predicted_image_embedding


def _call_qwen_image_21(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    text, slots = 8, x.shape[1] // 4
    sample = model(
        hidden_states=x,
        timestep=t / 1000,
        encoder_hidden_states=noise(len(x), text, 32),
        encoder_hidden_states_mask=_mask(x, text),
        img_shapes=[[(1, 8, 8)]] * len(x),
        img_mask=torch.cat((~_mask(x, text), _mask(x, slots)), dim=1),
        return_dict=False,
    )[0]
    return sample[:, -x.shape[1] :]


def _call_rfd4(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.transformers.transformer_rfd4_proteina import CONDITION_KEYS

    batch, tokens = x.shape[:2]
    time = 1 - t / 1000
    chains = (torch.arange(tokens) >= tokens // 2).long().expand(batch, -1)
    atoms = torch.zeros(batch, tokens, 37)
    unconditioned = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal_coord")
    distances = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
    output = model(
        bb_ca=x[..., :3],
        local_latents=x[..., 3:],
        bb_ca_time=time,
        local_latents_time=time,
        padding_mask=_mask(x, tokens),
        token_type=torch.zeros(batch, tokens, dtype=torch.long),
        atom37_mask=torch.ones(batch, tokens, 37, dtype=torch.bool),
        conditioning={
            **{CONDITION_KEYS[name]: atoms for name in unconditioned},
            CONDITION_KEYS["index_group"]: chains,
            "molecule_iid": chains,
            "molecule_entity_id": chains,
            "token_bond_path_length": distances.expand(batch, -1, -1),
            "is_in_context_conditioning": ~_mask(x, tokens),
            "supports_local_latent": _mask(x, tokens),
        },
        recycle_depth=2,
    )
    return torch.cat((output.backbone, output.local_latents), dim=-1)


def _call_sana(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(
        x,
        encoder_hidden_states=noise(len(x), 8, 32),
        encoder_attention_mask=_mask(x, 8),
        timestep=t,
        return_dict=False,
    )[0]


def _call_refiner(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    size = {"height": 4, "width": 4, "device": x.device, "fps": 16.0}
    rotary = functools.partial(model.build_rotary_emb_for_absolute_positions, len(x), **size)
    cache = SanaWMRefinerKVCache(len(model.transformer_blocks))
    cache.sink_pe = rotary([0])
    for layer in cache.layer_caches:
        layer.store_sink(noise(len(x), 16, 48, seed=1), noise(len(x), 16, 48, seed=2))
        layer.store_history(noise(len(x), 32, 48, seed=3), noise(len(x), 32, 48, seed=4))
    return model(
        hidden_states=x,
        encoder_hidden_states=noise(len(x), 8, 32, seed=5),
        timestep=t[:, None].expand(-1, x.shape[1]),
        video_rotary_emb=rotary([3, 4, 5, 6]),
        encoder_attention_mask=_mask(x, 8),
        kv_cache=cache,
        kv_cache_mode="inject",
        return_dict=False,
    )[0]


def _build_sana_wm() -> nn.Module:
    model = diffusers.SanaWMTransformer3DModel(
        in_channels=8,
        num_layers=6,
        hidden_size=64,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=32,
        chunk_plucker_channels=12,
        caption_channels=32,
    )
    return redraw(model, "conv_k.weight", "conv_k_cam.weight", "plucker_embedder.proj.weight")


def _call_sana_wm(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    batch, _, frames, height, width = x.shape
    poses = torch.eye(4).repeat(frames, 1, 1)
    poses[:, 2, 3] = torch.arange(frames) / 10
    intrinsics = torch.tensor([width, height, width / 2, height / 2]).repeat(frames, 1)
    times = t[:, None, None].repeat(1, 1, frames)
    times[:, :, 0] = 0
    return model(
        x,
        times,
        noise(batch, 1, 8, 32, seed=1),
        mask=_mask(x, 8),
        camera_conditions=torch.cat((poses.flatten(1), intrinsics), dim=1).repeat(batch, 1, 1),
        chunk_plucker=noise(batch, 12, frames, height, width, seed=2),
        return_dict=False,
    )[0]


_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 128,
    "rope_max_seq_len": 32,
}


_call_wan = named(text=(8, 32))


def _call_wan_animate(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    batch, channels, frames, height, width = x.shape
    reference = noise(batch, channels + 4, frames, height, width, seed=1)
    return model(
        hidden_states=torch.cat((x, reference), dim=1),
        timestep=t,
        encoder_hidden_states=noise(batch, 512, 32, seed=2),
        encoder_hidden_states_image=noise(batch, 8, 32, seed=3),
        pose_hidden_states=noise(batch, channels, frames - 1, height, width, seed=4),
        face_pixel_values=noise(batch, 3, 4 * (frames - 1) - 3, 16, 16, seed=5),
        return_dict=False,
    )[0]


def _build_wan_animate_2() -> nn.Module:
    model = diffusers.WanAnimate2Transformer3DModel(
        text_len=16,
        in_dim=12,
        dim=48,
        ffn_dim=128,
        freq_dim=32,
        text_dim=32,
        out_dim=4,
        num_heads=2,
        num_layers=3,
    )
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore", DeprecationWarning)
        model.block_masks[3, 16] = model.create_mask(3, 16, torch.device("cpu"))
    return model


def _call_wan_animate_2(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    batch, channels, frames, height, width = x.shape
    rows, columns = height // 2, width // 2
    cache = WanAnimate2KVCache(len(model.blocks))
    for layer in cache.layer_caches:
        shape = (batch, (frames - 1) * rows * columns, 2, 24)
        layer.store(noise(*shape, seed=1), noise(*shape, seed=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        sample = model(
            list(x),
            timestep=t,
            encoder_hidden_states=list(noise(batch, 8, 32, seed=3)),
            encoder_hidden_states_image=noise(batch, 8, 1280, seed=4),
            condition_latents=list(noise(batch, channels + 4, frames, height, width, seed=5)),
            kv_cache=cache,
            kv_cache_mode="cached",
            seq_len=frames * rows * columns,
            reference_grid_sizes=torch.tensor([[frames - 1, rows, columns]] * batch),
            origin_len=4 * (frames - 1) - 3,
            origin_area=[8 * height, 8 * width],
        ).sample
    return torch.stack(sample)


def _call_stable_audio(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rotary = get_1d_rotary_pos_embed(
        8, x.shape[-1] + 1, use_real=True, repeat_interleave_real=False
    )
    return model(
        x,
        t / 1000,
        encoder_hidden_states=noise(len(x), 8, 32, seed=1),
        global_hidden_states=noise(len(x), 1, 64, seed=2),
        rotary_embedding=rotary,
        return_dict=False,
    )[0]


def _call_transformer_2d(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    labels = torch.arange(len(x))
    sample = model(x, timestep=t, class_labels=labels, return_dict=False)[0]
    return sample.chunk(2, dim=1)[0]


def _call_temporal(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    frames = x.transpose(1, 2).flatten(0, 1)
    sample = model(frames, timestep=t, num_frames=x.shape[2], return_dict=False)[0]
    return sample.unflatten(0, (len(x), -1)).transpose(1, 2)


def _call_z_image(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    sample = model(
        list(x.unsqueeze(2)),
        1 - t / 1000,
        list(noise(len(x), 16, 32)),
        return_dict=False,
    )[0]
    return torch.stack(sample).squeeze(2)


_PICTURE = (4, 16, 16)
_TOKENS = (64, 16)
_VIDEO = (4, 4, 8, 8)
_BLOCKS = ("transformer_blocks",)
_BOTH = ("transformer_blocks", "single_transformer_blocks")

MODELS: dict[str, TinyModel] = {
    "MotifVideoTransformer3DModel": TinyModel(
        build=diffusers_model(
            "MotifVideoTransformer3DModel",
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=3,
            num_single_layers=6,
            num_decoder_layers=3,
            text_embed_dim=32,
            rope_axes_dim=(8, 8, 8),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        call=_call_motif_video,
        shape=_VIDEO,
        blocks=_BOTH,
        note="the last num_decoder_layers single blocks take the patches anew as latents and "
        "what the other blocks made of them as text; cross_attn reads the output of attn",
    ),
    "NucleusMoEImageTransformer2DModel": TinyModel(
        build=_build_nucleus,
        call=named(
            text=(8, 32),
            time=per_thousand,
            encoder_hidden_states_mask=lambda x: _mask(x, 8),
            img_shapes=lambda x: [(1, 8, 8)] * len(x),
        ),
        shape=_TOKENS,
        note="img_mlp is a FeedForward or, from the fourth block to the last but one, a mixture "
        "of experts that takes three tensors, the timestep embedding among them; experts are "
        "bare parameters over uninitialised memory, drawn here",
    ),
    "OmniGenTransformer2DModel": TinyModel(
        build=diffusers_model(
            "OmniGenTransformer2DModel",
            hidden_size=48,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=128,
            num_layers=3,
            pad_token_id=0,
            vocab_size=32,
            rope_scaling={"short_factor": [1.0] * 12, "long_factor": [1.0] * 12},
            pos_embed_max_size=16,
            time_step_dim=32,
        ),
        call=_call_omnigen,
        shape=_PICTURE,
        blocks=("layers",),
        note="text, one token of the timestep and latents are one sequence; blocks are not "
        "modulated by the timestep; guidance branches are one batch",
    ),
    "OvisImageTransformer2DModel": TinyModel(
        build=diffusers_model(
            "OvisImageTransformer2DModel",
            in_channels=16,
            out_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        call=named(
            text=(8, 32),
            time=per_thousand,
            txt_ids=lambda x: torch.zeros(8, 3),
            img_ids=lambda x: grid_ids(8, 8),
        ),
        shape=_TOKENS,
        blocks=_BOTH,
        note="blocks return (text, latents); the single attn returns one tensor, not yet "
        "projected, and proj_mlp, act_mlp and proj_out lie loose in the single blocks",
    ),
    "PRXTransformer2DModel": TinyModel(
        build=_build_prx,
        call=named(text=(8, 32), time=per_thousand, attention_mask=lambda x: _mask(x, 8)),
        shape=_PICTURE,
        blocks=("blocks",),
        note="no module for the feed-forward: gate_proj, up_proj and down_proj lie loose in the "
        "block; gates are zero when a model is made and drawn here",
    ),
    "PixArtTransformer2DModel": TinyModel(
        build=diffusers_model(
            "PixArtTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=3,
            cross_attention_dim=48,
            sample_size=16,
            caption_channels=32,
        ),
        call=_call_pixart,
        shape=_PICTURE,
        note="returns a variance too",
    ),
    "PriorTransformer": TinyModel(
        build=diffusers_model(
            "PriorTransformer",
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=3,
            embedding_dim=32,
        ),
        call=_call_prior,
        shape=(32,),
        note="the latent is one token among 77 of text, one of the timestep and two more; "
        "only the last token is read at the end",
    ),
    "QwenImage21Transformer2DModel": TinyModel(
        build=diffusers_model(
            "QwenImage21Transformer2DModel",
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=3,
            context_in_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        call=_call_qwen_image_21,
        shape=_TOKENS,
        note="with kv_cache, as the pipeline does, the first step runs text and latents and "
        "writes keys and values, later steps run the latents alone: outputs change their length "
        "after the first step; here always text and latents, without kv_cache",
    ),
    "QwenImageTransformer2DModel": TinyModel(
        build=diffusers_model(
            "QwenImageTransformer2DModel",
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        call=named(
            text=(8, 32),
            time=per_thousand,
            encoder_hidden_states_mask=lambda x: _mask(x, 8),
            img_shapes=lambda x: [[(1, 8, 8)]] * len(x),
        ),
        shape=_TOKENS,
        note="blocks return (text, latents)",
    ),
    "RFD4ProteinaTransformer": TinyModel(
        build=diffusers_model(
            "RFD4ProteinaTransformer",
            nlayers=6,
            token_dim=48,
            nheads=2,
            dim_cond=32,
            pair_repr_dim=16,
            latent_dim=8,
            token_type_emb_dim=8,
            cath_emb_dim=8,
            t_emb_dim=32,
            seq_sep_dim=16,
            xt_pair_dist_dim=16,
            tri_mult_c=16,
            recycle_conditioning_dim=4,
        ),
        call=_call_rfd4,
        shape=(64, 11),
        blocks=("transformer_layers", "pair_update_layers"),
        note="recycle_depth passes through all blocks within one forward, from six at first to "
        "one at the end in the pipeline; pair_update_layers is a ModuleDict over pairs of tokens, "
        "called between the layers; takes and returns two latents",
    ),
    "SD3Transformer2DModel": TinyModel(
        build=diffusers_model(
            "SD3Transformer2DModel",
            sample_size=16,
            in_channels=4,
            num_layers=4,
            attention_head_dim=24,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=48,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=16,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        call=named(text=(8, 32), pooled_projections=lambda x: noise(len(x), 32, seed=2)),
        shape=_PICTURE,
        note="blocks return (text, latents), the last (None, latents); attn2 of the first blocks "
        "is attention of the latents only; skip_layers leaves blocks out in extra calls",
    ),
    "SanaTransformer2DModel": TinyModel(
        build=diffusers_model(
            "SanaTransformer2DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=3,
            attention_head_dim=16,
            num_layers=3,
            num_cross_attention_heads=2,
            cross_attention_head_dim=24,
            cross_attention_dim=48,
            caption_channels=32,
            sample_size=8,
        ),
        call=_call_sana,
        shape=(8, 8, 8),
        note="ff is convolutions over [batch, channels, height, width]",
    ),
    "SanaVideoTransformer3DModel": TinyModel(
        build=diffusers_model(
            "SanaVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=3,
            num_cross_attention_heads=2,
            cross_attention_head_dim=24,
            cross_attention_dim=48,
            caption_channels=32,
            rope_max_seq_len=32,
        ),
        call=_call_sana,
        shape=_VIDEO,
        note="ff is convolutions over [batch, frames, height, width, channels]",
    ),
    "SanaWMLTX2RefinerTransformer3DModel": TinyModel(
        build=diffusers_model(
            "SanaWMLTX2RefinerTransformer3DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=24,
            cross_attention_dim=48,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=12,
            audio_cross_attention_dim=24,
            num_layers=3,
            caption_channels=32,
            rope_type="split",
        ),
        call=_call_refiner,
        shape=(64, 8),
        note="attn1 reads, and in calls at timestep 0 between the runs also writes, a key and "
        "value cache that grows from run to run; a pipeline call runs the steps once per chunk of "
        "frames; audio layers of the blocks are never called",
    ),
    "SanaWMTransformer3DModel": TinyModel(
        build=_build_sana_wm,
        call=_call_sana_wm,
        shape=(8, 4, 4, 4),
        blocks=("blocks",),
        note="attn holds attn and cam_attn, which have no weights of their own; every "
        "softmax_every_n-th attn is another class, computed in bfloat16; timesteps are cut to "
        "integers; short convolutions are zero when a model is made and drawn here",
    ),
    "SkyReelsV2Transformer3DModel": TinyModel(
        build=diffusers_model(
            "SkyReelsV2Transformer3DModel",
            **_WAN,
            in_channels=4,
            num_layers=3,
        ),
        call=_call_wan,
        shape=_VIDEO,
        blocks=("blocks",),
        note="with diffusion forcing the pipeline gives every frame its timestep and moves a "
        "window of frames: tokens change in number and in meaning from step to step",
    ),
    "StableAudioDiTModel": TinyModel(
        build=diffusers_model(
            "StableAudioDiTModel",
            sample_size=64,
            in_channels=8,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=8,
            cross_attention_dim=32,
            time_proj_dim=32,
            global_states_input_dim=64,
            cross_attention_input_dim=32,
        ),
        call=_call_stable_audio,
        shape=(8, 64),
        note="the timestep enters as a token before the latents; blocks are not modulated",
    ),
    "Transformer2DModel": TinyModel(
        build=diffusers_model(
            "Transformer2DModel",
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            attention_bias=True,
            sample_size=16,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=10,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ),
        call=_call_transformer_2d,
        shape=_PICTURE,
        note="norm1.emb of the first block is called once more, from outside of the block, after "
        "the last; returns a variance too",
    ),
    "TransformerTemporalModel": TinyModel(
        build=diffusers_model(
            "TransformerTemporalModel",
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=32,
            num_layers=3,
            norm_num_groups=8,
        ),
        call=_call_temporal,
        shape=(32, 8, 4, 4),
        note="not a denoiser: the timestep is ignored; blocks see one sequence of frames per "
        "position, so their batch is batch * height * width; attn2 is self-attention",
    ),
    "WanAnimate2Transformer3DModel": TinyModel(
        build=_build_wan_animate_2,
        call=_call_wan_animate_2,
        shape=_VIDEO,
        blocks=("blocks",),
        note="takes and returns lists; before the steps of every segment the pipeline calls the "
        "model once on the reference to fill a key and value cache that self_attn reads (made of "
        "noise here); with is_uncondtion block 9 is left out",
    ),
    "WanAnimateTransformer3DModel": TinyModel(
        build=diffusers_model(
            "WanAnimateTransformer3DModel",
            **_WAN,
            in_channels=12,
            latent_channels=4,
            num_layers=6,
            image_dim=32,
            added_kv_proj_dim=48,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=16,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        call=_call_wan_animate,
        shape=_VIDEO,
        blocks=("blocks", "face_adapter"),
        refiners=("motion_encoder.res_blocks",),
        note="face_adapter is attention without a block around it, called by the model after "
        "every inject_face_latents_blocks-th block; the motion encoder is called several times "
        "in a forward, on parts of the batch; attn2 splits off the last 512 tokens as text; the "
        "output of patch_embedding is written in place",
    ),
    "WanTransformer3DModel": TinyModel(
        build=diffusers_model(
            "WanTransformer3DModel",
            **_WAN,
            in_channels=4,
            num_layers=3,
        ),
        call=_call_wan,
        shape=_VIDEO,
        blocks=("blocks",),
        note="blocks take everything by position; attn1 gets None for text",
    ),
    "WanVACETransformer3DModel": TinyModel(
        build=diffusers_model(
            "WanVACETransformer3DModel",
            **_WAN,
            in_channels=4,
            num_layers=6,
            vace_layers=[0, 2, 4],
            vace_in_channels=12,
        ),
        call=named(
            text=(8, 32),
            control_hidden_states=lambda x: noise(len(x), 12, *x.shape[2:], seed=2),
            control_hidden_states_scale=lambda x: torch.ones(3),
        ),
        shape=_VIDEO,
        blocks=("blocks", "vace_blocks"),
        note="all vace_blocks run first and see the latents, each returns (hint, control); the "
        "hints are added after the blocks of vace_layers",
    ),
    "ZImageTransformer2DModel": TinyModel(
        build=diffusers_model(
            "ZImageTransformer2DModel",
            in_channels=4,
            dim=48,
            n_layers=3,
            n_refiner_layers=3,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[8, 8, 8],
            axes_lens=[64, 16, 16],
        ),
        call=_call_z_image,
        shape=_PICTURE,
        blocks=("noise_refiner", "layers"),
        refiners=("context_refiner",),
        note="takes and returns lists of samples; noise_refiner works on latents with the "
        "timestep; text is padded to a multiple of 32 tokens",
    ),
}

CANNOT_RUN: dict[str, str] = {}
