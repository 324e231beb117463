"""Whole pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.other_tools import CPU, STEPS, same, uniform
from support.tiny_pipeline import build_pipeline
from torch import Tensor

import smoothcache as sc
from smoothcache.layers.modules import identify
from smoothcache.tracking.intercept import is_intercepted

diffusers = pytest.importorskip("diffusers")
diffusers_hooks = pytest.importorskip("diffusers.hooks")
group_offloading = pytest.importorskip("diffusers.hooks.group_offloading")
accelerate = pytest.importorskip("accelerate")
accelerate_hooks = pytest.importorskip("accelerate.hooks")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def run_pipe(pipe: Any, seed: int = 0) -> Tensor:
    images = pipe(
        class_labels=[1],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return torch.as_tensor(images)


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload_of_pipe(pipe: Any) -> None:
    diffusers_hooks.apply_group_offloading(pipe.transformer, CPU, CPU, offload_type="leaf_level")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("offload", "order"),
    [
        pytest.param(model_offload, "AE"),
        (model_offload, "EA"),
        (group_offload_of_pipe, "AE"),
        (group_offload_of_pipe, "EA"),
    ],
)
def test_a_pipeline_with_offloading(offload: Callable[[Any], None], order: str) -> None:
    pipe = build_pipeline()
    schedule = uniform(pipe)
    plain = [run_pipe(pipe, seed) for seed in (0, 1, 2)]
    with sc.cached(pipe, schedule):
        under_schedule = [run_pipe(pipe, seed) for seed in (0, 1, 2)]
    handle = sc.enable(pipe, schedule) if order == "EA" else None
    offload(pipe)
    handle = handle or sc.enable(pipe, schedule)
    assert same([run_pipe(pipe, seed) for seed in (0, 1, 2)], under_schedule)
    assert handle.summary().reused == 3 * schedule.reused
    handle.disable()
    assert same([run_pipe(pipe, seed) for seed in (0, 1, 2)], plain)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_that_ends_its_offloading_while_enabled() -> None:
    pipe = build_pipeline()
    schedule = uniform(pipe)
    with sc.cached(pipe, schedule):
        under_schedule = run_pipe(pipe)
    model_offload(pipe)
    with sc.cached(pipe, schedule) as run:
        pipe.remove_all_hooks()
        assert torch.equal(run_pipe(pipe), under_schedule)
    assert run.summary().reused == schedule.reused


def test_a_pipeline_moved_and_cast_between_generations() -> None:
    pipe = build_pipeline()
    schedule = uniform(pipe)
    expected = []
    for dtype in (torch.float32, torch.bfloat16):
        with sc.cached(pipe.to(dtype), schedule):
            expected.append(run_pipe(pipe))
    pipe = build_pipeline()
    with sc.cached(pipe, schedule) as run:
        found = [run_pipe(pipe.to("cpu")), run_pipe(pipe.to(torch.bfloat16))]
    assert same(found, expected)
    assert run.summary().reused == 2 * schedule.reused


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_is_saved_and_loaded_while_enabled(tmp_path: Path) -> None:
    pipe = build_pipeline()
    plain = run_pipe(pipe)
    with sc.cached(pipe, uniform(pipe)) as run:
        under_schedule = run_pipe(pipe)
        pipe.save_pretrained(tmp_path)
        loaded = type(pipe).from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert not is_intercepted(loaded.transformer)
        assert type(loaded.transformer) is diffusers.DiTTransformer2DModel
        assert torch.equal(run_pipe(loaded), plain)
        assert torch.equal(run_pipe(pipe), under_schedule)
    assert run.summary().finished == 2
    assert identify(loaded) == identify(pipe)
