"""The notebook runs from start to end, and everything that it shows is well-formed HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.made_up import MODEL, calibration_of, layers_of
from support.markup import Document
from support.notebook import code_cells, run
from support.pages import HOSTILE, comparison

from smoothcache import Calibration, Row, Schedule

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return read


def test_the_notebook_runs(
    notebook: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = run(notebook)
    shown = [data for one in outputs for x in one if (data := x.get("data"))]
    pages = ["".join(data["text/html"]) for data in shown if "text/html" in data]
    assert [word in page for page, word in zip(pages, ("polyline", "sc-on", "<td>"), strict=True)]
    for page in pages:
        Document(page)
    assert any("image/png" in data for data in shown)
    assert "generation(s) of 20 steps finished" in str(outputs)
    assert "A first comparison" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Schedule.load(tmp_path / "schedule.json").num_steps == 20


def test_the_notebook_is_one(notebook: dict[str, Any]) -> None:
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for cell in code_cells(notebook):
        assert cell["outputs"] or "import" in "".join(cell["source"]), "run support/notebook.py"
    assert str(NOTEBOOK.parents[1]) not in NOTEBOOK.read_text(encoding="utf-8")
    assert NOTEBOOK.stat().st_size < 2**18


def test_schedules_show_themselves() -> None:
    layers = layers_of(2)
    rows = {x.path: Row.uniform(6, 2) for x in layers}
    html = Schedule(6, rows, layers, model=MODEL, compute=0.5)._repr_html_()
    document = Document(html)
    assert "Schedule of 6 steps for ToyDiT, 50.0% of the uncached MACs" in document.text
    assert "self_attn × 2" in document.text and "3 / 6" in document.text
    assert html.count("sc-row") - html.count(".sc-row") == 2


def test_calibrations_show_themselves() -> None:
    html = calibration_of(0.25)._repr_html_()
    document = Document(html)
    assert "Calibration of ToyDiT: 2 samples, 8 steps" in document.text and "0.25" in document.text
    assert html.count("<polyline") == 2 * 3
    one_step = calibration_of(np.nan, steps=1, max_gap=1)
    assert "self_attn" in Document(one_step._repr_html_()).text


def test_comparisons_show_themselves() -> None:
    document = Document(comparison()._repr_html_())
    assert str(comparison()) == comparison().report().to_text()
    assert "every 2nd step" in document.text and "beat plain fewer steps" in document.text


def test_hostile_names_are_only_text() -> None:
    layers = [replace(x, kind=HOSTILE) for x in layers_of(1)]
    model = replace(MODEL, class_name=HOSTILE)
    rows = {x.path: Row.uniform(6, 2) for x in layers}
    shown: list[Calibration | Schedule | Any] = [
        Schedule(6, rows, tuple(layers), model=model, quality={HOSTILE: 1.0}),
        Schedule(6, {HOSTILE: Row.uniform(6, 2)}),
        calibration_of(0.2, layers=layers, model=model),
        comparison("image", HOSTILE),
    ]
    for one in shown:
        html = one._repr_html_()
        assert "<script" not in html and HOSTILE.split("'")[0] in Document(html).text
