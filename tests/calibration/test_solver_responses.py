"""The solver's responses to the denoiser's outputs, against closed forms and real solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

import smoothcache as sc
from smoothcache.calibration.recording import combined_outputs, record_generation
from smoothcache.calibration.solver_responses import calls_of, measure_responses
from smoothcache.calibration.trajectory import SolverResponses

STEPS = 8


class Denoiser(nn.Module):
    """Says something smooth of its input."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(4, channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        scale = 1 + torch.as_tensor(timestep).float().mean() / 1000
        shift = 0 if label is None else 0.1 * label.float().reshape(-1, 1, 1, 1)
        return torch.tanh(self.mix(sample) * scale) + shift


class Pipeline:
    """A minimal pipeline: a denoiser, a noise scheduler, and guidance in one batch or two calls."""

    def __init__(
        self, scheduler: Any, guidance: str = "none", seeded: bool = True, channels: int = 4
    ) -> None:
        self.transformer, self.scheduler = Denoiser(channels), scheduler
        self.guidance, self.seeded = guidance, seeded
        self.components = {"transformer": self.transformer, "scheduler": scheduler}

    @torch.no_grad()
    def sample(self, i: int, num_steps: int = STEPS) -> Tensor:
        scheduler = self.scheduler
        scheduler.set_timesteps(num_steps)
        generator = torch.Generator().manual_seed(i) if self.seeded else None
        x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(i))
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            scaled = x
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(x, t)
            output = self.guided(scaled, t)[:, :4]
            takes_noise = isinstance(scheduler, DPMSolverMultistepScheduler)
            options = {"generator": generator} if takes_noise else {}
            x = scheduler.step(output, t, x, **options).prev_sample
        return x

    def guided(self, x: Tensor, t: Tensor) -> Tensor:
        ones, zeros = torch.ones(len(x)), torch.zeros(len(x))
        if self.guidance == "batch":
            both = self.transformer(torch.cat([x, x]), t, torch.cat([ones, zeros]))
            with_prompt, without = both.chunk(2)
            return without + 3.0 * (with_prompt - without)
        if self.guidance == "calls":
            with_prompt = self.transformer(x, t, ones)
            without = self.transformer(x, t, zeros)
            return without + 3.0 * (with_prompt - without)
        return self.transformer(x, t)


def measured(pipe: Any, sample: Callable[[], Any]) -> SolverResponses:
    tape, generation = record_generation(pipe, sample)
    return measure_responses(pipe, sample, tape, generation)


def one_step_table(kept: list[float], moved: list[float]) -> Any:
    """h of a solver with x_(t+1) = kept_t x_t + moved_t e_t."""
    steps = len(kept)
    table = np.zeros((steps, steps + 1))
    for t in range(steps):
        for later in range(t + 1, steps + 1):
            table[t, later] = moved[t] * np.prod(kept[t + 1 : later])
    return table


@pytest.mark.parametrize("guidance", ["none", "batch", "calls"])
def test_ddim_has_its_closed_form(guidance: str) -> None:
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = Pipeline(scheduler, guidance)
    responses = measured(pipe, lambda: pipe.sample(0))
    alphas = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
    # The next timestep of diffusers is a fixed stride away, which trailing spacing keeps to.
    stride = 1000 // STEPS
    nexts = [
        float(scheduler.alphas_cumprod[int(t) - stride])
        if int(t) >= stride
        else float(scheduler.final_alpha_cumprod)
        for t in scheduler.timesteps
    ]
    kept = [(b / a) ** 0.5 for a, b in zip(alphas, nexts, strict=True)]
    moved = [
        (1 - b) ** 0.5 - k * (1 - a) ** 0.5 for a, b, k in zip(alphas, nexts, kept, strict=True)
    ]
    assert responses.knows_end
    np.testing.assert_allclose(responses.table, one_step_table(kept, moved), rtol=2e-3, atol=1e-5)
    weights = [w for branch in responses.guidance.weights for w in branch]
    expected = {"none": [1.0], "batch": [3.0, -2.0], "calls": [3.0, -2.0]}[guidance]
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    assert responses.guidance.parts == (2 if guidance == "batch" else 1)


def test_flow_matching_has_its_closed_form() -> None:
    pipe = Pipeline(scheduler := FlowMatchEulerDiscreteScheduler(shift=3.0))
    responses = measured(pipe, lambda: pipe.sample(0))
    moved = np.diff(scheduler.sigmas.double().numpy()).tolist()
    expected = one_step_table([1.0] * STEPS, moved)
    np.testing.assert_allclose(responses.table, expected, rtol=1e-3, atol=1e-6)


