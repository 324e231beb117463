"""Models and helpers that several tests of generations share."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.reference import levels
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")
STEPS = 6


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def without_zeros(model: nn.Module) -> nn.Module:
    """Gives what is initialised to zero a value, so that every layer has an effect."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    return model.eval()


def ready(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


class NoVae(nn.Module):
    """Stands for the decoder of a pipeline; keeps the latents that it is given."""

    config = SimpleNamespace(
        scaling_factor=1.0, shift_factor=0.0, latent_channels=4, block_out_channels=(1, 1, 1, 1)
    )
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, latents: Tensor) -> Any:
        self.latents = latents
        return SimpleNamespace(sample=latents)


def dit_pipe(scheduler: Any = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=1000,
    )
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)
    return ready(diffusers.DiTPipeline(without_zeros(transformer), NoVae(), scheduler))


def run_dit(
    pipe: Any,
    steps: int = STEPS,
    *,
    seed: int = 0,
    guidance: float = 4.0,
    labels: tuple[int, ...] = (1,),
) -> Tensor:
    """The final latents."""
    torch.manual_seed(seed)  # some solvers draw from the generator of the whole process
    pipe(
        list(labels),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )
    latents: Tensor = pipe.vae.latents
    return latents


def sd3_pipe(scheduler: Any = None, kind: str = "StableDiffusion3Pipeline") -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
    )
    nothing = dict.fromkeys(
        [
            "tokenizer",
            "text_encoder",
            *(f"{x}_{i}" for x in ("tokenizer", "text_encoder") for i in (2, 3)),
        ]
    )
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = getattr(diffusers, kind)(
        transformer=without_zeros(transformer), scheduler=scheduler, vae=NoVae(), **nothing
    )
    return ready(pipe)


def run_sd3(
    pipe: Any,
    steps: int = STEPS,
    *,
    seed: int = 0,
    batch: int = 1,
    size: int = 64,
    tokens: int = 5,
    **options: Any,
) -> Tensor:
    latents: Tensor = pipe(
        prompt_embeds=noise(batch, tokens, 12, seed=1),
        negative_prompt_embeds=noise(batch, tokens, 12, seed=2),
        pooled_prompt_embeds=noise(batch, 12, seed=3),
        negative_pooled_prompt_embeds=noise(batch, 12, seed=4),
        num_inference_steps=steps,
        height=size,
        width=size,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **options,
    ).images
    return latents


def wan_transformer(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return without_zeros(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
        )
    )


def wan_pipe(scheduler: Any = None, **options: Any) -> Any:
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    scheduler = scheduler or diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return ready(
        diffusers.WanPipeline(
            **parts, scheduler=scheduler, transformer=wan_transformer(), **options
        )
    )


def run_wan(pipe: Any, steps: int = STEPS, *, seed: int = 0, **options: Any) -> Tensor:
    latents: Tensor = pipe(
        prompt_embeds=noise(1, 5, 16, seed=1),
        negative_prompt_embeds=noise(1, 5, 16, seed=2),
        num_inference_steps=steps,
        **({"height": 32, "width": 32, "num_frames": 5} | options),
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames
    return latents


def lumina_pipe() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 16, 16),
        cap_feat_dim=16,
    )
    return ready(
        diffusers.Lumina2Pipeline(
            transformer=without_zeros(transformer),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )
    )


def run_lumina(pipe: Any, steps: int = STEPS, *, seed: int = 0, **options: Any) -> Tensor:
    latents: Tensor = pipe(
        prompt_embeds=noise(1, 5, 16, seed=1),
        prompt_attention_mask=torch.ones(1, 5, dtype=torch.long),
        negative_prompt_embeds=noise(1, 5, 16, seed=2),
        negative_prompt_attention_mask=torch.ones(1, 5, dtype=torch.long),
        num_inference_steps=steps,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **options,
    ).images
    return latents


def hunyuan_pipe(start: float, stop: float) -> Any:
    """Guidance in two named calls, from one part of a generation to another only."""
    from diffusers.guiders import ClassifierFreeGuidance

    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    )
    transformer.context_embedder_2 = type(transformer.context_embedder_2)(16, 32, 32)
    vae = NoVae()
    vae.temporal_compression_ratio, vae.spatial_compression_ratio = 4, 16
    parts = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipe = diffusers.HunyuanVideo15Pipeline(
        **parts,
        transformer=without_zeros(transformer),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(4.0, start=start, stop=stop),
    )
    pipe.vision_num_semantic_tokens = 4
    return ready(pipe)


