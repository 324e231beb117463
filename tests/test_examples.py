"""The examples run as they are and stay short enough to be read at a glance."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import warnings
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


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs an example in this process, which has imported what takes the longest."""
    file = EXAMPLES / f"{name}.py"
    monkeypatch.syspath_prepend(EXAMPLES)  # where the interpreter finds its neighbours
    monkeypatch.setattr(sys, "argv", [str(file), *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as for a user
        runpy.run_path(str(file), run_name="__main__")


def assert_it_reused(printed: str) -> None:
    assert "1 generation(s) of" in printed
    assert " 0 reused" not in printed and "reused" in printed


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} - BUILDERS - SERVERS == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_reuses_layers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(name, *ARGUMENTS[name], monkeypatch=monkeypatch)
    assert_it_reused(capsys.readouterr().out)


def test_an_example_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "own_module.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_it_reused(done.stdout)


@pytest.mark.parametrize("name", ["open_sora", "own_pipeline"])
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(name, "--help", monkeypatch=monkeypatch)
    assert "--tiny" in capsys.readouterr().out


def test_every_example_of_a_real_model_can_be_tried_out() -> None:
    for name, arguments in ARGUMENTS.items():
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert ("if args.tiny" in text) == bool(arguments), name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 40
