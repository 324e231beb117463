"""The command line, on a tiny pipeline: results, JSON, and one line for everything wrong."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
import wave
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planners.test_trajectory import recorded
from rich.console import Console
from support.made_up import calibration_of, layers_of
from support.tiny_pipeline import (
    build_audio_pipeline,
    build_clip_pipeline,
    build_pipeline,
    save_pipeline,
)
from typer.testing import CliRunner

from smoothcache import Calibration, Schedule, SmoothCacheWarning
from smoothcache.acceleration import CalibrationCache
from smoothcache.cli import tables
from smoothcache.cli.app import app
from smoothcache.cli.inputs import Modality
from smoothcache.cli.options import Setup
from smoothcache.comparison import methods
from smoothcache.comparison.result import Comparison
from smoothcache.diffusers_io import PipelineSampler, preparing
from smoothcache.metrics.report import Report, ReportRow
from smoothcache.version import how_to_install

COMMANDS = (
    "demo",
    "inspect",
    "calibrate",
    "plan",
    "search",
    "generate",
    "sample",
    "compare",
    "benchmark",
    "doctor",
)
STEPS = 6


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(x) for x in arguments], prog_name="smoothcache")


def succeed(*arguments: Any) -> Any:
    result = run(*arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: Any) -> str:
    """The one line on stderr of a command that must fail."""
    result = run(*arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def calibration(model: Path) -> Path:
    file = model.parent / "tiny.safetensors"
    succeed(
        *("calibrate", model, "-o", file, "--samples", 2, "--steps", STEPS, "--max-gap", 2),
        *("--class-label", 1, "--class-label", 2),
    )
    return file


@pytest.fixture(scope="module")
def schedule(calibration: Path) -> Path:
    """A schedule that reuses something."""
    file = calibration.with_name("tiny.json")
    succeed("plan", calibration, "--alpha", 10, "-o", file)
    return file


@pytest.fixture(scope="module")
def foreign(schedule: Path) -> Path:
    """The schedule of a model with another configuration."""
    document = json.loads(schedule.read_text())
    document["model"]["fingerprint"] = "0" * 16
    file = schedule.with_name("foreign.json")
    file.write_text(json.dumps(document))
    return file


def test_without_a_command_the_help_is_shown() -> None:
    result = succeed()
    assert all(command in result.stdout for command in COMMANDS)


def test_the_version() -> None:
    assert succeed("--version").stdout.strip() == __import__("smoothcache").__version__


def test_search_finds_a_schedule_and_says_whether_it_pays(model: Path, calibration: Path) -> None:
    file = model.parent / "searched.json"
    options = ("--calibration", calibration, "--steps", STEPS, "--class-label", 1, "--max-cost", 12)
    shown = succeed("search", model, "-o", file, "--speedup", 2, *options).stdout
    assert "way of sampling" in shown and "rollouts" in shown and "3 steps" in shown
    schedule = Schedule.load(file)
    assert schedule.compute is not None and schedule.compute <= 0.5
    assert set(schedule.quality) == {"error", "error to the converged sample"}
    told = json.loads(
        succeed("search", model, "-o", file, "--compute", 0.5, *options, "--json").stdout
    )
    assert told["best"]["compute"] <= 0.5 and told["verdict"] and told["honest"] and told["front"]
    assert Schedule.load(file).rows == schedule.rows


def test_search_refuses_what_makes_no_sense(model: Path, calibration: Path) -> None:
    file = model.parent / "never.json"
    base = ("search", model, "-o", file, "--class-label", 1, "--steps", STEPS)
    assert "exactly one" in refused(*base)
    assert "exactly one" in refused(*base, "--speedup", 2, "--compute", 0.5)
    assert "at least 1" in refused(*base, "--speedup", 0.5)
    assert "finite" in refused(*base, "--speedup", "nan")
    assert not file.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    assert f"smoothcache {command}" in succeed(command, "--help").stdout.split("Example:")[1]


def test_cache_lists_shows_and_clears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTHCACHE_CACHE", str(tmp_path / "kept"))
    assert "0 calibration(s)" in succeed("cache", "list").stdout
    kept = CalibrationCache()
    kept.save("first-1", calibration_of(steps=4))
    kept.save("second-1", calibration_of(steps=4))
    assert "first-1" in succeed("cache", "list").stdout
    listed = json.loads(succeed("cache", "list", "--json").stdout)
    assert [x["name"] for x in listed["calibrations"]] == ["first-1", "second-1"]
    assert listed["folder"] == str(tmp_path / "kept")
    assert "no trajectories" in succeed("cache", "show", "first").stdout
    assert json.loads(succeed("cache", "show", "first", "--json").stdout)["steps"] == 4
    assert "there is no calibration" in refused("cache", "show", "third")
    assert "there is no calibration" in refused("cache", "clear", "third")
    assert "1 calibration(s) removed" in succeed("cache", "clear", "first").stdout
    assert json.loads(succeed("cache", "clear", "--json").stdout)["removed"] == ["second-1"]
    assert kept.entries() == ()
    (tmp_path / "kept" / "bad.safetensors").write_bytes(b"nonsense")
    assert "not a safetensors file" in refused("cache", "show", "bad")
    assert "list" in succeed("cache").stdout


def test_the_short_path(tmp_path: Path) -> None:
    """Calibrate, plan for a speed-up from the trajectories, generate."""
    folder = save_linear_pipeline(tmp_path / "linear")
    curves, planned = tmp_path / "curves.safetensors", tmp_path / "schedule.json"
    succeed(
        *("calibrate", folder, "-o", curves, "--samples", 2, "--steps", STEPS),
        *("--class-label", 1),
    )
    assert Calibration.load(curves).trajectories is not None
    succeed("plan", curves, "--speedup", 3, "-o", planned)
    assert Schedule.load(planned).compute == pytest.approx(1 / 3)
    made = succeed(
        "generate", folder, "--schedule", planned, "--class-label", 2, "-o", tmp_path / "images"
    )
    assert "1 generation(s) of 6 steps finished" in made.stdout
    found = succeed(
        *("search", folder, "--calibration", curves, "--compute", 0.5, "--steps", STEPS),
        *("-o", tmp_path / "found.json", "--class-label", 1, "--json"),
    )
    assert json.loads(found.stdout)["cost"] <= 20


def save_linear_pipeline(folder: Path) -> Path:
    """A pipeline that does not clip, so that its solver is linear in the outputs."""
    pipeline = build_pipeline()
    pipeline.scheduler.register_to_config(clip_sample=False)
    pipeline.save_pretrained(folder)
    return folder


def test_inspect_shows_kinds_and_layers(model: Path) -> None:
    shown = succeed("inspect", model, "--layers").stdout
    for word in ("DiTPipeline", "self_attn", "ffn", "the rest", "transformer_blocks.1.ff"):
        assert word in shown
    document = json.loads(succeed("inspect", model, "--json").stdout)
    assert [row["layers"] for row in document["kinds"]] == [2, 2]
    assert 0.5 < sum(row["share"] for row in document["kinds"]) < 1
    assert sum(x["macs"] for x in document["layers"]) < document["macs_per_step"]


def test_inspect_without_costs_runs_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("smoothcache.cli.commands.inspect.run_calibration")
    document = json.loads(succeed("inspect", model, "--no-costs", "--json").stdout)
    assert document["macs_per_step"] is None
    assert document["kinds"][0]["share"] is None
    assert "share" not in succeed("inspect", model, "--no-costs").stdout


def test_calibrate_writes_a_calibration(calibration: Path, model: Path) -> None:
    measured = Calibration.load(calibration)
    assert (measured.num_samples, measured.num_steps, measured.max_gap) == (2, STEPS, 2)
    assert measured.model is not None and measured.model.class_name == "DiTTransformer2DModel"
    file = calibration.with_name("other.safetensors")
    arguments = ("calibrate", model, "-o", file, "--samples", 1, "--steps", 3, "--class-label", 1)
    result = succeed(*arguments, "--tokens", 4, "--guidance-scale", 1.0, "--json")
    document = json.loads(result.stdout)
    assert document["steps"] == 3 and document["file"] == str(file)
    assert Calibration.load(file).tokens == 4


def test_samples_of_the_command_are_those_of_the_library(model: Path, calibration: Path) -> None:
    from smoothcache import calibrate
    from smoothcache.diffusers_io.loading import load_pipeline
    from smoothcache.diffusers_io.sampler import PipelineSampler

    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    sampler = PipelineSampler(pipeline, class_labels=(1, 2), num_steps=STEPS)
    direct = calibrate(pipeline, sampler, 2, 2, progress=False)
    np.testing.assert_allclose(direct.errors, Calibration.load(calibration).errors, rtol=1e-4)


def test_plan_takes_a_speedup_where_there_are_trajectories(
    calibration: Path, tmp_path: Path
) -> None:
    from smoothcache import plan_trajectory

    recorded(steps=9).save(curves := tmp_path / "c.safetensors")
    file = tmp_path / "s.json"
    succeed("plan", curves, "--speedup", 2, "-o", file)
    assert Schedule.load(file) == plan_trajectory(Calibration.load(curves), speedup=2)
    # The noise scheduler of this pipeline clips.
    assert "no trajectories" in refused("plan", calibration, "--speedup", 2, "-o", file)


def test_plan_writes_what_the_library_plans(calibration: Path, schedule: Path) -> None:
    from smoothcache import plan

    assert Schedule.load(schedule) == plan(Calibration.load(calibration), alpha=10.0)
    file, picture = schedule.with_name("block.json"), schedule.with_name("block.png")
    arguments = ("plan", calibration, "--alpha", 0.5, "-o", file)
    options = ("--per", "block", "--max-gap", 1, "--predictor", "taylor", "--picture", picture)
    document = json.loads(succeed(*arguments, *options, "--json").stdout)
    planned = plan(
        Calibration.load(calibration), alpha=0.5, per="block", max_gap=1, predictor="taylor"
    )
    assert Schedule.load(file) == planned
    assert document["compute"] == planned.compute
    assert picture.read_bytes().startswith(b"\x89PNG")
    succeed("plan", calibration, "--alpha", 10, "--patterns", 1, "-o", file)
    assert Schedule.load(file) == plan(Calibration.load(calibration), alpha=10.0, patterns=1)
    limit = (plan(Calibration.load(calibration), alpha=10.0).buffer_bytes or 0) // 2
    succeed("plan", calibration, "--alpha", 10, "--max-bytes", limit, "-o", file)
    limited = Schedule.load(file)
    assert limited == plan(Calibration.load(calibration), alpha=10.0, max_bytes=limit)
    assert 0 < (limited.buffer_bytes or 0) <= limit
    shown = succeed("plan", calibration, "--alpha", 10, "-o", file).stdout
    assert "self_attn" in shown and "#..#" in shown and "of the MACs" in shown


def test_plan_says_when_nothing_is_reused(calibration: Path, tmp_path: Path) -> None:
    result = succeed("plan", calibration, "--alpha", 0, "-o", tmp_path / "s.json")
    assert "nothing is reused" in result.stderr and "smallest error measured" in result.stderr


def test_generate_writes_images(model: Path, schedule: Path, tmp_path: Path) -> None:
    from PIL import Image

    common = ("generate", model, "--schedule", schedule, "--class-label", 1)
    result = succeed(*common, "-o", tmp_path / "a" / "b", "--samples", 2)
    assert "2 generation(s)" in result.stdout and "reused" in result.stdout
    files = sorted((tmp_path / "a" / "b").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png"]
    with Image.open(files[0]) as image:
        assert image.size == (16, 16)
    document = json.loads(succeed(*common, "-o", tmp_path, "--seed", 1, "--json").stdout)
    assert document["finished"] == 1 and document["reused"] > 0 and document["compute"] < 1
    assert (tmp_path / "0000.png").read_bytes() == files[1].read_bytes()


def test_compare_has_a_row_of_fewer_steps(model: Path, schedule: Path, tmp_path: Path) -> None:
    picture = tmp_path / "side-by-side.png"
    arguments = ("compare", model, "--schedule", schedule, "--class-label", 1)
    result = succeed(*arguments, "--picture", picture)
    for word in ("uncached", "tiny", "steps", "PSNR", "SSIM", "relative error", "time", "memory"):
        assert word in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    moving = picture.with_suffix(".gif")
    document = json.loads(succeed(*arguments, "--json", "--picture", moving).stdout)
    assert moving.read_bytes().startswith(b"GIF")
    assert [row["steps"] for row in document["rows"]][:2] == [STEPS, STEPS]
    assert document["rows"][2]["steps"] < STEPS
    assert document["rows"][1]["compute"] < 1


def test_reports_are_written(
    model: Path, schedule: Path, calibration: Path, tmp_path: Path
) -> None:
    file, label = tmp_path / "report.html", ("--class-label", 1, "--steps", STEPS)
    shown = succeed("compare", model, "--schedule", schedule, *label, "--html", file).stdout
    assert f"report written to {file}" in shown
    page = file.read_text()
    assert "speed-up" in page and "data:image/webp" in page and "DiTTransformer2DModel" in page
    assert f"smoothcache compare {model} --schedule {schedule}" in page
    options = ("--speedup", 2, "--calibration", calibration, "--max-cost", 20, *label)
    succeed("search", model, "-o", tmp_path / "s.json", *options, "--html", file, "--json")
    page = file.read_text()
    assert "smoothcache search" in page and "Error curves" in page and "search cost" in page
    succeed("benchmark", model, *label, "--no-converged", "--html", file)
    assert "best at ≤ 52 % of the MACs" in file.read_text()


def test_demo_shows_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import smoothcache.demo.image

    report = Report((ReportRow("uncached", compute=1.0), ReportRow("[x]", compute=0.5)), "Title")
    asked: dict[str, Any] = {}

    def fake(output: Path, **options: Any) -> Any:
        asked.update(options, output=output)
        options["tell"]("planning")
        return type("Result", (), {"report": report, "folder": output})

    monkeypatch.setattr(smoothcache.demo.image, "run_demo", fake)
    result = succeed("demo", "-o", tmp_path, "--samples", 20, "--steps", 5, "--seed", 3)
    assert asked["output"] == tmp_path
    assert (asked["num_samples"], asked["num_steps"], asked["seed"]) == (20, 5, 3)
    assert "Title" in result.stdout and "[x]" in result.stdout and str(tmp_path) in result.stdout
    assert result.stdout.endswith(f"open the report: {tmp_path / 'report.html'}\n")
    assert result.stderr == "planning\n"
    assert json.loads(succeed("demo", "-o", tmp_path, "--json").stdout)["title"] == "Title"


def test_a_table_that_is_too_wide_is_told_in_parts() -> None:
    row = ReportRow("uncached", compute=1.0, psnr=30.0, accuracies={"colour": 1.0, "shape": 0.5})
    report = Report((row,), "Title")
    drawn = []
    for width in (1000, 40, 1):
        file = io.StringIO()
        console = Console(file=file, width=max(width, 40))
        for table in tables.report_tables(report, width):
            console.print(table)
        drawn.append(file.getvalue())
        assert all(text in drawn[-1] for text in (*report.header(), *report.cells()[0]))
        assert "…" not in drawn[-1]
    assert [text.count("uncached") for text in drawn] == [1, 3, 4]


@pytest.mark.parametrize("modality", list(Modality))
def test_every_modality_has_a_demo(monkeypatch: pytest.MonkeyPatch, modality: Modality) -> None:
    module = importlib.import_module(f"smoothcache.demo.{modality.value}")
    given = inspect.signature(module.run_demo).parameters
    assert {"num_samples", "num_steps", "seed", "progress", "tell"} <= set(given)
    asked: dict[str, Any] = {}

    def fake(output: Path, **options: Any) -> Any:
        asked.update(options, output=output)
        return type("Result", (), {"report": Report((), "Title"), "folder": output})

    monkeypatch.setattr(module, "run_demo", fake)
    succeed("demo", "--modality", modality.value, "--json")
    assert not {"num_samples", "num_steps"} & set(asked), "each has defaults of its own"
    assert asked["output"] == Path(given["output_dir"].default)


def calibrated_and_planned(pipeline: Any, folder: Path, prompt: tuple[str, str]) -> Path:
    """Saves a pipeline, and takes it through `calibrate` and `plan`; the schedule's file."""
    pipeline.save_pretrained(folder / "model")
    measured, plan = folder / "c.safetensors", folder / "s.json"
    common = ("--samples", 1, "--steps", 3, *prompt)
    succeed("calibrate", folder / "model", "-o", measured, *common)
    succeed("plan", measured, "--alpha", 10, "-o", plan)
    return plan