def run_hunyuan(pipe: Any, steps: int = STEPS, *, seed: int = 0) -> Tensor:
    prompts: dict[str, Tensor] = {}
    for i, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
        for j, suffix in enumerate(("", "_2")):
            prompts[name + suffix] = noise(1, 5, 16, seed=2 * i + j)
            mask = f"{name.removesuffix('_embeds')}_embeds_mask{suffix}"
            prompts[mask] = torch.ones(1, 5)
    latents: Tensor = pipe(
        **prompts,
        num_inference_steps=steps,
        height=64,
        width=64,
        num_frames=5,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames
    return latents


def by_text(given: dict[str, Any]) -> Hashable:
    """The branch of a call by what it is told to paint."""
    return float(given["encoder_hidden_states"].sum()), "skip_layers" in given


def step_of_each(timesteps: Tensor) -> list[int]:
    """The step of each entry in a noise scheduler's list: equal neighbours are one step."""
    groups = itertools.groupby(timesteps.tolist())
    return [step for step, (_, group) in enumerate(groups) for _ in group]


def steps_of(pipe: Any, steps: int) -> int:
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    return step_of_each(scheduler.timesteps)[-1] + 1


class ByHand:
    """A copy of a model under a schedule, in which every output is held by step and branch.

    Attributes:
        model: The copy.
        reused: Layer calls that were answered with a held output.
        recomputed: Layer calls that were to reuse and had nothing of their branch to reuse.
    """

    def __init__(self, model: Any, schedule: sc.Schedule) -> None:
        self.model = copy.deepcopy(model)
        self.reused = self.recomputed = 0
        self._held: dict[Hashable, tuple[int, Any]] = {}
        self._calls: dict[tuple[int, Hashable], int] = {}
        self._place: tuple[Hashable, ...] = ()
        for path, row in schedule.rows.items():
            module = self._module(path)
            module.forward = self._replacement(path, row.computed, module.forward)

    def _module(self, path: str) -> nn.Module:
        if isinstance(self.model, nn.Module):
            return self.model.get_submodule(path)
        first, _, rest = path.partition(".")
        if isinstance(getattr(self.model, first, None), nn.Module):
            return getattr(self.model, first).get_submodule(rest)
        return self.model.transformer.get_submodule(path)

    def start(self) -> None:
        """Begins a generation."""
        self._held.clear()
        self._calls.clear()

    def begin(self, step: int, branch: Hashable) -> None:
        """Begins a call of the denoiser; several of one branch in a step are kept apart."""
        use = self._calls[step, branch] = self._calls.get((step, branch), -1) + 1
        self._step, self._place, self._uses = step, (branch, use), {}

    def _replacement(
        self, path: str, computed: tuple[bool, ...], forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            self._uses[path] = self._uses.get(path, -1) + 1
            shape = next(x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            place = (path, self._uses[path], shape, *self._place)
            due = max(step for step in range(self._step + 1) if computed[step])
            if not computed[self._step]:
                if self._held.get(place, (-1,))[0] >= due:
                    self.reused += 1
                    return pytree.tree_map(_copied, self._held[place][1])
                self.recomputed += 1
            output = forward(*args, **kwargs)
            self._held[place] = (self._step, pytree.tree_map(_copied, output))
            return output

        return replacement


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class PipeByHand(ByHand):
    """A copy of a pipeline, told its step by counting what its noise scheduler is asked to do.

    Args:
        branch_of: Names the branch of a call by its arguments.
        offset: Steps of the scheduler's list that come before step 0 of the schedule.
    """

    def __init__(
        self,
        pipe: Any,
        schedule: sc.Schedule,
        branch_of: Callable[[dict[str, Any]], Hashable] = lambda given: 0,
        offset: int = 0,
    ) -> None:
        super().__init__(pipe, schedule)
        self._entry = self._skipped = 0
        self._offset = offset
        scheduler = self.model.scheduler
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        @functools.wraps(set_timesteps)
        def starting(*args: Any, **kwargs: Any) -> Any:
            self.start()
            self._entry = self._skipped
            return set_timesteps(*args, **kwargs)

        @functools.wraps(step)
        def stepping(*args: Any, **kwargs: Any) -> Any:
            self._entry += 1
            return step(*args, **kwargs)

        scheduler.set_timesteps, scheduler.step = starting, stepping

        def calling(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            begun = getattr(scheduler, "begin_index", None) or 0
            steps = step_of_each(scheduler.timesteps)
            self.begin(steps[begun + self._entry] - self._offset, branch_of(kwargs))

        for name in ("transformer", "transformer_2"):
            if getattr(self.model, name, None) is not None:
                getattr(self.model, name).register_forward_pre_hook(calling, with_kwargs=True)

    def skip(self, entries: int, *, count: bool) -> None:
        """Every generation begins so far along the list; steps are counted from there or not."""
        self._skipped = entries
        self._offset = 0 if count else entries


def assert_as_by_hand(run: sc.Run, by_hand: ByHand, times: int) -> None:
    """A run counted what the reference did in as many generations, of which none broke off."""
    summary = run.summary()
    assert summary.reused == by_hand.reused > 0
    assert sum(summary.recomputed.values()) == by_hand.recomputed
    assert (summary.finished, summary.broken_off) == (times, 0)


SOLVERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddim-trailing": lambda: diffusers.DDIMScheduler(timestep_spacing="trailing"),
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "dpmsolver++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "sde-dpmsolver++": lambda: diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++"
    ),
    "dpmsolver-karras": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpmsolver-single": lambda: diffusers.DPMSolverSinglestepScheduler(lower_order_final=True),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "deis": lambda: diffusers.DEISMultistepScheduler(),
    "sa-solver": lambda: diffusers.SASolverScheduler(),
    "ipndm": lambda: diffusers.IPNDMScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler-ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "edm-euler": lambda: diffusers.EDMEulerScheduler(),
    "edm-dpmsolver": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
    "lcm": lambda: diffusers.LCMScheduler(),
    "tcd": lambda: diffusers.TCDScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "kdpm2": lambda: diffusers.KDPM2DiscreteScheduler(),
    "kdpm2-ancestral": lambda: diffusers.KDPM2AncestralDiscreteScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "pndm-prk": lambda: diffusers.PNDMScheduler(),
}


def compare_with_by_hand(
    pipe: Any, schedule: sc.Schedule, generate: Callable[..., Tensor], **options: Any
) -> tuple[sc.Run, PipeByHand]:
    """Runs two generations under one handle; they are those of the reference, bit for bit."""
    plain = generate(pipe, seed=0)
    by_hand = PipeByHand(pipe, schedule, **options)
    expected = [generate(by_hand.model, seed=seed) for seed in (0, 1)]
    with sc.cached(pipe, schedule) as run:
        got = [generate(pipe, seed=seed) for seed in (0, 1)]
        assert run.summary().held_bytes == 0
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert not torch.equal(got[0], plain)
    assert torch.equal(generate(pipe, seed=0), plain)
    assert_as_by_hand(run, by_hand, times=2)
    return run, by_hand


FLOWS: dict[str, Callable[..., Any]] = {
    "euler": lambda shift=3.0: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    "heun": lambda shift=3.0: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift),
    "lcm": lambda shift=3.0: diffusers.FlowMatchLCMScheduler(shift=shift),
    "dpmsolver++": lambda shift=3.0: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    ),
    "unipc": lambda shift=3.0: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    ),
}


