"""All of it in one call: what comes out is measured, kept, enabled; and nothing else is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.prompt_pipeline import STEPS, PromptPipeline
from support.searches import distance
from support.toys import CLASSES, TOKENS, WIDTH, build
from torch import Tensor

import smoothcache as sc
from smoothcache.acceleration import AccelerationReport, CalibrationCache, accelerate

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def accelerated(pipe: Any, *args: Any, **options: Any) -> sc.Run:
    settings = {"verbose": False, "progress": False, "max_cost": 10, "num_measured": 2}
    return accelerate(pipe, *args, **{**settings, **options})


def test_a_pipeline_is_accelerated_and_measured_on_unseen_samples(
    pipe: PromptPipeline, folder: Path
) -> None:
    handle = accelerated(pipe, prompts=PROMPTS)
    report = handle.report
    assert isinstance(report, AccelerationReport) and not report.is_calibration_cached
    assert report.cached.compute <= 1 / 3 + 1e-9
    assert report.cached.speedup == pytest.approx(1 / report.cached.compute)
    assert report.cached.time > 0 and report.seconds > 0
    count = round(STEPS * report.cached.compute)
    own, other = report.alternatives
    assert own.name == f"{count} steps" and other.name.startswith(f"{count} steps of")
    assert own.compute == other.compute == pytest.approx(count / STEPS)
    # Prompt i with seed i, of which the first ones were seen.
    decibels = []
    for i in (5, 6):
        generator = torch.Generator().manual_seed(i)
        output = pipe(PROMPTS[i % 5], generator=generator)[0]
        decibels.append((output, i))
    assert handle.summary().finished == 2 and handle.summary().reused > 0
    handle.disable()
    wanted = []
    for output, i in decibels:
        reference = pipe(PROMPTS[i % 5], generator=torch.Generator().manual_seed(i))[0]
        error = (output - reference).square().mean()
        wanted.append(20 * math.log10(float(reference.max() - reference.min())))
        wanted[-1] -= 10 * float(error.log10())
    assert report.cached.psnr == pytest.approx(sum(wanted) / 2, abs=0.01)
    assert report.pays and report.verdict.startswith("caching pays")
    assert len(CalibrationCache(folder).entries()) == 1


def test_a_second_time_the_calibration_is_read(pipe: PromptPipeline) -> None:
    sampled = list[int]()

    def sample(i: int) -> Tensor:
        sampled.append(i)
        return pipe.sample(i)

    first = accelerated(pipe, sample, speedup=3)
    first.disable()
    count = len(sampled)
    second = accelerated(pipe, sample, speedup=3)
    second.disable()
    assert second.report.is_calibration_cached and not first.report.is_calibration_cached
    assert 0 < count < len(sampled)
    assert "from the cache" in str(second.report)


def changed_weights(pipe: PromptPipeline) -> None:
    with torch.no_grad():
        next(pipe.transformer.parameters()).mul_(1.01)


@pytest.mark.parametrize("change", ["weights", "solver", "steps", "prompts", "guidance", "dtype"])
def test_a_calibration_is_not_read_for_anything_else(change: str, folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    from smoothcache.acceleration.identity import key_of

    def key(pipe: PromptPipeline, **more: Any) -> str | None:
        steps, shift = more.get("steps", STEPS), more.get("shift", 0)
        return key_of(pipe, lambda i: pipe.sample(i + shift, steps), range(2), more.get("told", {}))

    pipe = PromptPipeline()
    own = key(pipe)
    assert own is not None and own == key(PromptPipeline())
    more: dict[str, Any] = {}
    if change == "weights":
        changed_weights(pipe)
    elif change == "solver":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    elif change == "dtype":
        pipe.transformer.register_buffer("extra", torch.zeros(1, dtype=torch.bfloat16))
    else:
        more = {"steps": {"steps": 9}, "prompts": {"shift": 1}, "guidance": {"told": {"x": 2.0}}}[
            change
        ]
    assert key(pipe, **more) != own


def test_no_cache(pipe: PromptPipeline, folder: Path, tmp_path: Path) -> None:
    accelerated(pipe, pipe.alone, cache=False).disable()
    assert not folder.exists()
    accelerated(pipe, pipe.alone, cache=tmp_path / "other").disable()
    assert len(CalibrationCache(tmp_path / "other").entries()) == 1


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_told_of_and_made_again(
    pipe: PromptPipeline, folder: Path, damage: str
) -> None:
    key_file = accelerated_file(pipe, folder)
    content = key_file.read_bytes()
    key_file.write_bytes({"cut": content[:-50], "text": b"{}", "empty": b""}[damage])
    with pytest.warns(sc.SmoothCacheWarning, match="made again"):
        handle = accelerated(pipe, pipe.alone)
    handle.disable()
    assert not handle.report.is_calibration_cached
    assert sc.Calibration.load(key_file).num_steps == STEPS


def accelerated_file(pipe: PromptPipeline, folder: Path) -> Path:
    accelerated(pipe, pipe.alone).disable()
    (entry,) = CalibrationCache(folder).entries()
    return entry.path


def test_where_nothing_can_be_written_it_goes_on(pipe: PromptPipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(sc.SmoothCacheWarning, match="cannot be kept"):
        accelerated(pipe, pipe.alone, cache=tmp_path / "file" / "folder").disable()


def test_where_caching_does_not_pay_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """A sampler whose model is given something else at every step, which a cache cannot know."""
    toy = build("single", depth=2)

    def sample(i: int, num_inference_steps: int = 8) -> Tensor:
        x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(i))
        shakes = 3 * torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(i + 99))
        for step in range(num_inference_steps):
            t = torch.tensor([1000 * (1 - step / num_inference_steps)])
            given = x + shakes[step % 4]
            x = x - toy.denoise(given, t, torch.tensor([i % CLASSES])) / num_inference_steps
        return x

    handle = accelerated(toy, sample, speedup=2, verbose=True, num_measured=6, max_cost=8)
    handle.disable()
    assert handle.report.pays is False
    assert "CACHING DOES NOT PAY: 4 steps without a cache" in capsys.readouterr().out
    assert handle.report.as_dict()["pays"] is False


def test_a_sampler_that_cannot_take_fewer_steps(pipe: PromptPipeline) -> None:
    handle = accelerated(pipe, pipe.alone, num_measured=1)
    handle.disable()
    report = handle.report
    assert report.alternatives == () and report.pays is None and math.isnan(report.gain)
    assert "whether the cache pays is not known" in str(report)
    assert math.isnan(report.cached.low) and "95 %" not in str(report.cached)


def test_a_bare_module_and_a_solver_of_no_library(folder: Path) -> None:
    toy = build("single", depth=2)

    def sample(i: int) -> Tensor:
        x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(i))
        for step in range(8):
            x = x - toy.denoise(x, torch.tensor([1000.0 - 100 * step]), torch.tensor([1])) / 8
        return x

    handle = accelerated(toy, sample, compute=0.5)
    handle.disable()
    assert handle.report.cached.compute <= 0.5
    assert len(CalibrationCache(folder).entries()) == 1


def test_class_labels() -> None:
    from support.tiny_pipeline import build_pipeline

    pipe = build_pipeline()
    bars = dict(pipe._progress_bar_config)
    handle = accelerated(pipe, class_labels=[1, 2], num_inference_steps=6, speedup=2)
    handle.disable()
    assert pipe._progress_bar_config == bars
    assert any("trajectories" in note for note in handle.report.notes)  # this one clips
    assert handle.report.cached.compute <= 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 2, "compute": 0.5}, "not both"),
        ({"speedup": 0.5}, "speedup"),
        ({"compute": 0}, "compute"),
        ({"compute": 0.01}, "no schedule is as cheap"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_measured": 0}, "num_measured"),
        ({"max_cost": 0}, "max_cost"),
        ({"cache": 3}, "cache must be"),
        ({"prompts": ["a"]}, "leave out prompts"),
        ({"seed": 3}, "leave out prompts"),
        ({"store": "disk"}, "store"),
    ],
)
def test_arguments_that_make_no_sense(
    pipe: PromptPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=message):
        accelerated(pipe, pipe.alone, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "prompt"),
        ((), {"class_labels": [1]}, "takes no class label"),
        (("a lighthouse",), {}, "prompts are given as"),
    ],
)
def test_inputs_that_make_no_sense(
    pipe: PromptPipeline, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=message):
        accelerated(pipe, *arguments, **options)


def test_a_module_needs_a_sampler() -> None:
    with pytest.raises(sc.InvalidArgumentError, match="give a function"):
        accelerated(build("single"), prompts=["a"])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda pipe, i: pipe.sample(i) * math.nan, sc.InvalidArgumentError, "NaN"),
        (lambda pipe, i: None, sc.SmoothCacheError, "never ran the model|final tensor"),
        (
            lambda pipe, i: pipe.sample(i) + 0.01 * torch.randn(1, TOKENS, WIDTH),
            sc.InvalidArgumentError,
            "different results",
        ),
        (
            lambda pipe, i: pipe.sample(i + 7 * (len(pipe.calls) % 3)),
            sc.SmoothCacheError,
            "different results|other|deterministic",
        ),
    ],
    ids=["nan", "nothing", "noise", "drift"],
)
def test_samplers_that_cannot_be_measured(
    pipe: PromptPipeline, spoil: Callable[..., Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        accelerated(pipe, lambda i: spoil(pipe, i))


@pytest.mark.parametrize("after", [0, 3, 5, 9, 15, 24])
def test_nothing_is_left_where_a_stage_raises(pipe: PromptPipeline, after: int) -> None:
    pipe.sample(0)
    count = len(pipe.calls)

    def sample(i: int, num_inference_steps: int = STEPS) -> Tensor:
        if len(pipe.calls) - count >= after:
            raise RuntimeError("out of memory")
        return pipe.sample(i, num_inference_steps)

    with pytest.raises(RuntimeError, match="out of memory"):
        accelerated(pipe, sample)
    with sc.cached(pipe, sc.Schedule.uniform(pipe, STEPS, 2)) as run:
        pipe.sample(0)
    assert run.summary().finished == 1


def test_a_model_that_is_cached_already(pipe: PromptPipeline) -> None:
    with sc.cached(pipe, sc.Schedule.uniform(pipe, STEPS, 2)) as run:
        count = len(pipe.calls)
        with pytest.raises(sc.AlreadyCachedError):
            accelerated(pipe, pipe.alone)
        assert len(pipe.calls) == count
        pipe.sample(0)
    assert (run.summary().finished, run.summary().broken_off) == (1, 0)


def test_it_stands_in_the_package(pipe: PromptPipeline) -> None:
    assert sc.accelerate is accelerate
    before = pipe.sample(3)
    handle = sc.accelerate(
        pipe, pipe.alone, speedup=2, max_cost=8, verbose=False, progress=False, num_measured=1
    )
    assert 0 < distance(pipe.sample(3), before) < 0.2
    handle.disable()
