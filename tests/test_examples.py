"""The examples run as they are and stay short enough to be read at a glance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = ["--tiny", "--steps", "4", "--samples", "1", "--alpha", "9"]
ARGUMENTS = {
    "dit_imagenet": FEW,
    "flux_dev": FEW,
    "open_sora": FEW,
    "own_module": [],
    "own_pipeline": FEW,
    "stable_audio_open": FEW,
    "stable_diffusion_3_5": FEW,
    "wan_video": FEW,
}
BUILDERS = {"tiny"}  # of the models that the others run with --tiny
SERVERS = {"server"}  # in test_server_example.py


def run(name: str, *arguments: str, folder: Path) -> str:
    """What the example prints when it is run in a folder."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} - BUILDERS - SERVERS == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_reuses_layers(name: str, tmp_path: Path) -> None:
    printed = run(name, *ARGUMENTS[name], folder=tmp_path)
    assert "1 generation(s) of" in printed
    assert " 0 reused" not in printed and "reused" in printed


@pytest.mark.parametrize("name", ["open_sora", "own_pipeline"])
def test_help(name: str, tmp_path: Path) -> None:
    assert "--tiny" in run(name, "--help", folder=tmp_path)


def test_every_example_of_a_real_model_can_be_tried_out() -> None:
    for name, arguments in ARGUMENTS.items():
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert ("if args.tiny" in text) == bool(arguments), name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 40
