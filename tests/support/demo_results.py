"""What must hold for the result of a demo, whatever its modality."""

from __future__ import annotations

import json
from collections.abc import Sequence

from smoothcache import Calibration, Schedule
from smoothcache.comparison.result import REFERENCE
from smoothcache.demo.course import DemoResult

STAGES = ["loading", "calibrating", "planning", "sampling", "writing"]


def assert_everything_is_compared(result: DemoResult, *columns: str) -> None:
    """Every method has its row and its rival of fewer steps, and every row the columns."""
    names = [row.name for row in result.report.rows]
    assert names[0] == REFERENCE
    assert {f"FORA n = {n}{how}" for n in (2, 3) for how in ("", ", Taylor")} <= set(names)
    assert any(name.startswith("α = ") for name in names)
    assert set(result.comparison.rivals) == set(result.schedules)
    assert set(result.comparison.rivals.values()) <= set(names)
    for row in result.report.rows:
        missing = {x for x in ("compute", "time", *columns) if getattr(row, x) is None}
        assert not missing, row.name
    assert result.report.notes[-1] == result.comparison.verdict()[-1]


def assert_everything_is_written(result: DemoResult, *names: str) -> None:
    """The files are there, no others are, and they can be read."""
    assert sorted(result.files) == sorted(result.folder.iterdir())  # and none of them twice
    written = {path.name for path in result.files}
    assert {"error-curves.png", "composition.png", "schedule-n3-taylor.png", *names} <= written
    document = json.loads((result.folder / "table.json").read_text(encoding="utf-8"))
    assert len(document["rows"]) == len(result.report.rows)
    assert "FORA n = 2" in (result.folder / "table.md").read_text(encoding="utf-8")
    for path in result.files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    again = Calibration.load(result.folder / "calibration.safetensors")
    assert again.num_steps == result.calibration.num_steps
    even = Schedule.load(result.folder / "schedule-n2-fora.json")
    assert even == result.schedules["FORA n = 2"]


def assert_stages_are_told_and_timed(result: DemoResult, told: Sequence[str]) -> None:
    assert [line.partition(" ")[0].strip(",") for line in told] == STAGES
    assert len(result.seconds) == len(told)