class Report(nn.Module):
    """A layer that answers with the number of the call that it was computed in."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, float(self.number))


class Witness(nn.Module):
    """A denoiser that tells which call the value of its only layer is from.

    Attributes:
        calls: Generation, branch and step of every call, as the test says them.
        sources: Of every call, the call that computed what it was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].attn = Report()
        self.calls: list[tuple[Hashable, Hashable, int]] = []
        self.sources: list[tuple[Hashable, Hashable, int]] = []

    def forward(self, hidden_states: Tensor, timestep: Any, condition: Any = None) -> Tensor:
        out: Tensor = self.blocks[0].attn(hidden_states)
        return out

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        yield

    def tell(
        self, generation: Hashable, branch: Hashable, step: int, x: Tensor, t: Any, condition: Any
    ) -> None:
        """Calls the model, having said what the call is."""
        self.calls.append((generation, branch, step))
        self.blocks[0].attn.number = len(self.calls) - 1
        try:
            out = self(x, t, condition)
        except sc.SmoothCacheError:
            self.calls.pop()
            raise
        self.sources.append(self.calls[int(out.flatten()[0])])

    def wrong(self, schedule: sc.Schedule) -> list[Any]:
        """Calls that got another value than their own, or than one that the schedule means."""
        (row,) = schedule.rows.values()
        found = []
        for call, source in zip(self.calls, self.sources, strict=True):
            *whose, step = call
            due = max(s for s in range(step + 1) if row.computed[s])
            is_meant = list(source[:-1]) == whose and due <= source[-1] < step
            if call != source and (row.computed[step] or not is_meant):
                found.append((call, source))
        return found

    def foreign(self) -> list[Any]:
        """Calls that got a value of another generation or branch."""
        pairs = zip(self.calls, self.sources, strict=True)
        return [(call, source) for call, source in pairs if call[:-1] != source[:-1]]

    def assert_right(self, run: sc.Run) -> None:
        assert self.wrong(run.schedule) == []
        reused = sum(a != b for a, b in zip(self.calls, self.sources, strict=True))
        assert run.summary().reused == reused
        summary = run.summary()
        assert summary.computed + sum(summary.recomputed.values()) == len(self.calls) - reused


