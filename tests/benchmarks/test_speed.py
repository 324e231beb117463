"""The scripts that measure speed run, at tiny sizes, and write what they say; times are not judged.

What they print beside the times does not depend on the machine, and is checked.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import smoothcache as sc

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"of_benchmarks_{name}", BENCHMARKS / f"{name}.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a script with arguments; returns what it wrote."""

    def run(name: str, *arguments: str) -> Any:
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--json", str(file)])
        script(name).main()
        return json.loads(file.read_text())

    return run


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers, of its own modules
def test_gpu_benchmark(written: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ("stable-audio", "wan-1.3b", "open-sora")  # flux, with rivals, comes below
    arguments = f"--tiny --device cpu --rounds 1 --ways eager --no-rivals --cases {' '.join(cases)}"
    found = written("gpu", *arguments.split())
    assert not found["left_out"]
    assert not [row for row in found["rows"] if "failed" in row]
    rows = {(row["case"], row["cache"]): row for row in found["rows"]}
    for case in cases:
        assert rows[case, "all computed"]["mac_fraction"] == pytest.approx(1, abs=0.01)
        assert rows[case, "every 3. step (FORA)"]["mac_fraction"] < 0.75
        assert rows[case, "model, every 3. step"]["mac_fraction"] == pytest.approx(1 / 3, abs=0.02)
        assert rows[case, "every 2. step (FORA)"]["kept_bytes"] > 0
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert capsys.readouterr().out.count("\n") == len(found["rows"]) + 2


def test_gpu_benchmark_has_rivals_at_about_equal_macs(written: Any) -> None:
    found = written("gpu", *"--tiny --device cpu --rounds 1 --ways eager --cases flux".split())
    rows = {row["cache"]: row for row in found["rows"]}
    assert rows["model, every 3. step"]["mac_fraction"] == pytest.approx(1 / 3, abs=0.02)
    ours = rows["every 2. step (FORA)"]["mac_fraction"]
    for name in ("FirstBlockCache, about 1/2", "TaylorSeer, layers, every 2."):
        assert rows[f"diffusers {name}"]["mac_fraction"] == pytest.approx(ours, abs=0.2)
    cache_dit = rows["cache-dit DBCache, every 2."]
    if importlib.util.find_spec("cache_dit") is None:
        assert "cache_dit" in cache_dit["failed"]
    else:
        assert cache_dit["mac_fraction"] == pytest.approx(ours, abs=0.2)


def test_gpu_benchmark_says_what_it_left_out(
    written: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--tiny --device cpu --seconds 0 --ways eager --cases dit-1"
    found = written("gpu", *arguments.split())
    assert not found["rows"]
    first = {"case": "dit-1", "way": "eager", "cache": "no cache"}
    assert found["left_out"][0] == first
    assert "left out of dit-1 eager: no cache, all computed" in capsys.readouterr().err


def test_gpu_benchmark_calls_models_of_full_size() -> None:
    """Where there is no memory for them, without numbers: on the meta device."""
    cases = script("gpu").CASES
    for name, case in cases.items():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                model, x = case.build(**case.full), torch.empty(case.shape)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            out = case.call(model, x, torch.full((len(x),), 500, device="meta"))
        assert (out.shape, out.dtype) == (x.shape, torch.bfloat16), name
        assert len(sc.Schedule.uniform(model, case.steps, 2).layers or ()) >= 56


def test_gpu_benchmark_begins_with_what_has_an_aim() -> None:
    gpu = script("gpu")
    tasks = gpu.plan(list(gpu.CASES), gpu.WAYS)
    assert len(set(tasks)) == len(tasks)
    plain = [index for index, task in enumerate(tasks) if task.cache == "no cache"]
    for index in plain:  # without which nothing is compared
        of_same = [at for at, task in enumerate(tasks) if task[:2] == tasks[index][:2]]
        assert min(of_same) == index
    rival = min(index for index, task in enumerate(tasks) if gpu.is_rival(task))
    for task in (
        *(("dit-32", way, "published alpha 0.18") for way in ("eager", "whole")),
        *((case, "blocks", "every 3. step (FORA)") for case in ("flux", "wan-1.3b")),
        ("stable-audio", "blocks", "every 2. step (FORA)"),
    ):
        assert tasks.index(task) < rival


def test_gpu_benchmark_begins_no_row_that_would_take_too_long() -> None:
    gpu = script("gpu")
    clock, task = gpu.Clock(limit=100.0), gpu.Task("flux", "blocks", "all computed")
    assert clock.has_time_for(task)
    clock.note(task, 200.0)
    assert not clock.has_time_for(task)
    assert not clock.has_time_for(task._replace(case="dit-1"))  # of which nothing is known
    clock.note(task._replace(case="dit-1"), 1.0)
    assert clock.has_time_for(task._replace(case="dit-1"))


def test_gpu_benchmark_that_is_stopped_leaves_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, file = script("gpu"), tmp_path / "figures.json"
    whole = gpu.Bench.row

    def row(self: Any, task: Any) -> Any:
        if task.cache != "no cache":
            raise KeyboardInterrupt
        return whole(self, task)

    monkeypatch.setattr(gpu.Bench, "row", row)
    arguments = "--tiny --device cpu --rounds 1 --ways eager --cases wan-1.3b --json"
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments.split(), str(file)])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    assert [row["cache"] for row in json.loads(file.read_text())["rows"]] == ["no cache"]


def test_gpu_benchmark_fails_if_a_row_of_ours_does(
    written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("full_size.caches._uniform", lambda *_, **__: 1 / 0)
    arguments = "--tiny --device cpu --rounds 1 --ways eager --cases wan-1.3b --no-rivals"
    with pytest.raises(SystemExit, match=r"wan-1\.3b eager all computed"):
        written("gpu", *arguments.split())


def test_cpu_benchmark(written: Any) -> None:
    arguments = "--size tiny --steps 6 --rounds 1 --batch 1 --ways eager"
    rows = {row["schedule"]: row for row in written("speed", *arguments.split())["rows"]}
    assert rows["all computed"]["macs"] == pytest.approx(1, abs=0.01)
    assert rows["model, every 3rd"]["macs"] == pytest.approx(1 / 3, abs=0.02)
    assert rows["model, every 3rd"]["kept_bytes"] < rows["layers, every 3rd"]["kept_bytes"]


def test_eager_overhead(written: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = written("eager_overhead", *"--layers 3 --rounds 2 --profile".split())
    assert set(found["microseconds"]) >= {"reused, hold", "reused, taylor", "computed and kept"}
    assert "function calls" in capsys.readouterr().out
