"""Which step and branch a call is, in real pipelines of diffusers with their own noise schedulers.

Every pipeline is tiny and has random weights. What a run under a schedule gives is compared, bit
for bit, with ``ByHand``: a copy of the pipeline that is told its steps and branches by the test.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import levels
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::smoothcache.errors.SmoothCacheWarning"),
]

STEPS = 6


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


@every_solver
@pytest.mark.parametrize("interval", [2, 3])
def test_reuse_under_any_solver(solver: str, interval: int) -> None:
    pipe = dit_pipe(SOLVERS[solver]())
    schedule = sc.Schedule.uniform(pipe, steps_of(pipe, STEPS), interval)
    run, _ = compare_with_by_hand(pipe, schedule, run_dit)
    calls_alike = len(set(calls_per_step(pipe))) == 1
    if calls_alike:
        assert run.summary().recomputed == {}
        assert run.summary().reused == 2 * schedule.reused * calls_per_step(pipe)[0]


def calls_per_step(pipe: Any) -> list[int]:
    """Entries of the list of the last generation, by step."""
    steps = step_of_each(pipe.scheduler.timesteps)
    return [steps.count(step) for step in sorted(set(steps))]


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


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("interval", [2, 3])
def test_reuse_under_any_solver_of_flows(flow: str, interval: int) -> None:
    pipe = sd3_pipe(FLOWS[flow]())

    def generate(pipe: Any, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run_sd3(pipe, seed=seed)

    plain = generate(pipe, 0)
    with sc.cached(pipe, sc.Schedule.uniform(pipe, steps_of(pipe, STEPS), 1)):
        assert torch.equal(generate(pipe, 0), plain)
    schedule = sc.Schedule.uniform(pipe, steps_of(pipe, STEPS), interval)
    compare_with_by_hand(pipe, schedule, generate)


@every_solver
def test_another_number_of_steps_is_refused_under_any_solver(solver: str) -> None:
    pipe = dit_pipe(SOLVERS[solver]())
    steps = steps_of(pipe, STEPS)
    schedule = sc.Schedule.uniform(pipe, steps, 2)
    with sc.cached(pipe, schedule):
        fresh = run_dit(pipe)
    with sc.cached(pipe, schedule) as run:
        for other in (STEPS - 2, STEPS + 3):
            announced = steps_of(pipe, other)
            with pytest.raises(
                sc.ScheduleMismatchError, match=rf"\b{announced} steps.*\b{steps}\b"
            ):
                run_dit(pipe, other)
            assert torch.equal(run_dit(pipe), fresh)
    assert run.summary().finished == 2


def test_steps_whose_timesteps_the_solver_rounds_to_one_number() -> None:
    """Exponential and beta sigmas lie so close at one end that integer timesteps repeat."""
    pipe = dit_pipe(diffusers.DPMSolverMultistepScheduler(use_exponential_sigmas=True))
    schedule = sc.Schedule.uniform(pipe, 30, 2)
    with sc.cached(pipe, schedule) as run:
        run_dit(pipe, 30)
    assert run.summary().reused == schedule.reused


def test_the_solver_may_be_changed_between_generations() -> None:
    pipe = dit_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    solvers = ("ddim", "euler", "dpmsolver++", "euler", "ddim")
    fresh = {}
    for solver in solvers:
        pipe.scheduler = SOLVERS[solver]()
        with sc.cached(pipe, schedule):
            fresh[solver] = run_dit(pipe)
    with sc.cached(pipe, schedule) as run:
        for solver in solvers:
            pipe.scheduler = SOLVERS[solver]()
            assert torch.equal(run_dit(pipe), fresh[solver])
    assert (run.summary().finished, run.summary().recomputed) == (len(solvers), {})


# ------------------------------------------------------------------------ guidance, in pipelines


@pytest.mark.parametrize("interval", [2, 3, STEPS])
def test_guidance_in_two_named_calls(interval: int) -> None:
    pipe = wan_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, interval)
    run, _ = compare_with_by_hand(pipe, schedule, run_wan, branch_of=by_text)
    assert run.summary().recomputed == {}
    assert run.summary().reused == 2 * 2 * schedule.reused


@pytest.mark.parametrize("start", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("stop", [0.7, 1.0])
@pytest.mark.parametrize("interval", [2, 4])
def test_guidance_in_two_named_calls_in_some_steps(
    start: float, stop: float, interval: int
) -> None:
    pipe = hunyuan_pipe(start, stop)
    schedule = sc.Schedule.uniform(pipe, STEPS, interval)
    compare_with_by_hand(pipe, schedule, run_hunyuan, branch_of=by_text)


@pytest.mark.parametrize("until", [0.2, 0.4, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("interval", [2, 4])
def test_guidance_in_two_unnamed_calls_that_ends_early(until: float, interval: int) -> None:
    """Timesteps rise here, from 0 to 1."""
    pipe = lumina_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, interval)
    generate = functools.partial(run_lumina, cfg_trunc_ratio=until)
    run, _ = compare_with_by_hand(pipe, schedule, generate, branch_of=by_text)
    assert run.summary().recomputed == {}


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.1, 0.6), (0.4, 0.9)])
@pytest.mark.parametrize("interval", [2, 4])
def test_a_further_call_beside_guidance_in_one_batch(
    start: float, stop: float, interval: int
) -> None:
    """The guidance that skips layers: in some steps a second call, without the batch's half."""
    pipe = sd3_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, interval)
    generate = functools.partial(
        run_sd3,
        skip_guidance_layers=[1],
        skip_layer_guidance_start=start,
        skip_layer_guidance_stop=stop,
    )
    compare_with_by_hand(pipe, schedule, generate, branch_of=by_text)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guidance_in_one_batch(guidance: float) -> None:
    pipe = dit_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    generate = functools.partial(run_dit, guidance=guidance)
    run, _ = compare_with_by_hand(pipe, schedule, generate)
    assert run.summary().recomputed == {}