def witness_schedule(num_steps: int, interval: int, predictor: str = "hold") -> sc.Schedule:
    layer = sc.CacheLayer("blocks.0.attn", kind="self_attn", block="blocks.0")
    row = sc.Row.uniform(num_steps, interval, predictor=predictor)
    return sc.Schedule(num_steps, {layer.path: row}, (layer,), noise_levels=levels(num_steps))


PROMPTS = {name: noise(1, 3, 4, seed=seed) for seed, name in enumerate("cup")}


class WitnessPipe:
    """As much of a pipeline as is asked for, about a witness and a real noise scheduler."""

    def __init__(self, scheduler: Any, transformer: Witness | None = None) -> None:
        self.transformer = transformer or Witness()
        self.scheduler = scheduler
        self.components = {"transformer": self.transformer, "scheduler": scheduler}

    def generate(
        self,
        generation: Hashable,
        steps: int = STEPS,
        *,
        start: int = 0,
        stop: int = 10_000,
        announce: bool = True,
        announced: bool = False,
        unit: Callable[[Tensor], Tensor] = lambda t: t,
        into: Tensor | None = None,
        branches: str = "c",
    ) -> None:
        """A sampling loop.

        Args:
            start: The step to begin at.
            stop: The step before which the generation breaks off.
            announce: Tell the scheduler how many steps there will be, for a new list of timesteps.
            announced: Tell the scheduler where it begins, too.
            unit: What the denoiser is given of a timestep t.
            into: A buffer that the latents are always written into.
        """
        scheduler = self.scheduler
        if announce:
            scheduler.set_timesteps(steps)
        step_of = step_of_each(scheduler.timesteps)
        first = max(entry for entry, step in enumerate(step_of) if step == start) if start else 0
        if announced and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = torch.randn(1, 4, 2, 2)
        for entry, t in enumerate(scheduler.timesteps):
            if entry < first or step_of[entry] >= stop:
                continue
            x = x if into is None else into.copy_(x)
            scaled = scheduler.scale_model_input(x, t) if into is None else x
            given = unit(t.reshape(1).double())
            for branch in branches:
                self.transformer.tell(
                    generation, branch, step_of[entry], scaled, given, PROMPTS[branch]
                )
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample


def interrupting_after(last: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == last
        return {}

    return callback


def with_step_computed(schedule: sc.Schedule, step: int) -> sc.Schedule:
    rows = {
        path: sc.Row(tuple(due or i == step for i, due in enumerate(row.computed)))
        for path, row in schedule.rows.items()
    }
    return sc.Schedule(schedule.num_steps, rows, schedule.layers)


HANDLES = pytest.mark.parametrize("handle", ["pipeline", "module"])
