"""Starting in the middle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.generations import (
    FLOWS,
    SOLVERS,
    STEPS,
    PipeByHand,
    WitnessPipe,
    assert_as_by_hand,
    by_text,
    compare_with_by_hand,
    noise,
    ready,
    run_sd3,
    sd3_pipe,
    steps_of,
    wan_transformer,
    witness_schedule,
)
from torch import Tensor

import smoothcache as sc

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::smoothcache.errors.SmoothCacheWarning"),
]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


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
