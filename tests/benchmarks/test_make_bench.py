"""What `make bench` runs are scripts; what only lends code to them lies where it does not look."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").glob("[a-z]*.py"))


def test_it_runs_these() -> None:
    assert "for script in benchmarks/[a-z]*.py" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(SCRIPTS) > 5


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_each_is_a_script_that_says_how_it_is_run(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert 'if __name__ == "__main__":' in text
    assert f"python benchmarks/{script.name}" in text.split('"""')[1]
