"""What the commands print, whole: with made-up numbers where real ones differ between machines."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli.test_commands import STEPS, run, succeed
from support.golden import assert_golden, last_of_bar, masked
from support.made_up import MODEL, calibration_of, errors_of, layers_of
from support.searches import Sampler
from support.tiny_pipeline import save_pipeline
from support.toys import build

import smoothcache as sc
from smoothcache.cli.options import Setup
from smoothcache.comparison.benchmark import Benchmark
from smoothcache.comparison.result import Comparison
from smoothcache.metrics.report import Report, ReportRow
from smoothcache.searching.result import Measured, SearchedSchedule, SearchResult

LAYERS = tuple(
    replace(layer, macs=macs, nbytes=4096)
    for layer, macs in zip(layers_of(3), (40_000, 70_000) * 3, strict=True)
)
FACTORS = np.array([1, 0.5, 1.5, 0.5, 2, 1])[:, None, None] * np.array([1, 1.5, 2])[:, None]
ERRORS = errors_of(np.linspace(0.02, 0.15, 8) * FACTORS, 2, 6, 3, 8)
CALIBRATION = calibration_of(ERRORS, layers=LAYERS, total_macs=400_000, peak_bytes=5 << 20)
ROWS = (
    ReportRow("uncached", steps=50, compute=1.0, time=1.0, psnr=float("inf"), ssim=1.0,
              relative_error=0.0, peak_bytes=0),
    ReportRow("fast", steps=50, compute=0.52, time=0.61, psnr=36.21, ssim=0.9812,
              relative_error=0.0213, peak_bytes=3 << 19, margins={"psnr": 1.2}),
    ReportRow("26 steps", steps=26, compute=0.52, time=0.53, psnr=33.05, ssim=0.9701,
              relative_error=0.0388, margins={"psnr": 0.9}),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("printed") / "tiny")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("printed") / "c.safetensors"
    CALIBRATION.save(file)
    return file


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts functions in the place of those that a command loads, samples and measures with."""

    def put(command: str, **functions: Callable[..., Any]) -> None:
        module = importlib.import_module(f"smoothcache.cli.commands.{command}")
        sampler = SimpleNamespace(steps=50, inputs=(0, 1), count=2, sample=None)
        monkeypatch.setattr(Setup, "load", lambda *_: None)
        monkeypatch.setattr(Setup, "sampler", lambda *_, **__: sampler)
        defaults: dict[str, Any] = {"sampling_rate": lambda *_: None}
        for name, function in {**defaults, **functions}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)

    return put


@pytest.mark.parametrize("options", [(), ("--layers",), ("--no-costs", "--layers")], ids=len)
def test_inspect(model: Path, options: tuple[str, ...]) -> None:
    name = "_".join(["inspect", *(word.strip("-") for word in options)])
    assert_golden(succeed("inspect", model, *options).stdout, f"cli/{name}")


def test_calibrate(stub: Callable[..., None], tmp_path: Path) -> None:
    stub("calibrate", run_calibration=lambda *_, **__: CALIBRATION)
    printed = succeed("calibrate", "model", "-o", tmp_path / "c.safetensors").stdout
    assert_golden(masked(printed, tmp_path), "cli/calibrate")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plan", ("--alpha", 0.18)),
        ("plan_per_block", ("--alpha", 0.18, "--per", "block", "--predictor", "taylor")),
        ("plan_other_steps", ("--alpha", 0.18, "--steps", 12)),
        ("plan_long", ("--alpha", 0.18, "--steps", 80)),
        ("plan_nothing_reused", ("--alpha", 0)),
        ("plan_no_memory", ("--alpha", 0.18, "--max-bytes", 1)),
    ],
)
def test_plan(calibration: Path, tmp_path: Path, name: str, options: tuple[Any, ...]) -> None:
    result = succeed("plan", calibration, "-o", tmp_path / "s.json", *options)
    assert_golden(masked(result.stdout + result.stderr, tmp_path), f"cli/{name}")