def test_a_pipeline_of_clips_goes_all_the_way(tmp_path: Path) -> None:
    from PIL import Image

    prompt = ("--prompt", "a red circle moving left slowly")
    plan = calibrated_and_planned(build_clip_pipeline(depth=1), tmp_path, prompt)
    assert {"spatial_self_attn", "temporal_ffn"} <= {x.kind for x in Schedule.load(plan).layers}
    run = (tmp_path / "model", "--schedule", plan, *prompt)
    succeed("generate", *run, "-o", tmp_path / "out")
    moving, strip = tmp_path / "clips.gif", tmp_path / "frames.png"
    table = succeed("compare", *run, "--picture", moving, "-o", tmp_path / "rows").stdout
    assert "motion error" in table and f"samples written to {tmp_path / 'rows'}" in table
    same = (tmp_path / "rows" / "s" / "0000.gif").read_bytes()
    assert (tmp_path / "out" / "0000.gif").read_bytes() == same
    for file in (tmp_path / "out" / "0000.gif", moving):
        with Image.open(file) as clip:
            assert clip.n_frames == 8
    succeed("compare", *run, "--picture", strip)
    assert strip.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")
def test_a_pipeline_of_sounds_goes_all_the_way(tmp_path: Path) -> None:
    pytest.importorskip("torchsde")
    prompt = ("--prompt", "a bell playing a low note twice")
    plan = calibrated_and_planned(build_audio_pipeline(), tmp_path, prompt)
    run = (tmp_path / "model", "--schedule", plan, *prompt)
    succeed("generate", *run, "-o", tmp_path / "out")
    picture, rows = tmp_path / "spectrograms.png", tmp_path / "rows"
    assert "SNR" in succeed("compare", *run, "--picture", picture, "-o", rows).stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    for file in (tmp_path / "out" / "0000.wav", rows / "uncached" / "0000.wav"):
        with wave.open(str(file)) as sound:
            assert (sound.getframerate(), sound.getnframes()) == (16_000, 16_384)
    assert "that of sounds does not move" in refused(
        "compare", *run, "--picture", tmp_path / "x.gif"
    )


