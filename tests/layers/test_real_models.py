"""The transformers of diffusers, tiny and with random weights, and a whole pipeline of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import levels
from torch import Tensor, nn

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")
STEPS = 5
Call = Callable[[nn.Module, Tensor, Tensor], Tensor]


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        out_channels=4,
    )


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=12,
    )


def sd3(**options: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        **options,
    )


def sd3_dual() -> nn.Module:
    return sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    )


def latte() -> nn.Module:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        norm_type="ada_norm_single",
        caption_channels=12,
        video_length=4,
        attention_bias=True,
        norm_elementwise_affine=False,
        num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate",
    )


def stable_audio() -> nn.Module:
    return diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )


def wan(**options: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        **options,
    )


def wan_image() -> nn.Module:
    return wan(image_dim=20, added_kv_proj_dim=24)


def hunyuan() -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=4,
        text_len_t5=4,
        learn_sigma=False,
    )


def call_dit(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(x, timestep=t, class_labels=torch.ones(len(x), dtype=torch.long)).sample[:, :4]


def call_pixart(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    conditions = {"resolution": None, "aspect_ratio": None}
    text = noise(len(x), 5, 12)
    return model(x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=conditions).sample[
        :, :4
    ]


def call_sd3(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    text, pooled = noise(len(x), 5, 12), noise(len(x), 12)
    return model(x, text, pooled, t, return_dict=False)[0]


def call_flux(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    text, pooled = noise(len(x), 5, 12), noise(len(x), 12)
    ids = {"img_ids": torch.zeros(x.shape[1], 3), "txt_ids": torch.zeros(5, 3)}
    return model(
        hidden_states=x,
        timestep=t / 1000,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        **ids,
    ).sample


def call_latte(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(x, timestep=t, encoder_hidden_states=noise(len(x), 5, 12)).sample


def call_stable_audio(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rotary = get_1d_rotary_pos_embed(4, 17, use_real=True, repeat_interleave_real=False)
    return model(
        x,
        timestep=t,
        encoder_hidden_states=noise(len(x), 5, 8),
        global_hidden_states=noise(len(x), 1, 16),
        rotary_embedding=rotary,
    ).sample


def call_wan(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(x, timestep=t, encoder_hidden_states=noise(len(x), 5, 16)).sample


def call_wan_image(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    text, image = noise(len(x), 512, 16), noise(len(x), 257, 20)
    return model(
        x, timestep=t, encoder_hidden_states=text, encoder_hidden_states_image=image
    ).sample


def call_hunyuan(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    rotary = get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    n = len(x)
    return model(
        x,
        t,
        encoder_hidden_states=noise(n, 4, 8),
        text_embedding_mask=torch.ones(n, 4, dtype=torch.long),
        encoder_hidden_states_t5=noise(n, 4, 8),
        text_embedding_mask_t5=torch.ones(n, 4, dtype=torch.long),
        image_meta_size=torch.ones(n, 6),
        style=torch.zeros(n, dtype=torch.long),
        image_rotary_emb=rotary,
    ).sample


IMAGE, VIDEO = (1, 4, 8, 8), (1, 4, 4, 8, 8)
MODELS: dict[str, tuple[Callable[[], nn.Module], Call, tuple[int, ...], dict[str, int]]] = {
    "dit": (dit, call_dit, IMAGE, {"self_attn": 2, "ffn": 2}),
    "pixart": (pixart, call_pixart, IMAGE, {"self_attn": 2, "cross_attn": 2, "ffn": 2}),
    "sd3": (sd3, call_sd3, IMAGE, {"joint_attn": 3, "ffn": 5}),
    "sd3-dual": (sd3_dual, call_sd3, IMAGE, {"joint_attn": 3, "self_attn": 2, "ffn": 5}),
    "flux": (flux, call_flux, (1, 16, 4), {"joint_attn": 2, "ffn": 4, "block": 2}),
    "latte": (
        latte,
        call_latte,
        VIDEO,
        {
            "spatial_self_attn": 2,
            "spatial_cross_attn": 2,
            "spatial_ffn": 2,
            "temporal_self_attn": 2,
            "temporal_ffn": 2,
        },
    ),
    "stable-audio": (
        stable_audio,
        call_stable_audio,
        (1, 4, 16),
        {"self_attn": 2, "cross_attn": 2, "ffn": 2},
    ),
    "wan": (wan, call_wan, VIDEO, {"self_attn": 2, "cross_attn": 2, "ffn": 2}),
    "wan-image": (
        wan_image,
        call_wan_image,
        VIDEO,
        {"self_attn": 2, "cross_attn": 2, "ffn": 2},
    ),
    "hunyuan": (hunyuan, call_hunyuan, IMAGE, {"self_attn": 4, "cross_attn": 4, "ffn": 4}),
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for parameter in model.parameters():  # gates and last projections may start at zero
        if not parameter.any():
            parameter.normal_(std=0.1)
    return model


def generate(name: str, model: nn.Module, seed: int = 0, batch: int = 1) -> Tensor:
    _, call, shape, _ = MODELS[name]
    x = noise(batch, *shape[1:], seed=seed)
    for i in range(STEPS):
        t = torch.full((batch,), 1000 * (1 - i / STEPS))
        x = x - call(model, x, t) / STEPS
    return x


@every_model
def test_layers_kinds_and_blocks(name: str) -> None:
    model = build(name)
    layers = sc.find_layers(model)
    counts: dict[str, int] = {}
    for layer in layers:
        counts[layer.kind] = counts.get(layer.kind, 0) + 1
        assert model.get_submodule(layer.path) is not None
        block = model.get_submodule(layer.block)
        assert "Block" in type(block).__name__
        assert layer.path.startswith(layer.block)
        assert layer.macs is None
    assert counts == MODELS[name][3]
    paths = [path for path, _ in model.named_modules()]
    assert [layer.path for layer in layers] == sorted((x.path for x in layers), key=paths.index)


@every_model
def test_computing_everything_changes_no_bit(name: str) -> None:
    model = build(name)
    plain = generate(name, model)
    with sc.cached(model, sc.Schedule.uniform(model, STEPS, 1)):
        assert torch.equal(generate(name, model), plain)
    assert torch.equal(generate(name, model), plain)
    assert plain.isfinite().all()


@every_model
@pytest.mark.parametrize("predictor", ["hold", "taylor"])
def test_every_kind_is_reused(name: str, predictor: str) -> None:
    model = build(name)
    plain = generate(name, model)
    schedule = sc.Schedule.uniform(model, STEPS, 2, predictor=predictor, noise_levels=levels(STEPS))
    with sc.cached(model, schedule) as run:
        first, second = generate(name, model, batch=2), generate(name, model)
    summary = run.summary()
    assert first.isfinite().all()
    assert not torch.equal(second, plain)
    assert summary.never_ran == ()
    assert summary.recomputed == {}
    assert summary.finished == 2
    assert summary.reused % (2 * schedule.reused) == 0
    with sc.cached(copy.deepcopy(model), schedule):
        pass
    assert torch.equal(generate(name, model), plain)


@every_model
def test_reusing_one_kind_alone_has_an_effect(name: str) -> None:
    model = build(name)
    plain = generate(name, model)
    layers = tuple(sc.find_layers(model))
    for kind in MODELS[name][3]:
        rows = {x.path: sc.Row.uniform(STEPS, 2 if x.kind == kind else 1) for x in layers}
        with sc.cached(model, sc.Schedule(STEPS, rows, layers)) as run:
            under_schedule = generate(name, model)
        assert run.summary().reused == MODELS[name][3][kind] * (STEPS // 2)
        assert not torch.equal(under_schedule, plain), kind


@every_model
def test_calibrating_leaves_the_samples_alone_and_counts_every_layer(name: str) -> None:
    model = build(name)
    samples: list[Tensor] = []
    calibration = sc.calibrate(
        model,
        lambda i: samples.append(generate(name, model, seed=i)),
        num_samples=2,
        max_gap=2,
        progress=False,
    )
    for i, seen in enumerate(samples):
        assert torch.equal(seen, generate(name, model, seed=i))
    assert [x.path for x in calibration.layers] == [x.path for x in sc.find_layers(model)]
    assert all(layer.macs for layer in calibration.layers)
    assert 0.2 < sum(layer.macs or 0 for layer in calibration.layers) / calibration.total_macs <= 1
    assert (calibration.errors[:, :, 0, 1:] > 0).all()
    schedule = sc.plan(calibration, alpha=10.0)
    with sc.cached(model, schedule) as run:
        generate(name, model)
    assert run.summary().reused == schedule.reused > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT pipeline with random weights, saved."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(build("dit"), vae, scheduler, id2label={0: "zero", 1: "one"})
    path = tmp_path_factory.mktemp("pipe")
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def pipe(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what loading says of optional packages
        loaded = diffusers.DiTPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def run_pipe(pipe: Any, steps: int = STEPS, *, guidance: float = 4.0, seed: int = 0) -> Tensor:
    images = pipe(
        class_labels=[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return torch.as_tensor(images)


def test_a_pipeline_is_its_transformer(pipe: Any) -> None:
    assert sc.find_layers(pipe) == sc.find_layers(pipe.transformer)
    assert sc.Schedule.uniform(pipe, STEPS, 2) == sc.Schedule.uniform(pipe.transformer, STEPS, 2)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_pipeline_under_a_schedule(pipe: Any, guidance: float) -> None:
    plain = run_pipe(pipe, guidance=guidance)
    with sc.cached(pipe, sc.Schedule.uniform(pipe, STEPS, 1)):
        assert torch.equal(run_pipe(pipe, guidance=guidance), plain)
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    with sc.cached(pipe, schedule) as run:
        first = run_pipe(pipe, guidance=guidance)
        other = run_pipe(pipe, guidance=guidance, seed=1)
        again = run_pipe(pipe, guidance=guidance)
    assert not torch.equal(first, plain)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert run.summary().reused == 3 * schedule.reused
    assert run.summary().finished == 3
    assert torch.equal(run_pipe(pipe, guidance=guidance), plain)


def test_guidance_may_change_between_generations(pipe: Any) -> None:
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    fresh = []
    for guidance in (4.0, 1.0):
        with sc.cached(pipe, schedule):
            fresh.append(run_pipe(pipe, guidance=guidance))
    with sc.cached(pipe, schedule) as run:
        together = [run_pipe(pipe, guidance=guidance) for guidance in (4.0, 1.0)]
    assert all(torch.equal(a, b) for a, b in zip(fresh, together, strict=True))
    assert not run.summary().recomputed


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1, 50])
def test_another_number_of_steps_is_refused_at_once(pipe: Any, steps: int) -> None:
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    calls: list[int] = []
    pipe.transformer.proj_out_2.register_forward_hook(lambda *_: calls.append(1))
    with sc.cached(pipe, schedule) as run:
        with pytest.raises(sc.ScheduleMismatchError, match=rf"\b{steps} steps.*\b{STEPS}\b.*plan"):
            run_pipe(pipe, steps)
        assert calls == []
        under_schedule = run_pipe(pipe)
    assert run.summary().finished == 1
    with sc.cached(pipe, schedule):
        assert torch.equal(run_pipe(pipe), under_schedule)


def test_a_pipeline_interrupted_after_any_step_is_forgotten(pipe: Any) -> None:
    schedule = sc.Schedule.uniform(pipe, STEPS, 3, predictor="taylor")
    with sc.cached(pipe, schedule):
        fresh = run_pipe(pipe)

    class Stop(Exception):
        pass

    step = pipe.scheduler.step
    with sc.cached(pipe, schedule) as run:
        for last in range(STEPS):

            def stopping(*args: Any, last: int = last, **kwargs: Any) -> Any:
                if args[1] == pipe.scheduler.timesteps[last]:
                    raise Stop
                return step(*args, **kwargs)

            pipe.scheduler.step = stopping
            with pytest.raises(Stop):
                run_pipe(pipe, seed=last + 1)
            pipe.scheduler.step = step
            assert torch.equal(run_pipe(pipe), fresh)
        assert run.summary().recomputed == {}


def test_a_schedule_planned_on_the_pipeline_runs_the_transformer_alone(pipe: Any) -> None:
    calibration = sc.calibrate(
        pipe, lambda i: run_pipe(pipe, seed=i), num_samples=2, max_gap=2, progress=False
    )
    assert calibration.solver == "DDIMScheduler"
    assert calibration.timesteps == tuple(map(float, pipe.scheduler.timesteps))
    schedule = sc.plan(calibration, alpha=10.0)
    assert schedule.reused
    with sc.cached(pipe, schedule):
        expected = run_pipe(pipe)
    with sc.cached(pipe.transformer, schedule) as run:
        assert torch.equal(run_pipe(pipe), expected)
    assert run.summary().reused == schedule.reused
    assert run.summary().recomputed == {}


def test_two_pipelines_that_share_a_transformer(pipe: Any) -> None:
    other = diffusers.DiTPipeline(**pipe.components)
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    with sc.cached(pipe, schedule) as run:
        with pytest.raises(sc.AlreadyCachedError, match="disable"):
            sc.enable(other, schedule)
        run_pipe(pipe)
    assert run.summary().reused == schedule.reused


def test_beside_a_cache_of_diffusers(pipe: Any) -> None:
    if not hasattr(pipe.transformer, "enable_cache"):
        pytest.skip("this transformer has no caches of its own")
    pipe.transformer.enable_cache(diffusers.FasterCacheConfig())
    with pytest.raises(sc.AlreadyCachedError, match=r"disable_cache\(\)"):
        sc.enable(pipe, sc.Schedule.uniform(pipe, STEPS, 2))


def test_beside_a_cache_of_diffusers_on_a_model_that_has_them() -> None:
    model = build("flux")
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(sc.AlreadyCachedError, match=r"disable_cache\(\)"):
        sc.enable(model, sc.Schedule.uniform(model, STEPS, 2))
    model.disable_cache()
    with sc.cached(model, sc.Schedule.uniform(model, STEPS, 2)) as run:
        generate("flux", model)
    assert run.summary().reused


def test_another_noise_scheduler_than_the_measured_one_is_said_once(pipe: Any) -> None:
    calibration = sc.calibrate(pipe, lambda i: run_pipe(pipe, seed=i), 1, progress=False)
    schedule = sc.plan(calibration, alpha=0.5)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with sc.cached(pipe, schedule):
        with pytest.warns(sc.SmoothCacheWarning, match="DDIMScheduler.*DPMSolverMultistep"):
            run_pipe(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("error", sc.SmoothCacheWarning)
            run_pipe(pipe)


def test_timesteps_rounded_by_a_short_dtype(pipe: Any) -> None:
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    with sc.cached(pipe, schedule):
        exact = run_pipe(pipe)
    pipe.transformer.register_forward_pre_hook(_all_at_timestep_5, with_kwargs=True)
    with sc.cached(pipe, schedule) as run:
        rounded = run_pipe(pipe)
    assert run.summary().finished == 1 and run.summary().reused == schedule.reused
    assert rounded.shape == exact.shape


def _all_at_timestep_5(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "timestep": torch.full_like(kwargs["timestep"], 5)}
