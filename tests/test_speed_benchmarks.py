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

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


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
    arguments = "--tiny --device cpu --rounds 1 --ways eager --cases stable-audio wan-1.3b flux"
    found = written("gpu", *arguments.split())
    assert not found["left_out"]
    assert not [row for row in found["rows"] if "failed" in row]
    rows = {(row["case"], row["cache"]): row for row in found["rows"]}
    for case in ("stable-audio", "wan-1.3b", "flux"):
        assert rows[case, "all computed"]["mac_fraction"] == pytest.approx(1, abs=0.01)
        assert rows[case, "every 3. step (FORA)"]["mac_fraction"] < 0.75
        assert rows[case, "model, every 3. step"]["mac_fraction"] == pytest.approx(1 / 3, abs=0.02)
        assert rows[case, "every 2. step (FORA)"]["kept_bytes"] > 0
    assert ("flux", "FirstBlockCache 0.1") in rows
    assert found["environment"]["torch"] == torch.__version__
    assert capsys.readouterr().out.count("\n") == len(found["rows"]) + 2


def test_gpu_benchmark_says_what_it_left_out(
    written: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--tiny --device cpu --seconds 0 --ways eager --cases dit-1"
    assert written("gpu", *arguments.split())["left_out"] == ["dit-1 eager"]
    assert "dit-1 eager" in capsys.readouterr().err


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