def test_euler_has_its_closed_form_in_scaled_latents() -> None:
    pipe = Pipeline(scheduler := EulerDiscreteScheduler())
    responses = measured(pipe, lambda: pipe.sample(0))
    sigmas = scheduler.sigmas.double().numpy()
    unscaled = one_step_table([1.0] * STEPS, np.diff(sigmas).tolist())
    scales = np.array([1 / (s**2 + 1) ** 0.5 for s in sigmas[:-1]] + [1.0])
    np.testing.assert_allclose(responses.table, unscaled * scales, rtol=1e-3, atol=1e-6)


SOLVERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "v-prediction": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "euler": EulerDiscreteScheduler,
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm-2m": lambda: DPMSolverMultistepScheduler(solver_order=2),
    "dpm-3m": lambda: DPMSolverMultistepScheduler(solver_order=3, use_karras_sigmas=True),
    "dpm-sde": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "unipc": UniPCMultistepScheduler,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_states_follow_from_outputs_and_responses(name: str) -> None:
    """Two generations of one seed under other outputs differ as the responses say."""
    pipe = Pipeline(SOLVERS[name](), "batch")
    tape, generation = record_generation(pipe, lambda: pipe.sample(0))
    responses = measure_responses(pipe, lambda: pipe.sample(0), tape, generation)
    with torch.no_grad():
        pipe.transformer.mix.weight.mul_(0.9)
    other_tape, other = record_generation(pipe, lambda: pipe.sample(0))
    before, after = (
        combined_outputs(x, calls_of(x), responses.guidance) for x in (tape, other_tape)
    )
    change = (after - before).double().numpy()
    for later in range(1, STEPS):
        told = np.tensordot(responses.table[:later, later], change[:later], axes=1)
        found = (other.latents[later] - generation.latents[later]).double()
        found_once = responses.guidance.latents(found).numpy()
        assert np.linalg.norm(told - found_once) < 1e-3 * np.linalg.norm(found_once) + 1e-4


def test_learned_variances_are_left_out() -> None:
    pipe = Pipeline(DDIMScheduler(clip_sample=False), "batch", channels=8)
    assert measured(pipe, lambda: pipe.sample(0)).guidance.channels == 4


def test_a_sampler_of_no_library() -> None:
    model = Denoiser()

    @torch.no_grad()
    def sample() -> Tensor:
        x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
        for t in (1.0, 0.75, 0.5, 0.25):
            x = 0.9 * x - 0.25 * model(x, torch.tensor([t]))
        return x

    responses = measured(model, sample)
    expected = one_step_table([0.9] * 4, [-0.25] * 4)
    np.testing.assert_allclose(responses.table, expected, rtol=1e-4, atol=1e-7)
    assert responses.knows_end


def test_an_end_that_is_not_shown_continues_the_last_step() -> None:
    model = Denoiser()

    @torch.no_grad()
    def sample() -> Tensor:
        x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - 0.25 * model(x, torch.tensor([t]))
        return x.mean()

    responses = measured(model, sample)
    assert not responses.knows_end
    np.testing.assert_allclose(responses.table[:, -1], [-0.25] * 4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}]
)
def test_clipping_and_thresholding_are_refused(options: dict[str, bool]) -> None:
    pipe = Pipeline(DDIMScheduler(**options))
    with pytest.raises(sc.CalibrationError, match="not linear"):
        measured(pipe, lambda: pipe.sample(0))
    assert "step" not in vars(pipe.scheduler)


def test_unseeded_noise_is_refused() -> None:
    pipe = Pipeline(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), seeded=False)
    with pytest.raises(sc.CalibrationError, match="not deterministic"):
        measured(pipe, lambda: pipe.sample(0))


def test_two_calls_a_step_are_refused_with_a_reason() -> None:
    pipe = Pipeline(HeunDiscreteScheduler())
    with pytest.raises(sc.CalibrationError, match="two calls per step"):
        measured(pipe, lambda: pipe.sample(0))


def test_guidance_that_changes_is_refused() -> None:
    model = Denoiser()

    @torch.no_grad()
    def sample() -> Tensor:
        x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
        for number, t in enumerate((1.0, 0.75, 0.5, 0.25)):
            outputs = [model(x, torch.tensor([t]), torch.tensor([y])) for y in (0, 1)]
            x = x - 0.25 * (outputs[0] + number * (outputs[1] - outputs[0]))
        return x

    with pytest.raises(sc.CalibrationError, match="not linear"):
        measured(model, sample)


def test_nothing_is_left_on_model_and_scheduler() -> None:
    pipe = Pipeline(DDIMScheduler(clip_sample=False))
    kind, names = type(pipe.transformer), set(vars(pipe.scheduler))
    measured(pipe, lambda: pipe.sample(0))
    assert type(pipe.transformer) is kind
    assert "step" not in vars(pipe.scheduler)
    assert names <= set(vars(pipe.scheduler))