def test_generate(model: Path, tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    file = tmp_path / "s.json"
    sc.Schedule.uniform(DiTPipeline.from_pretrained(model), STEPS, 2).save(file)
    options = ("--schedule", file, "--class-label", 1, "-o", tmp_path / "out", "--samples", 2)
    assert_golden(masked(succeed("generate", model, *options).stdout, tmp_path), "cli/generate")


@pytest.mark.parametrize("converged", [None, 0.31])
def test_search(stub: Callable[..., None], tmp_path: Path, converged: float | None) -> None:
    known = converged is not None
    schedule = sc.plan(CALIBRATION, alpha=0.18)
    best = Measured("even, taylor, layers", 0.48, 0.0123, converged, schedule=schedule)
    fewer = Measured("4 steps", 0.5, 0.0456, 0.29 if known else None, num_steps=4)
    result = SearchResult(
        best,
        (fewer, replace(fewer, name="4 steps of UniPC", solver="UniPC", error=0.0301)),
        (best,),
        rollouts=96,
        cost=52.96,
        verdict="the schedule pays off",
    )
    searched = SearchedSchedule(8, schedule.rows, schedule.layers, MODEL, result=result)
    stub("search", run_search=lambda *_, **__: searched)
    printed = succeed("search", "model", "-o", tmp_path / "s.json", "--speedup", 2).stdout
    assert_golden(masked(printed, tmp_path), f"cli/search{'_converged' * known}")


def test_compare(
    stub: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sc.plan(CALIBRATION, alpha=0.18).save(tmp_path / "fast.json")
    generator = torch.Generator().manual_seed(0)
    reference = 0.9 * torch.rand(2, 3, 8, 8, generator=generator)
    off = {"uncached": 0.0, "fast": 0.01, "26 steps": 0.03}
    compared = Comparison(
        ROWS,
        {name: reference + offset for name, offset in off.items()},
        {"fast": "26 steps"},
        {"fast": {"the shape of the inputs had changed": 4}},
    )
    stub("compare")
    library = importlib.import_module("smoothcache.comparison.compare")
    monkeypatch.setattr(library, "compare", lambda *_, **__: compared)
    options = ("--schedule", tmp_path / "fast.json", "-o", tmp_path / "out")
    assert_golden(masked(succeed("compare", "model", *options).stdout, tmp_path), "cli/compare")


def test_benchmark(
    stub: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = Benchmark(
        "DiTPipeline, 50 steps",
        (replace(ROWS[0], family="uncached"), replace(ROWS[2], family="fewer steps")),
        {"FasterCache": "ValueError: no layer was found"},
        {"26 steps": "half of it"},
        {},
    )
    stub("benchmark")
    for module, name in {
        "methods": ("pipeline_case", "calibrated", "training_free", "searched"),
        "benchmark": ("run_benchmark",),
    }.items():
        library = importlib.import_module(f"smoothcache.comparison.{module}")
        for function in name:
            answer: Any = measured if function == "run_benchmark" else []
            monkeypatch.setattr(library, function, lambda *_, answer=answer, **__: answer)
    options = ("--class-label", 1, "-o", tmp_path / "r.json")
    printed = succeed("benchmark", "model", *options).stdout
    assert_golden(masked(printed, tmp_path), "cli/benchmark")


def test_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fake(output: Path, *, tell: Callable[[str], None], **_: Any) -> Any:
        tell("calibrating on 10 samples")
        report = Report(ROWS, "10 images, 50 DDIM steps", ("Caching pays.",))
        return SimpleNamespace(report=report, folder=output)

    monkeypatch.setattr("smoothcache.demo.image.run_demo", fake)
    result = succeed("demo", "-o", tmp_path)
    assert_golden(masked(result.stderr + result.stdout, tmp_path), "cli/demo")


def test_errors(calibration: Path, tmp_path: Path) -> None:
    """A few of the one-line refusals, as they stand in a terminal."""
    lines = [
        run("plan", calibration, "-o", tmp_path / "s.json").stderr,
        run("plan", calibration, "-o", tmp_path / "s.json", "--alpha", -1).stderr,
        run("plan", tmp_path / "none", "-o", tmp_path / "s.json", "--alpha", 1).stderr,
        run("inspect", tmp_path / "none").stderr,
        run("frobnicate").stderr,
    ]
    assert_golden(masked("".join(lines), tmp_path, calibration.parent), "cli/errors")


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """How the bars end, in a terminal or a notebook."""
    toy = build("single", depth=1)
    sampler = Sampler(toy)
    calibration = sc.calibrate(toy, sampler.alone, 2)
    bars = [last_of_bar(capsys.readouterr().err)]
    sc.search(toy, sampler.alone, calibration, speedup=2, max_cost=1)
    bars.append(last_of_bar(capsys.readouterr().err))
    assert_golden("\n".join(bars), "cli/progress")
