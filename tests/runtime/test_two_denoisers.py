"""Two denoisers, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from support.block_models import (
    NOTHING_KEPT,
    Pipe,
    assert_equal_calibrations,
    calibrated,
    every_granularity,
    paths,
    steps,
)
from support.reference import STEPS, same
from support.toys import Toy, build
from torch import Tensor

import smoothcache as sc
from smoothcache.model.costs import MacCounter


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def toy(toy_name: str) -> Toy:
    return build(toy_name, depth=2)


@pytest.fixture
def turns() -> Pipe:
    """Two denoisers of different size, which take turns."""
    return Pipe(transformer=build("single", depth=2), transformer_2=build("dual", 1, depth=1))


def runs_at(path: str, boundary: int) -> range:
    return range(boundary, STEPS) if path.startswith("transformer_2") else range(boundary)


def test_the_layers_of_both_denoisers_are_counted(turns: Pipe) -> None:
    observed = sc.observe_layers(turns, lambda i: turns.generate(boundary=3, calls=2))
    measured = sc.calibrate(
        turns, lambda i: turns.generate(boundary=3, calls=2), 1, max_gap=1, progress=False
    )
    assert [(x.path, x.macs, x.nbytes) for x in observed] == [
        (x.path, x.macs, x.nbytes) for x in measured.layers
    ]
    assert all(layer.macs and layer.nbytes for layer in observed)


boundaries = pytest.mark.parametrize("boundary", [2, 5, 6])


@boundaries
@every_granularity
def test_errors_are_known_where_a_denoiser_ran(
    turns: Pipe, boundary: int, granularity: Any, tmp_path: Any
) -> None:
    got = calibrated(
        turns, lambda i: turns.generate(seed=i, boundary=boundary), granularity=granularity
    )
    assert paths(got.layers) == paths(sc.find_layers(turns, granularity=granularity))
    assert got.steps_run == tuple(runs_at(path, boundary) for path in paths(got.layers))
    for index, path in enumerate(paths(got.layers)):
        run = runs_at(path, boundary)
        for gap in (1, 2, 3):
            known = [step in run[gap:] for step in range(STEPS)]
            assert np.array_equal(~np.isnan(got.errors[:, index, gap - 1]), [known] * 2)
    got.save(tmp_path / "calibration.safetensors")
    loaded = sc.Calibration.load(tmp_path / "calibration.safetensors")
    assert_equal_calibrations(got, loaded)
    assert loaded.steps_run == got.steps_run
    assert sc.plan(loaded, alpha=0.1) == sc.plan(got, alpha=0.1)


@every_granularity
@pytest.mark.parametrize(("boundary", "calls"), [(2, 1), (3, 2), (6, 1)])
def test_a_plan_for_two_denoisers(turns: Pipe, boundary: int, granularity: Any, calls: int) -> None:
    generate = functools.partial(turns.generate, boundary=boundary, calls=calls)
    calibration = calibrated(turns, lambda i: generate(seed=i), granularity=granularity)
    with MacCounter() as uncached:
        plain = generate()
    for schedule in (
        sc.plan(calibration, alpha=100.0),
        sc.plan(calibration, alpha=100.0, max_gap=1, predictor="taylor"),
    ):
        for path, row in schedule.rows.items():
            run_at = runs_at(path, boundary)
            assert row.computed[run_at[0]]
            assert all(row.computed[step] for step in range(STEPS) if step not in run_at)
        with sc.cached(turns, schedule) as run, MacCounter() as counter:
            got = generate()
            generate(seed=1)
        summary = run.summary()
        assert schedule.compute == pytest.approx(counter.total / (2 * uncached.total), rel=0.01)
        assert summary.recomputed == {}
        assert summary.reused == 2 * calls * schedule.reused
        assert (summary.finished, summary.held_bytes) == (2, 0)
        assert torch.equal(got, plain) == (not schedule.reused)


@pytest.mark.parametrize("boundary", [1, STEPS - 1])
def test_a_denoiser_that_runs_at_one_step(turns: Pipe, boundary: int) -> None:
    """There is nothing to reuse in it, and the other one is calibrated all the same."""
    generate = functools.partial(turns.generate, boundary=boundary)
    schedule = sc.plan(calibrated(turns, lambda i: generate(seed=i)), alpha=100.0)
    assert schedule.reused
    with sc.cached(turns, schedule) as run:
        generate()
    assert run.summary().recomputed == {}


def test_a_boundary_that_moves_is_never_stale(turns: Pipe) -> None:
    """Begun a step late, the second denoiser has nothing yet that it could reuse."""
    calibration = calibrated(turns, lambda i: turns.generate(seed=i, boundary=4))
    schedule = sc.plan(calibration, alpha=100.0)
    second = [path for path in schedule.rows if path.startswith("transformer_2")]
    assert {schedule.rows[path].computed for path in second} == {steps("#####..#")}
    fresh = []
    for boundary in (3, 5):
        with sc.cached(turns, schedule):
            fresh.append(turns.generate(boundary=boundary))
    with sc.cached(turns, schedule) as run:
        assert same([turns.generate(boundary=boundary) for boundary in (3, 5)], fresh)
    assert run.summary().recomputed == {NOTHING_KEPT: len(second)}
    assert (run.summary().finished, run.summary().held_bytes) == (2, 0)


def wan(**options: Any) -> Any:
    torch.manual_seed(0)
    transformers = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=layers,
        ).eval()
        for layers in (2, 1)
    ]
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=transformers[0],
        transformer_2=transformers[1],
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_wan(pipe: Any, seed: int = 0) -> Tensor:
    prompts = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(9))
    latents: Tensor = pipe(
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        num_inference_steps=STEPS,
        height=32,
        width=32,
        num_frames=5,
        guidance_scale=3.0,
        guidance_scale_2=2.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames
    return latents


@every_granularity
def test_calibrating_wan_with_two_transformers(granularity: Any) -> None:
    """Each step calls one of them twice, with the prompt and without."""
    pipe = wan(boundary_ratio=0.85)
    calibration = calibrated(
        pipe, lambda i: run_wan(pipe, i), num_samples=1, granularity=granularity
    )
    boundary = sum(float(t) >= 850 for t in pipe.scheduler.timesteps)
    assert 1 < boundary < STEPS - 1
    assert calibration.steps_run == tuple(runs_at(x, boundary) for x in paths(calibration.layers))
    assert calibration.solver == "UniPCMultistepScheduler"
    schedule = sc.plan(calibration, alpha=100.0)
    with MacCounter() as uncached:
        run_wan(pipe)
    with sc.cached(pipe, schedule) as run, MacCounter() as counter:
        run_wan(pipe)
    assert schedule.compute == pytest.approx(counter.total / uncached.total, rel=0.01)
    assert run.summary().recomputed == {}
    assert run.summary().reused >= 2 * schedule.reused > 0
