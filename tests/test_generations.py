"""Which step and branch a call is, in real pipelines of diffusers with their own noise schedulers.

Every pipeline is tiny and has random weights. What a run under a schedule gives is compared, bit
for bit, with ``ByHand``: a copy of the pipeline that is told its steps and branches by the test.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")

STEPS = 6
Generate = Callable[[Any], Tensor]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------- the tiny pipelines


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
        ["tokenizer", "text_encoder", *(f"{x}_{i}" for x in ("tokenizer", "text_encoder") for i in (2, 3))]
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
    return transformer


def by_text(given: dict[str, Any]) -> Hashable:
    """The branch of a call by what it is told to paint."""
    return float(given["encoder_hidden_states"].sum()), "skip_layers" in given


# -------------------------------------------------------------------------------- the reference


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
        self._entry = 0
        scheduler = self.model.scheduler
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        @functools.wraps(set_timesteps)
        def starting(*args: Any, **kwargs: Any) -> Any:
            self.start()
            self._entry = 0
            return set_timesteps(*args, **kwargs)

        @functools.wraps(step)
        def stepping(*args: Any, **kwargs: Any) -> Any:
            self._entry += 1
            return step(*args, **kwargs)

        scheduler.set_timesteps, scheduler.step = starting, stepping

        def calling(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            begun = getattr(scheduler, "begin_index", None) or 0
            steps = step_of_each(scheduler.timesteps)
            self.begin(steps[begun + self._entry] - offset, branch_of(kwargs))

        for name in ("transformer", "transformer_2"):
            if getattr(self.model, name, None) is not None:
                getattr(self.model, name).register_forward_pre_hook(calling, with_kwargs=True)


def assert_as_by_hand(run: sc.Run, by_hand: ByHand, times: int = 1) -> None:
    """A run counted what the reference did, ``times`` generations alike."""
    summary = run.summary()
    assert summary.reused == times * by_hand.reused > 0
    assert sum(summary.recomputed.values()) == times * by_hand.recomputed
    assert summary.finished == times
    assert summary.broken_off == 0
    assert summary.held_bytes == 0


# ------------------------------------------------------------------------------ noise schedulers

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
    "lms": lambda: diffusers.LMSDiscreteScheduler(),
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
every_solver = pytest.mark.parametrize("solver", SOLVERS)


@every_solver
def test_computing_everything_changes_no_bit_under_any_solver(solver: str) -> None:
    pipe = dit_pipe(SOLVERS[solver]())
    plain = run_dit(pipe)
    assert plain.isfinite().all()
    with sc.cached(pipe, sc.Schedule.uniform(pipe, steps_of(pipe, STEPS), 1)) as run:
        assert torch.equal(run_dit(pipe), plain)
    assert run.summary().finished == 1


@every_solver
@pytest.mark.parametrize("interval", [2, 3])
def test_reuse_under_any_solver(solver: str, interval: int) -> None:
    pipe = dit_pipe(SOLVERS[solver]())
    plain = run_dit(pipe)
    schedule = sc.Schedule.uniform(pipe, steps_of(pipe, STEPS), interval)
    by_hand = PipeByHand(pipe, schedule)
    expected = [run_dit(by_hand.model, seed=seed) for seed in (0, 1)]
    with sc.cached(pipe, schedule) as run:
        got = [run_dit(pipe, seed=seed) for seed in (0, 1)]
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert not torch.equal(got[0], plain)
    summary = run.summary()
    assert (summary.finished, summary.broken_off, summary.held_bytes) == (2, 0, 0)
    assert summary.reused == by_hand.reused
    assert sum(summary.recomputed.values()) == by_hand.recomputed
