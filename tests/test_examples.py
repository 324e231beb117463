"""The examples run as they are and stay short enough to be read at a glance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {
    "own_module": [],
    "own_pipeline": ["--tiny", "--steps", "4", "--samples", "2", "--alpha", "9"],
}


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_reuses_layers(name: str) -> None:
    printed = run(name, *ARGUMENTS[name])
    assert "1 generation(s) of" in printed
    assert " 0 reused" not in printed and "reused" in printed


def test_help() -> None:
    assert "--tiny" in run("own_pipeline", "--help")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 40