@pytest.mark.parametrize("changes_at", range(1, STEPS))
def test_guidance_switched_off_by_a_callback(changes_at: int) -> None:
    """As the documentation of diffusers does it: the batch is halved in mid-run."""
    pipe = sd3_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)

    def off(pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if step + 1 == changes_at:
            pipe._guidance_scale = 0.0
            given = {name: value.chunk(2)[-1] for name, value in given.items()}
        return given

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    generate = functools.partial(
        run_sd3, callback_on_step_end=off, callback_on_step_end_tensor_inputs=names
    )
    by_hand = compare_with_by_hand(pipe, schedule, generate, branch_of=by_text)[1]
    assert (by_hand.recomputed == 0) is (changes_at == 3)


# ------------------------------------------------------------------------ whose value was reused


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
Condition = Callable[[str, int], Any]

CONDITIONS: dict[str, Condition] = {
    "same objects": lambda branch, step: PROMPTS[branch],
    "made anew": lambda branch, step: PROMPTS[branch].clone(),
    "labels": lambda branch, step: torch.tensor([ord(branch)]),
    "numbers": lambda branch, step: ord(branch),
    "beside what is shared": lambda branch, step: [PROMPTS["p"], PROMPTS[branch].clone()],
    "in a mapping, or missing": lambda branch, step: {"y": PROMPTS["c"] if branch == "c" else None},
    "beside what varies": lambda branch, step: [
        noise(2, seed=1000 * step + ord(branch)),
        PROMPTS[branch],
    ],
}


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


def guided(
    model: Witness,
    pattern: Sequence[str],
    condition: Condition,
    *,
    generation: int = 0,
    named: bool = False,
    made_anew: bool = False,
) -> None:
    """A sampling loop of the user's own; the pattern spells the branches of each step in order."""
    for step, branches in enumerate(pattern):
        x, t = torch.randn(1, 2, 2), torch.tensor([1000 * (1 - step / len(pattern))])
        for branch in branches:
            with model.cache_context(branch) if named else nullcontext():
                given = x.clone() if made_anew else x
                model.tell(generation, branch, step, given, t, condition(branch, step))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("interval", [2, 5])
def test_every_order_of_two_calls(condition: str, interval: int) -> None:
    """All ways in which a step calls for one prompt, for the other, or for both in either order."""
    schedule = witness_schedule(5, interval)
    patterns = list(itertools.product(("c", "u", "uc", "cu"), repeat=5))
    for pattern in patterns[:: 2 if condition == "made anew" else 7]:
        model = Witness()
        with sc.cached(model, schedule) as run:
            guided(model, pattern, CONDITIONS[condition])
        model.assert_right(run)


@pytest.mark.parametrize("interval", [2, 3])
def test_every_order_of_two_named_calls(interval: int) -> None:
    """Names settle it, also where the conditioning is the same, or another in every step."""
    schedule = witness_schedule(5, interval)
    for number, pattern in enumerate(itertools.product(("c", "u", "uc", "cu"), repeat=5)):
        if number % 7 == 0:
            model = Witness()
            with sc.cached(model, schedule) as run:
                guided(model, pattern, lambda branch, step: PROMPTS["p"] + step % 2, named=True)
            model.assert_right(run)


PATTERNS = {
    "in every step": ("uc",) * 6,
    "begins later": ("c", "c", "uc", "uc", "uc", "uc"),
    "begins later, the other first": ("c", "c", "cu", "cu", "cu", "cu"),
    "ends early, the first goes on": ("cu", "cu", "cu", "c", "c", "c"),
    "ends early, the second goes on": ("uc", "uc", "uc", "c", "c", "c"),
    "pauses": ("uc", "uc", "c", "c", "uc", "uc"),
    "every other step": ("uc", "c", "uc", "c", "uc", "c"),
    "turns about": ("uc", "cu", "uc", "cu", "uc", "cu"),
    "three calls in the middle": ("uc", "uc", "upc", "upc", "uc", "uc"),
    "one of each in turn": ("u", "c", "u", "c", "u", "c"),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("predictor", ["hold", "taylor"])
def test_guidance_in_some_steps_recomputes_only_what_is_missing(
    pattern: str, predictor: str
) -> None:
    """A real transformer against the reference, which is told the branches."""
    model = dit_pipe().transformer
    schedule = sc.Schedule.uniform(model, 6, 3)
    labels = {branch: torch.tensor([label]) for label, branch in enumerate("cup")}

    def generate(model: nn.Module, begin: Callable[[int, str], None]) -> list[Tensor]:
        x, outputs = noise(1, 4, 4, 4), []
        for step, branches in enumerate(PATTERNS[pattern]):
            for branch in branches:
                begin(step, branch)
                t = torch.tensor([1000 - 150 * step])
                outputs.append(model(x, timestep=t, class_labels=labels[branch].clone()).sample)
            x = x - 0.1 * outputs[-1]
        return outputs

    by_hand = ByHand(model, schedule)
    expected = generate(by_hand.model, by_hand.begin)
    if predictor == "taylor":  # where every branch has one value to go by, it is held
        rows = {path: sc.Row(row.computed, "taylor") for path, row in schedule.rows.items()}
        schedule = sc.Schedule(6, rows, schedule.layers)
    with sc.cached(model, schedule) as run:
        got = generate(model, lambda step, branch: None)
    first_steps = sum(map(len, PATTERNS[pattern][: 3 if predictor == "taylor" else 6]))
    for a, b in zip(got[:first_steps], expected[:first_steps], strict=True):
        assert torch.equal(a, b)
    assert run.summary().reused == by_hand.reused
    assert sum(run.summary().recomputed.values()) == by_hand.recomputed


@pytest.mark.parametrize("batches", [(2, 2, 1, 1, 2, 2), (1, 1, 2, 2, 2, 2), (2, 1, 2, 1, 2, 1)])
@pytest.mark.parametrize("told", [True, False])
def test_a_batch_that_changes_in_mid_run(batches: tuple[int, ...], told: bool) -> None:
    """Both prompts in one call in some steps, one of them alone in others."""
    schedule, model = witness_schedule(6, 3), Witness()
    prompts = torch.cat([PROMPTS["u"], PROMPTS["c"]])
    with sc.cached(model, schedule) as run:
        for step, batch in enumerate(batches):
            x, t = torch.randn(batch, 2, 2), torch.full((batch,), 900.0 - 100 * step)
            condition = prompts[2 - batch :].clone() if told else None
            model.tell(0, batch, step, x, t, condition)
    model.assert_right(run)
    assert sum(run.summary().recomputed.values()) > 0


SOME_STEPS = {
    "ends early": ("uc", "uc", "uc", "uc", "c", "c"),
    "begins later": ("c", "c", "c", "uc", "uc", "uc"),
    "pauses": ("uc", "uc", "c", "uc", "uc", "uc"),
    "turns about": ("uc", "uc", "uc", "cu", "uc", "uc"),
}


@pytest.mark.parametrize("pattern", SOME_STEPS)
def test_prompts_that_differ_in_every_step(pattern: str) -> None:
    """Noise on the conditioning (CADS), or a fade between two prompts, with guidance in between."""
    schedule, model = witness_schedule(6, 6), Witness()
    with sc.cached(model, schedule):
        guided(model, SOME_STEPS[pattern], lambda branch, step: PROMPTS[branch] + step)
    assert model.foreign() == []


@pytest.mark.parametrize("pattern", [x for x in SOME_STEPS if x != "begins later"])
@pytest.mark.parametrize("made_anew", [False, True])
def test_branches_that_are_conditioned_alike_are_computed(pattern: str, made_anew: bool) -> None:
    """Guidance by a perturbed model: the calls differ in nothing that the model is given."""
    schedule, model = witness_schedule(6, 6), Witness()
    with sc.cached(model, schedule) as run:
        guided(model, SOME_STEPS[pattern], lambda branch, step: PROMPTS["p"], made_anew=made_anew)
    model.assert_right(run)
    calls = sum(map(len, SOME_STEPS[pattern]))
    assert run.summary().recomputed == {"the calls of a step could not be told apart": calls - 2}


@pytest.mark.parametrize("handle", ["pipeline", "module"])
@pytest.mark.parametrize("step", range(1, 4))
def test_branches_that_turn_out_to_be_alike_after_a_reuse_are_refused(
    step: int, handle: str
) -> None:
    """The first of the two has been taken for the second, and nothing could have told."""
    pipe = WitnessPipe(SOLVERS["ddim"]())
    pipe.scheduler.set_timesteps(6)
    words = rf"in step {step} the model was called twice with the same latents.*cache_context"
    with sc.cached(pipe if handle == "pipeline" else pipe.transformer, witness_schedule(6, 3)):
        with pytest.raises(sc.ScheduleMismatchError, match=words) if step < 3 else nullcontext():
            for i, t in enumerate(pipe.scheduler.timesteps):
                x = torch.randn(1, 2, 2)
                for branch in "pc" if i >= step else "c":
                    pipe.transformer.tell(0, branch, i, x, t.reshape(1), PROMPTS["p"])
    foreign = pipe.transformer.foreign()
    assert foreign == ([((0, "p", step), (0, "c", 0))] if step < 3 else [])


def test_stages_of_a_solver_of_ones_own_are_taken_in_their_order() -> None:
    """Heun without a noise scheduler: the latents differ between the calls of a step."""
    schedule, model = witness_schedule(6, 3), Witness()
    with sc.cached(model, schedule) as run:
        for generation in range(2):
            for step in range(6):
                for stage in range(1 if step == 5 else 2):
                    x, t = torch.randn(1, 2, 2), torch.tensor([1000.0 - 100 * step])
                    model.tell(generation, stage, step, x, t, PROMPTS["c"])
    model.assert_right(run)
    assert run.summary().recomputed == {"it could have been another generation's value": 4}


def test_windows_of_which_the_first_was_left_out_are_computed_from_then_on() -> None:
    schedule, model = witness_schedule(6, 6), Witness()
    with sc.cached(model, schedule) as run:
        for step, windows in enumerate(("ab", "ab", "ab", "b", "ab", "ab")):
            for window in windows:
                x, t = torch.randn(1, 2, 2), torch.tensor([1000.0 - 100 * step])
                model.tell(0, window, step, x, t, PROMPTS["c"])
    assert model.foreign() == [((0, "b", 3), (0, "a", 1))]  # known when the next step begins
    assert run.summary().recomputed["the calls of a step could not be told apart"] == 4


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("interval", [2, 4, 6])
def test_nothing_is_held_after_the_last_step(pattern: str, interval: int) -> None:
    """But for a branch left out in the last step alone, which nobody knows not to come."""
    schedule, model = witness_schedule(6, interval), Witness()
    branches = PATTERNS[pattern]
    with sc.cached(model, schedule) as run:
        guided(model, branches, CONDITIONS["made anew"])
        left_out_alone = len(branches[-2]) > len(branches[-1])
        assert run.summary().held_bytes == 16 * left_out_alone
        guided(model, ("c",) * 6, CONDITIONS["made anew"], generation=1)
        assert run.summary().held_bytes == 0
    model.assert_right(run)


def test_a_branch_that_comes_back_in_the_very_last_step_is_right() -> None:
    schedule, model = witness_schedule(4, 4), Witness()
    with sc.cached(model, schedule) as run:
        guided(model, ("uc", "uc", "c", "cu"), CONDITIONS["labels"])
        assert run.summary().held_bytes == 0
    model.assert_right(run)
    assert run.summary().recomputed == {"no value had been computed for this call": 1}


def test_prompts_that_differ_in_few_elements_of_many() -> None:
    """A map with two channels, of which one is the same for both branches."""
    maps = {branch: torch.zeros(1, 256, 256, 2) for branch in "cu"}
    maps["c"][..., 1] = 1
    schedule, model = witness_schedule(4, 4), Witness()
    with sc.cached(model, schedule):
        guided(model, ("c", "uc", "uc", "c"), lambda branch, step: maps[branch])
    assert model.foreign() == []


def test_a_value_older_than_the_schedule_means_is_computed_again() -> None:
    for predictor in (name for name, x in sc.PREDICTORS.items() if x.axis == "step"):
        schedule, model = witness_schedule(8, 3, predictor), Witness()
        with sc.cached(model, schedule) as run:
            guided(model, ("uc", "uc", "uc", "c", "uc", "uc", "uc", "uc"), CONDITIONS["made anew"])
        assert run.summary().recomputed == {"no value had been computed for this call": 1}


# ------------------------------------------------------------------- starting in the middle


def image_to_image(flow: str) -> Any:
    return sd3_pipe(FLOWS[flow](), kind="StableDiffusion3Img2ImgPipeline")


def run_image_to_image(pipe: Any, strength: float, *, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    options = {"image": noise(1, 4, 8, 8, seed=9), "strength": strength}
    return run_sd3(pipe, seed=seed, **options)


@pytest.mark.parametrize("flow", ["euler", "heun", "lcm"])
@pytest.mark.parametrize("strength", [0.34, 0.5, 0.84, 1.0])
@pytest.mark.parametrize("whole", [True, False])
def test_image_to_image(flow: str, strength: float, whole: bool) -> None:
    """With a schedule for all steps, and with one for exactly those that are left."""
    pipe = image_to_image(flow)
    all_steps = steps_of(pipe, STEPS)
    left = int(STEPS * strength) + (STEPS * strength % 1 > 0)
    schedule = sc.Schedule.uniform(pipe, all_steps if whole else left, 2)
    generate = functools.partial(run_image_to_image, strength=strength)
    offset = 0 if whole else all_steps - left
    compare_with_by_hand(pipe, schedule, generate, offset=offset)


def test_image_to_image_of_another_length_is_refused() -> None:
    pipe = image_to_image("euler")
    with sc.cached(pipe, sc.Schedule.uniform(pipe, 4, 2)):
        with pytest.raises(sc.ScheduleMismatchError, match=r"\b6 steps.*\b4\b"):
            run_image_to_image(pipe, 0.5)
        run_image_to_image(pipe, 0.66)


def video_to_video() -> Any:
    """A pipeline that starts in the middle without a word to its scheduler."""
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    kind = diffusers.WanVideoToVideoPipeline
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ready(kind(**parts, scheduler=scheduler, transformer=wan_transformer()))


def run_video_to_video(pipe: Any, strength: float, *, seed: int = 0) -> Tensor:
    latents: Tensor = pipe(
        prompt_embeds=noise(1, 5, 16, seed=1),
        negative_prompt_embeds=noise(1, 5, 16, seed=2),
        num_inference_steps=STEPS,
        strength=strength,
        height=32,
        width=32,
        latents=noise(1, 4, 2, 4, 4, seed=seed),
        output_type="latent",
    ).frames
    return latents


@pytest.mark.parametrize("strength", [0.34, 0.5, 1.0])
@pytest.mark.parametrize("whole", [True, False])
def test_starting_in_the_middle_unannounced(strength: float, whole: bool) -> None:
    pipe = video_to_video()
    left = int(STEPS * strength)
    schedule = sc.Schedule.uniform(pipe, STEPS if whole else left, 2)
    generate = functools.partial(run_video_to_video, strength=strength)
    by_hand = PipeByHand(pipe, schedule, by_text)
    by_hand.skip(STEPS - left, count=whole)
    expected = [generate(by_hand.model, seed=seed) for seed in (0, 1)]
    with sc.cached(pipe, schedule) as run:
        assert torch.equal(generate(pipe, seed=0), expected[0])
        assert torch.equal(generate(pipe, seed=1), expected[1])
    assert_as_by_hand(run, by_hand, times=2)


def test_text_to_image_and_image_to_image_in_turn_with_one_handle() -> None:
    pipe = sd3_pipe()
    other = diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components)
    ready(other)
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    runs: list[Callable[[], Tensor]] = [
        lambda: run_sd3(pipe),
        lambda: run_image_to_image(other, 0.5),
        lambda: run_image_to_image(other, 1.0),
        lambda: run_sd3(pipe, seed=1),
        lambda: run_image_to_image(other, 0.34),
    ]
    fresh = []
    for generate in runs:
        with sc.cached(pipe, schedule):
            fresh.append(generate())
    with sc.cached(pipe, schedule) as run:
        for generate, expected in zip(runs, fresh, strict=True):
            assert torch.equal(generate(), expected)
    assert (run.summary().finished, run.summary().broken_off) == (len(runs), 0)


UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda t: t,
    "t / 1000": lambda t: t / 1000,
    "1 - t / 1000": lambda t: 1 - t / 1000,
}


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmsolver++", "heun"])
@pytest.mark.parametrize(
    ("announced", "unit"),
    [(True, "t"), (True, "t / 1000"), (True, "1 - t / 1000"), (False, "t"), (False, "t / 1000")],
)
def test_a_loop_of_ones_own_that_starts_in_the_middle(
    solver: str, announced: bool, unit: str
) -> None:
    for start in range(STEPS):
        pipe = WitnessPipe(SOLVERS[solver]())
        with sc.cached(pipe, witness_schedule(STEPS, 3)) as run:
            for generation in range(2):
                pipe.generate(generation, start=start, announced=announced, unit=UNITS[unit])
        pipe.transformer.assert_right(run)
        assert (run.summary().finished, run.summary().broken_off) == (2, 0)


# ----------------------------------------------------------------- two denoisers, one trajectory


@pytest.mark.parametrize("boundary", [0.3, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("interval", [2, 3])
def test_two_denoisers_take_turns(boundary: float, interval: int) -> None:
    """As in Wan 2.2, with guidance in two calls of each."""
    pipe = wan_pipe(transformer_2=wan_transformer(1), boundary_ratio=boundary)
    schedule = sc.Schedule.uniform(pipe, STEPS, interval)
    assert {path.split(".")[0] for path in schedule.rows} == {"transformer", "transformer_2"}
    _run, by_hand = compare_with_by_hand(
        pipe, schedule, functools.partial(run_wan, guidance_scale_2=2.0), branch_of=by_text
    )
    first_of_second = sum(float(t) >= 1000 * boundary for t in pipe.scheduler.timesteps)
    late = (-first_of_second) % interval
    assert by_hand.recomputed == 2 * 2 * len(schedule.rows) // 2 * (late > 0)


def test_two_denoisers_and_what_broke_off_in_the_second() -> None:
    pipe = wan_pipe(transformer_2=wan_transformer(1), boundary_ratio=0.85)
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    with sc.cached(pipe, schedule):
        fresh = run_wan(pipe)
    with sc.cached(pipe, schedule) as run:
        for last in range(STEPS):
            run_wan(pipe, seed=1, callback_on_step_end=interrupting_after(last))
            assert torch.equal(run_wan(pipe), fresh)
    assert run.summary().broken_off == STEPS - 1


# ------------------------------------------------------------------------- generations broken off


def interrupting_after(last: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == last
        return {}

    return callback


class Stop(Exception):
    pass


def stopping_after(last: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            raise Stop
        return {}

    return callback


BROKEN_OFF_BY = {"interrupt": interrupting_after, "exception": stopping_after}


@pytest.mark.parametrize("how", BROKEN_OFF_BY)
@pytest.mark.parametrize("flow", ["euler", "heun", "unipc"])
def test_a_pipeline_broken_off_by_a_callback(how: str, flow: str) -> None:
    pipe = sd3_pipe(FLOWS[flow]())
    steps = steps_of(pipe, STEPS)
    schedule = sc.Schedule.uniform(pipe, steps, 3)
    with sc.cached(pipe, schedule) as alone:
        fresh = run_sd3(pipe)
    for last, step in enumerate(step_of_each(pipe.scheduler.timesteps)):
        with sc.cached(pipe, schedule) as run:
            with suppress(Stop):
                run_sd3(pipe, seed=1, callback_on_step_end=BROKEN_OFF_BY[how](last))
            reused = run.summary().reused
            assert torch.equal(run_sd3(pipe), fresh)
        summary = run.summary()
        assert summary.reused - reused == alone.summary().reused
        broken = step < steps - 1
        assert (summary.finished, summary.broken_off) == (2 - broken, broken)


@pytest.mark.parametrize("how", BROKEN_OFF_BY)
def test_a_bare_module_broken_off_by_a_callback(how: str) -> None:
    """Without a scheduler, a first step begun again looks like guidance in two calls."""
    pipe = sd3_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    for last in range(STEPS):
        with sc.cached(pipe.transformer, with_step_computed(schedule, 1 if last == 0 else 0)):
            fresh = run_sd3(pipe)
        with sc.cached(pipe.transformer, schedule) as run:
            with suppress(Stop):
                run_sd3(pipe, seed=1, callback_on_step_end=BROKEN_OFF_BY[how](last))
            assert torch.equal(run_sd3(pipe), fresh)
        recomputed = {"it could have been another generation's value": len(schedule.rows)}
        assert run.summary().recomputed == (recomputed if last == 0 else {})


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("skipped", [0, 1])
def test_a_bare_module_broken_off_and_then_begun_further_along_with_other_latents(
    stop: int, skipped: int, mode: Callable[[], Any]
) -> None:
    """As image to image does. In time it looks like the steps that come, but not in space."""
    model, schedule = Witness(), witness_schedule(STEPS, STEPS)
    ends_early = pytest.raises(sc.ScheduleMismatchError, match=r"ended after 5 steps.*covers 6")
    with ends_early if skipped else nullcontext(), mode(), sc.cached(model, schedule) as run:
        for generation, steps in enumerate((range(stop), range(stop + skipped, STEPS))):
            x = noise(1, 4, 16, 16, seed=generation)
            for step in steps:
                for branch in "cu" if step < stop + 1 else "uc":  # the other comes first later on
                    t = torch.tensor([1000.0 - 150 * step])
                    model.tell(generation, branch, step, x, t, PROMPTS[branch])
                x = 0.8 * x + 0.1 * torch.randn_like(x)
    assert model.foreign() == []
    reasons = list(run.summary().recomputed)
    assert reasons[0] == "it could have been another generation's value"


@pytest.mark.parametrize("solver", ["ddim", "euler-ancestral", "dpmsolver++", "lcm"])
@pytest.mark.parametrize("steps", [4, 8, 20])
def test_latents_of_a_generation_have_to_do_with_each_other(solver: str, steps: int) -> None:
    """But for few steps that each draw all of the noise anew, which are computed and counted."""
    pipe, schedule = WitnessPipe(SOLVERS[solver]()), witness_schedule(steps, 2)
    pipe.scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    picture = torch.randn(1, 4, 16, 16)
    x = torch.randn(1, 4, 16, 16) * pipe.scheduler.init_noise_sigma
    alphas = pipe.scheduler.alphas_cumprod
    with sc.cached(pipe.transformer, schedule) as run:
        for step, t in enumerate(pipe.scheduler.timesteps):
            scaled = pipe.scheduler.scale_model_input(x, t)
            pipe.transformer.tell(0, "c", step, scaled, t.reshape(1), PROMPTS["c"])
            alpha = alphas[int(t)]
            out = (scaled - alpha.sqrt() * picture) / (1 - alpha).sqrt()
            x = pipe.scheduler.step(out, t, x).prev_sample
    pipe.transformer.assert_right(run)
    draws_anew = solver == "lcm" or (solver, steps) == ("euler-ancestral", 4)
    assert (run.summary().recomputed == {}) is not draws_anew


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_bare_module_broken_off_and_then_begun_at_another_step_than_planned(stop: int) -> None:
    pipe, schedule = WitnessPipe(SOLVERS["ddim"]()), witness_schedule(STEPS, STEPS)
    pipe.scheduler.set_timesteps(STEPS)
    schedule = replace(schedule, timesteps=tuple(pipe.scheduler.timesteps.tolist()))
    with sc.cached(pipe.transformer, schedule) as run:
        pipe.generate(0, stop=stop)
        pipe.generate(1, start=stop + 1)
        run.reset()
    assert pipe.transformer.foreign() == []


def with_step_computed(schedule: sc.Schedule, step: int) -> sc.Schedule:
    rows = {
        path: sc.Row(tuple(due or i == step for i, due in enumerate(row.computed)))
        for path, row in schedule.rows.items()
    }
    return sc.Schedule(schedule.num_steps, rows, schedule.layers)


@pytest.mark.parametrize("where", ["layer", "denoiser", "scheduler"])
@pytest.mark.parametrize("handle", ["pipeline", "module"])
def test_an_exception_in_the_middle(where: str, handle: str) -> None:
    pipe = dit_pipe(SOLVERS["euler"]())
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    model = pipe if handle == "pipeline" else pipe.transformer
    with sc.cached(model, schedule):
        fresh = run_dit(pipe)
    for calls in range(1, STEPS):
        with sc.cached(model, schedule) as run:
            with breaking(pipe, where, calls), pytest.raises(Stop):
                run_dit(pipe, seed=1)
            got = run_dit(pipe)
        if calls == 1 and (handle, where) == ("module", "scheduler"):
            assert sum(run.summary().recomputed.values()) == len(schedule.rows)
        else:
            assert torch.equal(got, fresh)
            assert run.summary().recomputed == {}


@contextmanager
def breaking(pipe: Any, where: str, calls: int) -> Iterator[None]:
    """A part of the pipeline raises at its n-th call."""
    left = iter([None] * (calls - 1))

    def count(*_: Any) -> None:
        if next(left, Stop) is Stop:
            raise Stop

    if where == "scheduler":
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *args, **kwargs: (count(), step(*args, **kwargs))[1]
        yield
        pipe.scheduler.step = step
        return
    block = pipe.transformer.transformer_blocks[1]
    module = block.norm1 if where == "layer" else pipe.transformer.proj_out_2
    hook = module.register_forward_hook(count)
    yield
    hook.remove()


# ------------------------------------------------------------------- one transformer, two pipelines

HANDLES = pytest.mark.parametrize("handle", ["pipeline", "module"])


@HANDLES
@pytest.mark.parametrize("others", [STEPS - 2, STEPS, STEPS + 3])
@pytest.mark.parametrize(
    ("first", "second"),
    [("ddim", "ddim"), ("ddim-trailing", "ddim-trailing"), ("euler", "euler"), ("ddim", "euler")],
)
def test_another_pipeline_in_between(handle: str, others: int, first: str, second: str) -> None:
    """The second is right or refused; the first is what it would be alone."""
    labels = (1,) if others == STEPS else (2, 3)
    pipe = dit_pipe(SOLVERS[first]())
    other = ready(diffusers.DiTPipeline(pipe.transformer, pipe.vae, scheduler=SOLVERS[second]()))
    schedule = sc.Schedule.uniform(pipe, STEPS, 2)
    model = pipe if handle == "pipeline" else pipe.transformer
    with sc.cached(pipe, schedule):
        fresh = [run_dit(pipe, seed=seed) for seed in (0, 1)]
    longer = sc.Schedule.uniform(pipe, others, 2)
    right = [run_dit(other, others, seed=2, labels=labels)]
    with sc.cached(other, longer):
        right.append(run_dit(other, others, seed=2, labels=labels))
    with sc.cached(model, schedule) as run:
        assert torch.equal(run_dit(pipe), fresh[0])
        with suppress(sc.ScheduleMismatchError):
            got = run_dit(other, others, seed=2, labels=labels)
            assert any(torch.equal(got, one) for one in right)
        assert torch.equal(run_dit(pipe, seed=1), fresh[1])
    assert run.summary().finished >= 2


@pytest.mark.parametrize("solver", ["ddim", "ddim-trailing", "euler", "dpmsolver++", "heun"])
@pytest.mark.parametrize("steps", [STEPS - 2, STEPS, STEPS + 3])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_another_pipeline_after_a_generation_broken_off(solver: str, steps: int, stop: int) -> None:
    pipe = WitnessPipe(SOLVERS[solver]())
    other = WitnessPipe(SOLVERS[solver](), pipe.transformer)
    with sc.cached(pipe, witness_schedule(STEPS, 6)):
        pipe.generate("first", stop=stop)
        with suppress(sc.ScheduleMismatchError):
            other.generate("other", steps)
        pipe.generate("again")
    assert pipe.transformer.foreign() == []


@pytest.mark.parametrize("solver", ["ddim", "ddim-trailing", "euler", "dpmsolver++", "heun"])
@pytest.mark.parametrize("steps", [STEPS - 2, STEPS])
def test_another_pipeline_after_a_generation_broken_off_in_its_first_step(
    solver: str, steps: int
) -> None:
    pipe = WitnessPipe(SOLVERS[solver]())
    other = WitnessPipe(SOLVERS[solver](), pipe.transformer)
    with sc.cached(pipe, witness_schedule(STEPS, 6)):
        pipe.generate("first", stop=1)
        with suppress(sc.ScheduleMismatchError):
            other.generate("other", steps)
        pipe.generate("again")
    assert pipe.transformer.foreign() == []


@pytest.mark.parametrize(
    "stop",
    [1, 2, 3, 9],
)
def test_several_generations_from_one_list_of_timesteps(stop: int) -> None:
    """A loop of one's own may tell the scheduler once, and begin again after breaking off."""
    pipe = WitnessPipe(SOLVERS["ddim"]())
    pipe.scheduler.set_timesteps(STEPS)
    with sc.cached(pipe, witness_schedule(STEPS, 6)):
        pipe.generate(0, stop=stop, announce=False)
        pipe.generate(1, announce=False)
    assert pipe.transformer.foreign() == []


@HANDLES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_latents_in_a_buffer_that_stays(handle: str, mode: Callable[[], Any], stop: int) -> None:
    """As for CUDA graphs: every generation, broken off or not, is written into one tensor."""
    pipe = WitnessPipe(SOLVERS["ddim"]())
    with (
        mode(),
        sc.cached(pipe if handle == "pipeline" else pipe.transformer, witness_schedule(STEPS, 6)),
    ):
        buffer = torch.zeros(1, 4, 2, 2)
        pipe.generate(0, stop=stop, into=buffer)
        pipe.generate(1, into=buffer)
    assert pipe.transformer.foreign() == []


# ----------------------------------------------------------------------- the next one is different


@HANDLES
def test_the_next_generation_has_another_shape(handle: str) -> None:
    """Another batch, resolution, prompt length, and guidance or none, under one handle."""
    pipe = sd3_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    model = pipe if handle == "pipeline" else pipe.transformer
    options: list[dict[str, Any]] = [
        {},
        {"batch": 2},
        {"size": 32},
        {"size": 96},
        {"tokens": 3},
        {"tokens": 9},
        {"guidance_scale": 1.0},
        {},
    ]
    fresh = []
    for given in options:
        with sc.cached(model, schedule):
            fresh.append(run_sd3(pipe, **given))
    with sc.cached(model, schedule) as run:
        for given, expected in zip(options, fresh, strict=True):
            assert torch.equal(run_sd3(pipe, **given), expected)
    assert run.summary().recomputed == {}
    assert run.summary().finished == len(options)


@HANDLES
@pytest.mark.parametrize("last", range(1, STEPS))
def test_another_shape_after_a_generation_broken_off(handle: str, last: int) -> None:
    pipe = sd3_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    model = pipe if handle == "pipeline" else pipe.transformer
    with sc.cached(model, schedule):
        fresh = run_sd3(pipe, batch=2, size=32)
    with sc.cached(model, schedule) as run:
        run_sd3(pipe, callback_on_step_end=interrupting_after(last))
        assert torch.equal(run_sd3(pipe, batch=2, size=32), fresh)
    assert run.summary().recomputed == {}


# ----------------------------------------------------------------------------------- calls by hand


def call_by_hand(pipe: Any, timestep: float, seed: int = 5) -> Tensor:
    given = {"timestep": torch.tensor([timestep]), "class_labels": torch.tensor([1])}
    out: Tensor = pipe.transformer(noise(1, 4, 4, 4, seed=seed), **given).sample
    return out


@pytest.mark.parametrize("solver", ["ddim", "ddim-trailing", "euler", "dpmsolver++", "heun"])
def test_calls_by_hand_do_no_harm_to_a_pipeline(solver: str) -> None:
    """Before, between and after generations, at timesteps of the list and at others."""
    pipe = dit_pipe(SOLVERS[solver]())
    plain = call_by_hand(pipe, 500.0)
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    with sc.cached(pipe, schedule):
        fresh = [run_dit(pipe, seed=seed, guidance=1.0) for seed in range(2)]
    listed = pipe.scheduler.timesteps.tolist()
    for times, timestep in enumerate([*listed[::2], 1000.0, 999.0, 500.0, listed[-1] + 0.5]):
        with sc.cached(pipe, schedule) as run:
            for seed in range(2):
                for _ in range(1 + times % 2):
                    call_by_hand(pipe, timestep)
                assert torch.equal(run_dit(pipe, seed=seed, guidance=1.0), fresh[seed])
            assert torch.equal(call_by_hand(pipe, 500.0), plain)
            run.reset()
        assert run.summary().finished >= 2


@pytest.mark.parametrize("times", [1, 2])
def test_calls_by_hand_do_no_harm_to_a_bare_module(times: int) -> None:
    pipe = dit_pipe()
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    model = pipe.transformer
    with sc.cached(model, schedule):
        fresh = [run_dit(pipe, seed=seed, guidance=1.0) for seed in range(2)]
    with sc.cached(model, with_step_computed(schedule, 1)):
        careful = [run_dit(pipe, seed=seed, guidance=1.0) for seed in range(2)]
    plain = [run_dit(pipe, seed=seed, guidance=1.0) for seed in range(2)]
    if times == 2:  # two calls alike, and a third in what could be the same step
        careful = plain
    first, *others = pipe.scheduler.timesteps.tolist()
    for timestep in (first, *others, 500.0, 1.0):
        with sc.cached(model, schedule) as run:
            for seed in range(2):
                for _ in range(times):
                    call_by_hand(pipe, timestep)
                before = sum(run.summary().recomputed.values())
                got = run_dit(pipe, seed=seed, guidance=1.0)
                assert torch.equal(got, (careful if timestep == first else fresh)[seed])
                recomputed = sum(run.summary().recomputed.values()) - before
                calls = 0 if timestep != first else 1 if times == 1 else STEPS - 2
                assert recomputed == calls * len(schedule.rows)
        assert run.summary().finished == 2


def test_a_call_by_hand_further_back_than_a_bare_generation_begins_is_refused_in_the_end() -> None:
    pipe = WitnessPipe(SOLVERS["ddim"]())
    with (
        pytest.raises(sc.ScheduleMismatchError, match=r"come to step 7.*covers 6.*run\.reset"),
        sc.cached(pipe.transformer, witness_schedule(STEPS, 3)),
    ):
        pipe.transformer.tell("by hand", "c", 0, torch.randn(1, 4, 2, 2), 999.0, PROMPTS["c"])
        pipe.generate(0)


@pytest.mark.parametrize("timestep", [300.0, 500.0, 900.0])
def test_a_call_by_hand_before_a_bare_generation_of_two_steps(timestep: float) -> None:
    pipe = WitnessPipe(SOLVERS["euler"]())
    run = sc.enable(pipe.transformer, witness_schedule(2, 2))
    x, t = torch.randn(1, 4, 2, 2), torch.tensor([timestep]).double()
    pipe.transformer.tell("by hand", "c", 0, x, t, PROMPTS["c"])
    for generation in range(3):
        pipe.generate(generation, 2)
    run.disable()
    assert pipe.transformer.foreign() == []


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmsolver++"])
def test_calls_by_hand_after_the_generation_of_a_pipeline_are_computed(solver: str) -> None:
    """All steps that its scheduler announced are over; nothing else was announced."""
    pipe = dit_pipe(SOLVERS[solver]())
    plain = [call_by_hand(pipe, t, seed) for seed, t in enumerate((900.0, 600.0))]
    with sc.cached(pipe, sc.Schedule.uniform(pipe, STEPS, 3)) as run:
        run_dit(pipe)
        got = [call_by_hand(pipe, t, seed) for seed, t in enumerate((900.0, 600.0))]
        run.reset()
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1], plain[1])


def test_a_call_by_hand_after_the_generation_of_a_pipeline_is_no_reason_to_refuse() -> None:
    pipe = dit_pipe(SOLVERS["euler"]())
    with sc.cached(pipe, sc.Schedule.uniform(pipe, STEPS, 3)):
        run_dit(pipe)
        call_by_hand(pipe, 500.0)


@pytest.mark.parametrize(
    "solver",
    [
        "euler",
        "dpmsolver++",
        "ddim-trailing",
    ],
)
def test_a_call_by_hand_beyond_the_last_timestep(solver: str) -> None:
    pipe = dit_pipe(SOLVERS[solver]())
    plain = call_by_hand(pipe, 0.0)
    with sc.cached(pipe, sc.Schedule.uniform(pipe, STEPS, 3)) as run:
        run_dit(pipe)
        assert torch.equal(call_by_hand(pipe, 0.0), plain)
        run.reset()


@HANDLES
def test_many_calls_by_hand_do_not_fill_the_memory(handle: str) -> None:
    pipe = WitnessPipe(SOLVERS["euler"]())
    model = pipe if handle == "pipeline" else pipe.transformer
    x = torch.randn(1, 4, 2, 2)
    with sc.cached(model, witness_schedule(STEPS, 3)) as run:
        pipe.generate(0)
        held = []
        for _ in range(30):
            pipe.transformer.tell("by hand", "c", 0, x.clone(), 500.0, PROMPTS["c"])
            held.append(run.summary().held_bytes)
        run.reset()
    assert max(held) <= 4 * x.nbytes


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_call_by_hand_in_a_callback(solver: str, at: int) -> None:
    """A preview of the next step: its value must not find its way into the generation."""
    pipe = WitnessPipe(SOLVERS[solver]())
    step, calls = pipe.scheduler.step, iter(range(STEPS))

    def stepping(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        if next(calls) == at:
            x, t = torch.randn(1, 4, 2, 2), pipe.scheduler.timesteps[at + 1].reshape(1).double()
            pipe.transformer.tell("preview", "c", 0, x, t, PROMPTS["c"])
        return out

    pipe.scheduler.step = stepping
    with sc.cached(pipe, witness_schedule(STEPS, 2)):
        pipe.generate(0)
    assert [pair for pair in pipe.transformer.foreign() if pair[0][0] == 0] == []


# -------------------------------------------------------------------------- timesteps of all kinds

KINDS: dict[str, Callable[[float], Any]] = {
    "float": float,
    "int": int,
    "0-d": lambda t: torch.tensor(t),
    "0-d integer": lambda t: torch.tensor(int(t)),
    "[batch]": lambda t: torch.full((2,), t),
    "[batch], double": lambda t: torch.full((2,), t, dtype=torch.float64),
    "[batch, tokens]": lambda t: torch.full((2, 3), t),
    "[batch, tokens], the first of which is done": lambda t: torch.tensor([[0.0, t, t]] * 2),
    "bfloat16": lambda t: torch.full((2,), t).bfloat16(),
    "of [0, 1], bfloat16": lambda t: torch.full((2,), t / 1000).bfloat16(),
    "of [0, 1], half": lambda t: torch.full((2,), t / 1000).half(),
    "rising": lambda t: torch.full((2,), 1 - t / 1000),
    "rising, bfloat16": lambda t: torch.full((2,), 1 - t / 1000).bfloat16(),
    "from 1000 less": lambda t: 1000 - t,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["ddim-trailing", "euler"])
def test_timesteps_of_any_kind(kind: str, solver: str) -> None:
    for handle, branches in itertools.product(("pipeline", "module"), ("c", "uc")):
        pipe = WitnessPipe(SOLVERS[solver]())
        schedule = witness_schedule(STEPS, 3)
        with sc.cached(pipe if handle == "pipeline" else pipe.transformer, schedule) as run:
            for generation in range(3):
                pipe.scheduler.set_timesteps(STEPS)
                for step, t in enumerate(pipe.scheduler.timesteps):
                    x = pipe.scheduler.scale_model_input(torch.randn(2, 4, 2, 2), t)
                    for branch in branches:
                        given, prompt = KINDS[kind](float(t)), PROMPTS[branch]
                        pipe.transformer.tell(generation, branch, step, x, given, prompt)
                    pipe.scheduler.step(torch.zeros_like(x), t, x)
        pipe.transformer.assert_right(run)
        assert run.summary().recomputed == {}
        assert run.summary().reused == 3 * len(branches) * schedule.reused
        assert (run.summary().finished, run.summary().broken_off) == (3, 0)


def test_timesteps_for_every_token_of_a_pipeline() -> None:
    pipe = wan_pipe(expand_timesteps=True)
    schedule = sc.Schedule.uniform(pipe, STEPS, 3)
    run, _ = compare_with_by_hand(pipe, schedule, run_wan, branch_of=by_text)
    assert run.summary().recomputed == {}


def test_frames_that_are_denoised_one_after_the_other() -> None:
    """Diffusion forcing: the largest timestep stands still while the first frames move."""
    times = [1000.0, 750.0, 500.0, 250.0]
    rows = [[times[min(max(k - 2 * f, 0), 3)] for f in range(3)] for k in range(8)]
    schedule, model = witness_schedule(len(rows), 4), Witness()
    with (
        pytest.raises(sc.ScheduleMismatchError, match=r"ended after 4 steps.*covers 8"),
        sc.cached(model, schedule) as run,
    ):
        for step, row in enumerate(rows):
            model.tell(0, "c", step, torch.randn(1, 3, 2), torch.tensor([row]), PROMPTS["c"])
    assert model.foreign() == []
    assert run.summary().finished == 0


@pytest.mark.parametrize("interval", [2, 3])
def test_a_solver_whose_timesteps_rise(interval: int) -> None:
    scheduler = diffusers.DDIMInverseScheduler(clip_sample=False)
    scheduler.scale_model_input = lambda x, t: x
    pipe = WitnessPipe(scheduler)
    with sc.cached(pipe, witness_schedule(STEPS, interval)) as run:
        for generation in range(2):
            pipe.generate(generation, branches="uc")
    pipe.transformer.assert_right(run)
    assert (run.summary().finished, run.summary().recomputed) == (2, {})


@pytest.mark.parametrize("flow", ["euler", "heun", "unipc"])
def test_timesteps_that_round_to_one_number(flow: str) -> None:
    """A solver that counts its steps tells them apart where bfloat16 does not."""
    scheduler = FLOWS[flow](12.0)
    scheduler.scale_model_input = lambda x, t: x
    pipe = WitnessPipe(scheduler)
    scheduler.set_timesteps(30)
    steps = step_of_each(scheduler.timesteps)[-1] + 1
    assert step_of_each(scheduler.timesteps.bfloat16())[-1] + 1 < steps
    with sc.cached(pipe, witness_schedule(steps, 3)) as run:
        for generation in range(2):
            pipe.generate(generation, 30, unit=Tensor.bfloat16, branches="uc")
    pipe.transformer.assert_right(run)
    assert (run.summary().finished, run.summary().broken_off) == (2, 0)


def test_timesteps_that_round_to_one_number_where_nothing_counts_steps() -> None:
    """Nothing is mixed, and the summary says that the generations went wrong."""
    pipe = WitnessPipe(SOLVERS["ddim"]())
    with sc.cached(pipe, witness_schedule(333, 3)) as run:
        for generation in range(2):
            pipe.generate(generation, 333, unit=Tensor.bfloat16)
    assert pipe.transformer.foreign() == []
    assert run.summary().broken_off or run.summary().steps_under_way


def test_another_number_of_steps_is_refused_at_once_with_rounded_timesteps() -> None:
    pipe = WitnessPipe(SOLVERS["ddim"]())
    with sc.cached(pipe, witness_schedule(STEPS, 3)) as run:
        with pytest.raises(sc.ScheduleMismatchError, match=r"\b4 steps.*\b6\b"):
            pipe.generate(0, 4, unit=Tensor.bfloat16)
        run.reset()


@pytest.mark.parametrize(
    "times",
    [
        [80.0, 9.72, 0.47, 0.002],  # sigmas of Karras et al., for 4 steps
        [0.0, 0.6, 0.85],  # rectified flow from noise to image, shifted
        [1000.0, 8.0, 0.0],
    ],
)
def test_few_steps_that_lie_far_apart_without_a_scheduler(times: list[float]) -> None:
    model, schedule = Witness(), witness_schedule(len(times), 2)
    with sc.cached(model, schedule) as run:
        for generation in range(2):
            for step, t in enumerate(times):
                x = torch.randn(1, 2, 2)
                model.tell(generation, "c", step, x, torch.tensor([t]), PROMPTS["c"])
    model.assert_right(run)
    assert run.summary().finished == 2