def test_json_is_all_there_is_on_stdout(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loud(*arguments: Any, **options: Any) -> Any:
        warnings.warn("a package below is deprecated", DeprecationWarning, stacklevel=1)
        warnings.warn("nothing was reused", SmoothCacheWarning, stacklevel=1)
        return load(*arguments, **options)

    load = preparing.load_pipeline
    monkeypatch.setattr(preparing, "load_pipeline", loud)
    result = succeed("inspect", model, "--no-costs", "--json")
    json.loads(result.stdout)
    assert result.stderr == "warning: nothing was reused\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("frobnicate", "No such command 'frobnicate'"),
        ("inspect", "Missing argument 'MODEL'"),
        ("inspect /no/such/folder", "there is no folder '/no/such/folder'"),
        ("inspect {folder}", "no pipeline: it has no model_index.json"),
        ("inspect {model}/transformer", "looks like a single model"),
        ("inspect {calibration}", "is a file"),
        ("inspect {model} --device nonsense", "'nonsense' cannot be used"),
        ("inspect {model} --nonsense", "No such option"),
        ("calibrate {model}", "Missing option '--output'"),
        ("calibrate {model} -o {folder}/c", "needs at least one class label"),
        ("calibrate {model} -o {folder}/c --prompt cat", "takes no prompt; it needs a class"),
        ("calibrate {model} -o {folder}/c --class-label 5000", "there is no class 5000"),
        ("calibrate {model} -o {folder}/c --class-label cat", "--class-label"),
        ("calibrate {model} -o {folder}/c --class-label 1 --steps 0", "--steps"),
        ("calibrate {model} -o {folder}/c --class-label 1 --samples 0", "--samples"),
        ("calibrate {model} -o {folder}/c --class-label 1 --max-gap 0", "--max-gap"),
        ("calibrate {model} -o {folder}/no/c --class-label 1", "there is no folder"),
        ("calibrate {model} -o {folder} --class-label 1", "it is a folder"),
        ("plan {calibration} --alpha -1 -o {folder}/s", "must not be negative, got -1"),
        ("plan {calibration} --alpha abc -o {folder}/s", "--alpha"),
        ("plan {calibration} --alpha nan -o {folder}/s", "must be a finite number"),
        ("plan {calibration} -o {folder}/s", "Missing option '--alpha'"),
        ("plan {calibration} --alpha 1 -o {folder}/s --max-gap 9", "only gaps up to 2"),
        ("plan {calibration} --alpha 1 --speedup 2 -o {folder}/s", "either --alpha or --speedup"),
        ("plan {calibration} --speedup 2 --max-gap 1 -o {folder}/s", "only --alpha goes with"),
        ("plan {calibration} --speedup 99 -o {folder}/s", "no trajectories"),
        ("plan {calibration} --alpha 1 -o {folder}/s --predictor x", "'x' is unknown"),
        ("plan {calibration} --alpha 1 -o {folder}/s --per layer", "--per"),
        ("plan {calibration} --alpha 1 -o {folder}/s --picture {folder}/x.jpg", "must end in"),
        ("plan {folder}/missing --alpha 1 -o {folder}/s", "there is no file"),
        ("plan {schedule} --alpha 1 -o {folder}/s", "not a safetensors file"),
        ("generate {model} --schedule {folder}/no.json -o {folder}/o --class-label 1", "No such"),
        ("generate {model} --schedule {damaged} -o {folder}/o --class-label 1", "not valid JSON"),
        ("generate {model} --schedule {foreign} -o {folder}/o --class-label 1", "planned for"),
        (
            "generate {model} --schedule {schedule} -o {folder}/o --class-label 1 --steps 5",
            "announces 5 steps, but the schedule was made for 6",
        ),
        ("generate {model} --schedule {schedule} -o {damaged}/o --class-label 1", "is a file"),
        ("generate {model} --schedule {schedule} -o {folder}/o", "needs at least one class label"),
        ("compare {model} --class-label 1", "Missing option '--schedule'"),
        ("compare {model} --schedule {foreign} --class-label 1", "planned for"),
        (
            "compare {model} --schedule {schedule} --schedule {schedule} --class-label 1",
            "given twice",
        ),
        ("compare {model} --schedule {schedule} --html {folder}/x.txt", "must end in .html"),
        ("compare {model} --schedule {schedule} --html {folder}/no/x.html", "there is no folder"),
        ("demo -o {damaged}/demo", "is a file"),
        ("demo --samples 0", "--samples"),
    ],
)
def test_bad_input_is_one_line(
    command: str,
    said: str,
    model: Path,
    calibration: Path,
    schedule: Path,
    foreign: Path,
    tmp_path: Path,
) -> None:
    damaged = schedule.with_name("damaged.json")
    damaged.write_bytes(schedule.read_bytes()[:-20])
    known = {
        "model": model,
        "calibration": calibration,
        "schedule": schedule,
        "foreign": foreign,
        "damaged": damaged,
        "folder": tmp_path,
    }
    assert said in refused(*(word.format(**known) for word in command.split()))
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_a_folder_without_permission(monkeypatch: pytest.MonkeyPatch, schedule: Path) -> None:
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.R_OK)  # for root as well
    arguments = ("--schedule", schedule, "-o", schedule.parent / "out", "--class-label", 1)
    assert "is not writable" in refused("generate", "model", *arguments)
    assert "not writable" in refused("calibrate", "model", "-o", schedule.parent / "c.safetensors")


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("matplotlib.figure", "plots", "plan {calibration} --alpha 1 -o {out} --picture {out}.png"),
        (
            "torchmetrics.functional.image",
            "metrics",
            "compare {model} --schedule {schedule} --class-label 1",
        ),
    ],
)
def test_a_missing_extra_is_named(
    package: str,
    extra: str,
    command: str,
    model: Path,
    calibration: Path,
    schedule: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "s.json"
    known = {"calibration": calibration, "model": model, "schedule": schedule, "out": out}
    line = refused(*(word.format(**known) for word in command.split()))
    assert how_to_install(extra) in line
    assert not out.exists()


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "load_pipeline", lambda *_, **__: 1 / 0)
    assert isinstance(run("inspect", "x").exception, ZeroDivisionError)


