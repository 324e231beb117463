"""Samplers, pipelines and servers that were not written for the library, from start to end."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import tiny  # noqa: E402

STEPS = 8


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def without_zeros(model: nn.Module) -> nn.Module:
    """Weights that start as zero would hide what reaches them."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def dit(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return without_zeros(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=8,
        )
    )


def noise(seed: int = 0, channels: int = 4) -> Tensor:
    return torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def timestep(step: int, steps: int = STEPS) -> Tensor:
    return torch.tensor([1000 - 900 * step // steps])


def said(action: Callable[[], Any]) -> list[str]:
    """Warnings of the library."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(x.message) for x in caught if issubclass(x.category, sc.SmoothCacheWarning)]


# -------------------------------------------------------- arguments that change at each step


class Options(nn.Module):
    """A denoiser that takes a control and a mapping of options, as ComfyUI passes one."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = dit()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        control: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        shift = 0 if control is None else 0.01 * control.mean()
        labels = torch.ones(len(x), dtype=torch.long)
        output: Tensor = self.dit(x, timestep.expand(len(x)), labels).sample + shift
        return output


ARGUMENTS: dict[str, Callable[[int, Tensor], dict[str, Any]]] = {
    "none": lambda step, x: {},
    "a control wider than the latents": lambda step, x: {"control": torch.cat([x, x], 1)},
    "sigmas of the step": lambda step, x: {
        "transformer_options": {"sigmas": torch.tensor([1 - step / STEPS])}
    },
    "sigmas that are left": lambda step, x: {
        "transformer_options": {"sigmas": [1 - k / STEPS for k in range(step, STEPS)]}
    },
    "options of ComfyUI": lambda step, x: {
        "transformer_options": {
            "sigmas": torch.tensor([1 - step / STEPS]),
            "sample_sigmas": torch.linspace(1, 0, STEPS + 1),
            "cond_or_uncond": [0],
            "uuids": ["a"],
            "step": step,
        }
    },
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_change_at_each_step_are_no_branches(
    arguments: Callable[[int, Tensor], dict[str, Any]],
) -> None:
    model = Options()

    def sample(i: int, num_inference_steps: int = STEPS) -> Tensor:
        x = noise(i)
        for step in range(num_inference_steps):
            x = x - 0.1 * model(x, timestep(step, num_inference_steps), **arguments(step, x))
        return x

    curve = sc.calibrate(model, sample, num_samples=1, progress=False).curve(gap=1, kind="ffn")
    assert (curve.mean[1:] > 0.001).all()  # NaN and 0 are neither
    with sc.cached(model, sc.Schedule.uniform(model, num_steps=STEPS, interval=2)) as run:
        sample(0)
    assert run.summary().reused == 2 * 2 * STEPS // 2 and not run.summary().recomputed


def flux(controlled: bool) -> Any:
    pipe = tiny.flux()
    if not controlled:
        return pipe
    config = pipe.transformer.config
    names = ("attention_head_dim", "num_attention_heads", "joint_attention_dim", "in_channels")
    net = diffusers.FluxControlNetModel(
        **{name: config[name] for name in (*names, "pooled_projection_dim", "axes_dims_rope")},
        num_layers=1,
        num_single_layers=1,
        guidance_embeds=True,
    )
    return diffusers.FluxControlNetPipeline(**pipe.components, controlnet=without_zeros(net))


def stable_diffusion_3(controlled: bool) -> Any:
    pipe = tiny.stable_diffusion_3()
    if not controlled:
        return pipe
    config = pipe.transformer.config
    names = ("sample_size", "patch_size", "in_channels", "out_channels", "attention_head_dim")
    names += ("num_attention_heads", "joint_attention_dim", "caption_projection_dim")
    net = diffusers.SD3ControlNetModel(
        **{name: config[name] for name in (*names, "pooled_projection_dim", "pos_embed_max_size")},
        num_layers=2,
    )
    parts = {
        name: part
        for name, part in pipe.components.items()
        if name not in ("image_encoder", "feature_extractor")
    }
    return diffusers.StableDiffusion3ControlNetPipeline(**parts, controlnet=without_zeros(net))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [flux, stable_diffusion_3])
def test_control_nets(make: Callable[[bool], Any]) -> None:
    """The first calls reuse as the later ones do, under a schedule of the plain pipeline too."""
    from PIL import Image

    pipe = make(True)
    pipe.set_progress_bar_config(disable=True)
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")

    def sample(i: int) -> Any:
        generator = torch.Generator().manual_seed(i)
        settings = {"num_inference_steps": STEPS, "height": 32, "width": 32}
        return pipe(
            "a house",
            control_image=image,
            generator=generator,
            output_type="latent",
            **settings,
        ).images

    calibration = sc.calibrate(pipe, sample, num_samples=1, progress=False)
    paths = {layer.path.partition(".")[0] for layer in calibration.layers}
    assert paths == {"transformer", "controlnet"}
    for kind in calibration.kinds:
        assert (calibration.curve(gap=1, kind=kind).mean[1:] > 0).all()
    with sc.cached(pipe, sc.Schedule.uniform(pipe, num_steps=STEPS, interval=2)) as run:
        sample(0)
    assert run.summary().reused == len(calibration.layers) * STEPS // 2
    assert not run.summary().recomputed
    plain = sc.Schedule.uniform(make(False), num_steps=STEPS, interval=2)
    with sc.cached(pipe, plain) as run:
        sample(0)
    assert run.summary().reused == len(plain.rows) * STEPS // 2 and not run.summary().recomputed


# ------------------------------------------------------------------------ windows that move


@pytest.mark.filterwarnings("ignore::smoothcache.errors.SmoothCacheWarning")
@pytest.mark.parametrize("shift", [0, 3])
def test_windows_of_a_longer_video(shift: int) -> None:
    torch.manual_seed(0)
    model = without_zeros(
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
    text = torch.randn(1, 5, 16)

    def video() -> Tensor:
        common = torch.randn(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        own = torch.randn(1, 4, 24, 8, 8, generator=torch.Generator().manual_seed(2))
        x = 0.6 * common + 0.8 * own
        for step in range(STEPS):
            change = torch.zeros_like(x)
            for first in (0, 8, 16):
                frames = [(frame + shift * step) % 24 for frame in range(first, first + 8)]
                given = torch.tensor([1000 * (1 - step / STEPS)])
                change[:, :, frames] = model(x[:, :, frames], given, text).sample
            x = x - change / STEPS
        return x

    wanted = video()
    with sc.cached(model, sc.Schedule.uniform(model, num_steps=STEPS, interval=2)) as run:
        got = video()
    summary = run.summary()
    if shift:
        assert torch.equal(got, wanted) and summary.reused == 0 and summary.recomputed
    else:
        assert summary.reused > sum(summary.recomputed.values()) and not torch.equal(got, wanted)


# ------------------------------------------------------------------- samplers of other kinds

SCHEDULERS = {
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "shifted flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": lambda: diffusers.DDIMScheduler(),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_that_is_never_stepped(make: Callable[[], Any]) -> None:
    model, scheduler = dit(), make()
    pipe = SimpleNamespace(components={"transformer": model}, scheduler=scheduler)

    def sample(i: int) -> Tensor:
        x = noise(i)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            x = x - 0.1 * model(x, t[None], torch.tensor([1])).sample
        return x

    calibration = sc.calibrate(pipe, sample, num_samples=2, progress=False)
    assert calibration.num_steps == STEPS
    with sc.cached(pipe, sc.plan(calibration, alpha=10.0)) as run:
        sample(0)
        sample(1)
    assert run.summary().finished == 2 and run.summary().reused and not run.summary().recomputed


@pytest.mark.parametrize("steps", [STEPS, 2 * STEPS])
def test_two_calls_a_step_at_unequal_times_are_refused_by_name(steps: int) -> None:
    model = dit()

    def sample() -> None:
        sigmas, x = torch.linspace(10, 1, STEPS + 1), noise()
        for a, b in pairwise(sigmas):
            for sigma in (a, (2 * b - a) * 0.5 + a * 0.5 - 1.0):
                x = x - 0.1 * model(x, sigma[None], torch.tensor([1])).sample

    schedule = sc.Schedule.uniform(model, num_steps=steps, interval=2)
    with (
        pytest.raises(sc.SmoothCacheError, match="two calls per step at different timesteps"),
        sc.cached(model, schedule),
    ):
        sample()


class Embedded(nn.Module):
    """A denoiser that gets an embedding where a time is expected."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = dit()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.dit(x, torch.tensor([3]), torch.tensor([1])).sample + t.mean()
        return output


@pytest.mark.parametrize(
    "given",
    [torch.randn(1, 16), torch.rand(1, 16), torch.rand(16), torch.linspace(1000, 0, 6)[None]],
    ids=["embedding", "positive embedding", "embedding of one dimension", "a time for each frame"],
)
def test_many_values_are_not_taken_for_one_time(given: Tensor) -> None:
    model = Embedded()
    schedule = sc.Schedule.uniform(model, num_steps=STEPS, interval=2)
    with pytest.raises(sc.SmoothCacheError, match="time"), sc.cached(model, schedule):
        model(noise(), given)


def test_a_forward_whose_first_parameter_has_another_name() -> None:
    class Unusual(Options):
        def forward(this, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            output: Tensor = this.dit(x, timestep, torch.tensor([1])).sample
            return output

    model = Unusual()
    with sc.cached(model, sc.Schedule.uniform(model, num_steps=STEPS, interval=2)) as run:
        x = noise()
        for step in range(STEPS):
            x = x - 0.1 * model(x, timestep(step))
    assert run.summary().reused and not run.summary().recomputed


@pytest.mark.parametrize("strict", [False, True])
def test_exporting_an_enabled_model_is_refused_by_name(strict: bool) -> None:
    model = Options()
    run = sc.enable(model, sc.Schedule.uniform(model, num_steps=STEPS, interval=2))
    with pytest.raises(Exception, match="disable") as error:
        torch.export.export(model, (noise(), timestep(0)), strict=strict)
    assert "export" in str(error.value)
    run.reset()
    assert any("no generation" in text for text in said(run.disable))
    torch.export.export(model, (noise(), timestep(0)), strict=strict)


# -------------------------------------------------------------------------- other objects


def sampled(net: Any) -> Tensor:
    x = noise()
    for step in range(STEPS):
        x = x - 0.1 * net(x, timestep(step), torch.tensor([1])).sample
    return x


def test_another_object_of_the_same_class() -> None:
    model, other = dit(), dit(1)
    schedule = sc.Schedule.uniform(model, num_steps=STEPS, interval=2)

    def within() -> None:
        with sc.cached(model, schedule):
            sampled(other)

    run = sc.enable(model, schedule)
    sampled(other)
    for texts in (said(run.disable), said(within)):
        assert len(texts) == 1 and "no generation was seen" in texts[0]


def test_a_view_of_the_pipeline_with_its_own_scheduler() -> None:
    pipe = tiny.stable_diffusion_3()
    pipe.set_progress_bar_config(disable=True)
    view = copy.copy(pipe)
    view.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)

    def generate(one: Any) -> None:
        one("a", num_inference_steps=STEPS, height=16, width=16, output_type="latent")

    counts: list[int] = []

    def served() -> None:
        with sc.cached(pipe, sc.Schedule.uniform(pipe, num_steps=STEPS, interval=2)) as run:
            for one in (view, pipe, view):
                generate(one)
                counts.append(run.summary().reused)

    texts = said(served)
    assert counts[0] > 0 and counts[1] == 2 * counts[0]
    assert counts[2] > counts[1] or any("outside any generation" in text for text in texts)
