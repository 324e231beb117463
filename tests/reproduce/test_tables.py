"""The scripts of the paper's tables run from end to end on small pipelines."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "reproduce"

pytestmark = pytest.mark.filterwarnings(
    "ignore:Should have t[ab]:UserWarning"  # torchsde, of rounding
)


@pytest.fixture
def run_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def run(name: str, *options: Any) -> list[dict[str, Any]]:
        monkeypatch.syspath_prepend(str(FOLDER))
        output = tmp_path / name
        arguments = [name, "--tiny", "-o", output, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        importlib.import_module(name).main()
        document = json.loads((output / f"{name}.json").read_text())
        assert (output / f"{name}.md").is_file() and (output / f"{name}.html").is_file()
        assert any("so no value says anything" in note for note in document["notes"])
        rows: list[dict[str, Any]] = document["rows"]
        return rows

    return run


def test_the_facts_of_the_paper_are_complete() -> None:
    paper = json.loads((FOLDER / "paper.json").read_text())
    assert "arXiv 2411.10510" in paper["source"]
    assert [len(paper[f"table{i}"]) for i in (1, 2, 3)] == [15, 3, 9]
    for row in paper["table1"]:
        assert {"fid", "sfid", "is", "tmacs", "latency_s", "steps", "schedule"} == set(row)
    assert paper["table1"][1]["fid"] == [2.28, 0.03]


def test_table_1(run_table: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_table("table1", "--steps", 30, "--num-samples", 2)
    assert [row["name"] for row in rows] == [
        "30 steps, no cache",
        "30 steps, fora n=2",
        "30 steps, smoothcache alpha=0.35",
        "30 steps, trajectory at 53% of the cost",
    ]
    assert rows[0]["compute"] == 1
    assert all(row["compute"] < 0.85 for row in rows[1:])
    assert rows[1]["extras"]["printed fid"] == "3.79 ± 0.04"
    assert "printed TMACs" in capsys.readouterr().out


def test_every_row_of_table_1_has_a_schedule() -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        table = importlib.import_module("table1")
    finally:
        sys.path.remove(str(FOLDER))
    for (steps, _), file in table.FILES.items():
        assert table.published(file, 28).num_steps == steps
    learned = table.published("50-N-2-l2c.json", 28)
    assert len(learned.rows) == 56 and len(table.published("50-N-2-l2c.json", 2).rows) == 4


def test_table_2(run_table: Any, tmp_path: Path) -> None:
    program = tmp_path / "vbench.py"
    program.write_text(
        "import json, sys, pathlib\n"
        "options = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "videos = sorted(pathlib.Path(options['--videos_path']).iterdir())\n"
        "each = [{'video_path': str(x), 'video_results': 0.5} for x in videos]\n"
        "file = pathlib.Path(options['--output_path']) / 'x_eval_results.json'\n"
        "file.write_text(json.dumps({options['--dimension']: [0.5, each]}))\n"
    )
    rows = run_table("table2", "--num-samples", 1, "--vbench", f"{sys.executable} {program}")
    assert len(rows) == 5 and rows[0]["results"]["vbench"]["unit"] == "%"
    assert rows[0]["extras"]["printed vbench"] == "79.36 ± 0.19"


def test_table_3(run_table: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"12": "a high tone rises"}')
    rows = run_table("table3", "--prompts", f"audiocaps={prompts}")
    assert len(rows) == 5 and rows[0]["extras"]["printed fd_openl3_env"] == "81.7 ± 6.8"
    assert (tmp_path / "table3" / "samples").is_dir()
    with pytest.raises(SystemExit):
        run_table("table3", "--prompts", f"others={prompts}")