def test_interrupting_leaves_whole_files_alone(
    model: Path, schedule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = PipelineSampler.__call__

    def interrupted(sampler: Any, i: int) -> Any:
        if i == 1:
            raise KeyboardInterrupt
        return made(sampler, i)

    monkeypatch.setattr(PipelineSampler, "__call__", interrupted)
    options = ("--class-label", 1, "--samples", 3)
    result = run("generate", model, "--schedule", schedule, "-o", tmp_path / "out", *options)
    assert result.exit_code == 130
    assert result.stdout == "" and result.stderr == "interrupted\n"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["0000.png"]
    file = tmp_path / "c.safetensors"
    result = run("calibrate", model, "-o", file, "--steps", 2, *options)
    assert result.exit_code == 130 and not file.exists()


def test_the_installed_command(calibration: Path, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("smoothcache")
    start = [str(command)] if command.exists() else [sys.executable, "-m", "smoothcache"]
    arguments = ["plan", str(calibration), "--alpha", "10", "-o", str(tmp_path / "s.json")]
    done = subprocess.run([*start, *arguments, "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["steps"] == STEPS
    shutil.rmtree(tmp_path)
    done = subprocess.run([*start, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot write") and done.stderr.count("\n") == 1


def test_comparison_names_schedules_by_their_files(
    schedule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def fake(model: Any, sample: Any, variants: Any, **_: Any) -> Comparison:
        names.extend(variant.name for variant in variants)
        return Comparison((ReportRow("uncached", steps=STEPS),), {}, {})

    monkeypatch.setattr(Setup, "load", lambda *_: None)
    sampler = type("S", (), {"steps": 1, "count": 1})
    monkeypatch.setattr(Setup, "sampler", lambda *_, **__: sampler)
    library = importlib.import_module("smoothcache.comparison.compare")
    monkeypatch.setattr(library, "compare", fake)
    (tmp_path / "a").mkdir()
    same = shutil.copy(schedule, tmp_path / "a" / "tiny.json")
    other = shutil.copy(schedule, tmp_path / "other.json")
    files = (schedule, same, other)
    succeed("compare", "x", *(word for file in files for word in ("--schedule", file)))
    assert names == [str(schedule), str(same), "other"]


def test_benchmark_shows_every_family(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(methods.training_free, budgets=(0.5,), intervals=(2,), costs=(0.5, 0.9))
    monkeypatch.setattr(methods, "training_free", few)
    results, picture = model.parent / "results.json", model.parent / "results.png"
    options = ("--class-label", 1, "--steps", STEPS, "--no-converged")
    shown = succeed("benchmark", model, *options, "-o", results, "--picture", picture).stdout
    for name in ("uncached", "3 steps", "UniPC", "FORA, n = 2", "uniform, Taylor 2", "SmoothCache"):
        assert name in shown
    assert picture.read_bytes().startswith(b"\x89PNG") and "to converged" not in shown
    rows = json.loads(results.read_text())["rows"]
    assert {row["family"] for row in rows} >= {"uncached", "fewer steps", "FORA", "SmoothCache"}
    assert rows[0]["compute"] == 1 and all(row["compute"] <= 1 for row in rows)


def test_benchmark_refuses_what_makes_no_sense(model: Path, tmp_path: Path) -> None:
    base = ("benchmark", model, "--class-label", 1)
    assert "(0, 1]" in refused(*base, "--search", 2)
    assert "finite" in refused(*base, "--search", "nan")
    assert "no folder" in refused(*base, "-o", tmp_path / "none" / "x.json")
    assert ".png" in refused(*base, "--picture", tmp_path / "x.gif")
    assert "class label" in refused("benchmark", model)


@pytest.mark.parametrize("limit", [0, 1])
def test_plan_names_the_limit_of_bytes_if_that_is_why_nothing_is_reused(
    limit: int, calibration: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.json"
    options = ("plan", calibration, "--alpha", 10, "-o", out)
    assert succeed(*options).stderr == ""
    line = succeed(*options, "--max-bytes", limit).stderr
    assert f"fit in {limit} bytes; take a larger --max-bytes" in line and "alpha" not in line


def test_a_joint_benchmark_needs_something_to_search_for() -> None:
    assert "add --search" in refused("benchmark", "unused", "--joint")


def test_the_smallest_error_of_two_denoisers_that_take_turns() -> None:
    errors = np.full((1, 4, 1, 8), 0.2)
    errors[:, :2, :, 4:] = np.nan  # the layers of the first denoiser run in the first half
    errors[:, 2:, :, :4] = np.nan
    errors[:, 2:, :, 5:] = 0.1
    errors[..., 0] = np.nan
    layers = [
        replace(layer, path=f"{name}.{layer.path}", kind=f"{name}_{layer.kind}")
        for name in ("high", "low")
        for layer in layers_of(1)
    ]
    measured = calibration_of(errors, samples=1, layers=layers, max_gap=1, steps=8)
    assert tables.smallest_error(measured) == pytest.approx(0.1)


@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_comparing_a_schedule_of_any_granularity(
    model: Path, tmp_path: Path, granularity: Any
) -> None:
    from diffusers import DiTPipeline

    file = tmp_path / "coarse.json"
    pipeline = DiTPipeline.from_pretrained(model)
    Schedule.uniform(pipeline, STEPS, 2, granularity=granularity).save(file)
    options = ("--class-label", 1, "--steps", STEPS, "--json")
    shown = json.loads(succeed("compare", model, "--schedule", file, *options).stdout)
    costs = {row["name"]: row["compute"] for row in shown["rows"]}
    assert costs["uncached"] == 1 and 0.5 <= costs["coarse"] < 1


def test_comparing_what_was_searched(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ("--class-label", 1, "--steps", STEPS)
    succeed("search", model, "-o", file, "--compute", 0.6, "--max-cost", 5, *options)
    shown = json.loads(succeed("compare", model, "--schedule", file, *options, "--json").stdout)
    cost = {row["name"]: row["compute"] for row in shown["rows"]}["found"]
    assert cost == pytest.approx(Schedule.load(file).compute, abs=0.02)


def test_sample_goes_on_where_it_ended(model: Path, tmp_path: Path) -> None:
    arguments = ("sample", model, "-n", 5, "--steps", 2, "--batch-size", 2, "-o", tmp_path / "a")
    made = succeed(*arguments, "--classes", "random", "--join", tmp_path / "all.npz", "--json")
    answer = json.loads(made.stdout)
    assert (answer["samples"], answer["files"]) == (5, 1) and answer["bytes"] > 0
    assert answer["settings"]["steps"] == 2
    with np.load(tmp_path / "all.npz") as file:
        assert file["arr_0"].shape == (5, 16, 16, 3)
    assert "5 samples in 1 file(s)" in succeed(*arguments, "--classes", "random").stdout
    assert "another run, which differs in inputs" in refused(*arguments, "--classes", "all")
    assert "either --class-label or --classes" in refused(
        *arguments, "--classes", "all", "--class-label", 1
    )


def test_sample_under_a_schedule(model: Path, tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    schedule = Schedule.uniform(DiTPipeline.from_pretrained(model), num_steps=4, interval=2)
    schedule.save(tmp_path / "s.json")
    options = ("--schedule", tmp_path / "s.json", "--class-label", 0, "--layout", "png")
    made = succeed("sample", model, "-n", 2, *options, "-o", tmp_path / "a")
    assert "2 samples in 2 file(s)" in made.stdout and "reused" in made.stdout
    assert len(list((tmp_path / "a" / "samples").glob("*.png"))) == 2


def test_sample_takes_prompts_from_a_file(model: Path, tmp_path: Path) -> None:
    build_clip_pipeline(depth=1).save_pretrained(clips := tmp_path / "clips")
    file = tmp_path / "p.json"
    file.write_text('{"12": "red", "7": "a blue circle"}')
    given = ("-n", 2, "--steps", 2, "--prompts", file, "-o", tmp_path / "a")
    assert "takes no prompt" in refused("sample", model, *given)
    assert "have names" in refused("sample", clips, *given, "--prompt", "a dog")
    file = tmp_path / "p.txt"
    file.write_text("red\n")
    given = ("-n", 2, "--steps", 2, "--prompts", file, "-o", tmp_path / "a", "--layout", "gif")
    succeed("sample", clips, *given, "--prompt", "a blue circle", "--device", "cpu")
    made = sorted(x.name for x in (tmp_path / "a" / "samples").iterdir())
    assert made == ["a blue circle-0.gif", "red-0.gif"]


def test_evaluate_schedules_and_folders(model: Path, tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    schedule = Schedule.uniform(DiTPipeline.from_pretrained(model), num_steps=4, interval=2)
    schedule.save(tmp_path / "half.json")
    out = tmp_path / "out"
    generated = ("-n", 2, "--class-label", 0, "--schedule", tmp_path / "half.json", "-o", out)
    page = tmp_path / "report.html"
    more = ("--html", page, "--json")
    made = succeed("evaluate", model, "--metrics", "psnr,ssim", *generated, *more)
    first, cached = json.loads(made.stdout)["rows"]
    assert (first["name"], cached["name"], first["compute"]) == ("uncached", "half", 1)
    assert cached["results"]["psnr"]["value"] < first["results"]["psnr"]["value"] == 150
    assert sorted(x.name for x in out.glob("table.*")) == ["table.json", "table.md"]
    html = page.read_text(encoding="utf-8")
    assert "Images before and after" in html and "smoothcache evaluate" in html and "ssim" in html
    pair = ("evaluate", out / "half", "--reference", out / "uncached", "--metrics", "psnr")
    made = succeed(*pair, "--table", tmp_path / "t.md", "--html", page)
    html = page.read_text(encoding="utf-8")
    assert "Evaluation of half" in html and "before and after" not in html
    assert (tmp_path / "t.md").read_text().startswith("|  | psnr |") and "half" in made.stdout
    assert "give --num-samples" in refused(*pair, "--schedule", tmp_path / "half.json")
    assert "there is no metric 'fidd'" in refused("evaluate", out / "half", "--metrics", "fidd")
    assert "NAME=PATH" in refused(*pair, "--weights", "inception")
    assert "must end in .json" in refused(*pair, "--table", tmp_path / "t.html")
    assert "must end in .html" in refused(*pair, "--html", tmp_path / "t.pdf")


def test_figures_of_a_calibration(model: Path, calibration: Path, tmp_path: Path) -> None:
    options = ("--model", model, "--calibration", calibration, "-o", tmp_path / "figures")
    made = json.loads(succeed("figures", *options, "--json").stdout)
    names = [Path(file).name for file in made["files"]]
    assert names == ["figure-2.png", "figure-3.png", "figure-4.png"]
    assert "there is nothing to draw" in refused("figures", "-o", tmp_path / "none")
