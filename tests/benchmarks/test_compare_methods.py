"""The comparison of all methods, at a few steps, with the rivals that are installed."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import compare_methods
import pytest
import torch
from compare_methods import AIMS, PAGE, main, page, sentence

from smoothcache.comparison import methods
from smoothcache.comparison.benchmark import Aim, Benchmark
from smoothcache.metrics.report import ReportRow

# What diffusers' FasterCache says of itself, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")
HAS_CACHE_DIT = importlib.util.find_spec("cache_dit") is not None


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("compared") / "results.json"
    main(
        [
            *("--quick", "--steps", "4", "--only", "rivals"),
            *("--no-progress", "--json", str(file)),
        ]
    )
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_rivals_run_or_are_listed_with_their_error(document: dict[str, Any]) -> None:
    families = {row["family"] for row in document["rows"]}
    rivals = {
        *("FirstBlockCache", "MagCache", "PyramidAttentionBroadcast", "FasterCache", "SeaCache"),
        "TaylorSeer, layers, order 1",
    }
    assert {f"diffusers {rival}" for rival in rivals} <= families, document["failures"]
    failed = set(document["failures"])
    assert all("DBCache" in name for name in failed)
    assert bool(failed) != HAS_CACHE_DIT
    assert all("cache_dit" in reason for reason in document["failures"].values())


def test_every_row_has_all_its_columns(document: dict[str, Any]) -> None:
    wanted = ("compute", "time", "psnr", "ssim", "relative_error", "perceptual_distance")
    judged = ("converged_psnr", "class_accuracy", "frechet_distance", "peak_bytes")
    for row in document["rows"]:
        assert all(row[name] is not None for name in (*wanted, *judged)), row["name"]
    by_name = {row["name"]: row for row in document["rows"]}
    seer = by_name["TaylorSeer, layers, order 1, interval 2, 3 of warm-up"]
    assert seer["compute"] < 1 and seer["margins"]["psnr"] > 0
    idle = by_name["TaylorSeer, defaults, order 1, interval 3, 3 of warm-up"]
    assert (idle["compute"], idle["psnr"]) == (1, "inf"), "with its defaults it finds no layer"


def test_nothing_leaks_from_one_generation_into_the_next(document: dict[str, Any]) -> None:
    assert document["row_notes"] == {}


def test_the_environment_is_told(document: dict[str, Any]) -> None:
    assert document["samples"] == 10
    assert {"date", "cpu", "cores", "threads", "python", "packages"} == set(document["environment"])


@pytest.mark.parametrize(
    "arguments", [["--samples", "15"], ["--write", "--quick"], ["--only", "magic"]]
)
def test_bad_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "error" in capsys.readouterr().err


ROWS = (
    ReportRow("uncached", "uncached", compute=1.0, psnr=60.0),
    ReportRow("search, ≤ 0.22", methods.SEARCH, compute=0.22, psnr=40.0),
    ReportRow("FORA, n = 5", "FORA", compute=0.211, psnr=39.0),
    ReportRow(
        "FirstBlockCache, threshold 0.2", "diffusers FirstBlockCache", compute=0.2, psnr=20.0
    ),
)
RESULT = Benchmark(
    "made up", ROWS, {"DBCache": "ImportError: none"}, {}, {x.name: {} for x in ROWS}
)


def test_a_missed_aim_is_said() -> None:
    missed, reached = RESULT.verdicts((0.22,), [AIMS[0], Aim("psnr", (methods.SEARCH,))])
    assert sentence(missed) == (
        "compute ≤ 0.22, PSNR: search, ≤ 0.22 (40.0 dB at 0.220) against FORA, n = 5 (39.0 dB at "
        "0.211): better by 1.0 dB (at least 2.0 dB wanted), MISSED."
    )
    assert sentence(reached).endswith("better by 1.0 dB, reached.")


def test_what_the_samples_cannot_tell_apart_is_said() -> None:
    values = {"search, ≤ 0.22": {"psnr": torch.tensor([38.9, 39.9])}}
    values["FORA, n = 5"] = {"psnr": torch.tensor([39.0, 40.0])}
    rows = (ROWS[0], replace(ROWS[1], psnr=39.4), replace(ROWS[2], psnr=39.5))
    values["FORA, n = 5"]["psnr"] += torch.tensor([0.0, 0.2])
    level = Benchmark("made up", rows, {}, {}, {"uncached": {}, **values})
    (verdict,) = level.verdicts((0.22,), [Aim("psnr", (methods.SEARCH,))])
    assert "better by -0.2 dB ± 1.3 dB, level:" in sentence(verdict)


def test_rows_of_an_earlier_run_are_kept(document: dict[str, Any]) -> None:
    merged = compare_methods.with_kept(RESULT, {**document, "failures": {"gone": "why"}})
    names = [row.name for row in merged.rows]
    assert names[: len(ROWS)] == [row.name for row in ROWS] and len(set(names)) == len(names)
    assert not any("FirstBlockCache" in name for name in names[len(ROWS) :]), "measured anew"
    assert merged.failures == {"gone": "why", **RESULT.failures}
    idle = next(row for row in merged.rows if "defaults" in row.name)
    assert idle.psnr == math.inf and merged.values[idle.name] == {}
    assert merged.verdicts((0.52,), AIMS)


def test_the_page_has_a_place_for_everything(tmp_path: Path) -> None:
    environment = {"cpu": "x", "cores": 2, "threads": 2, "python": "3", "packages": {}, "date": "d"}
    document = {"title": "t", "samples": 10, "environment": environment, "minutes": 1.0}
    text = page(PAGE.read_text(encoding="utf-8"), RESULT, RESULT.verdicts((0.22,), AIMS), document)
    assert "| search, ≤ 0.22 |" in text and "DBCache: `ImportError: none`" in text
    assert page(text, RESULT, RESULT.verdicts((0.22,), AIMS), document) == text
    compare_methods.draw(RESULT, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="one place for environment"):
        page("nothing", RESULT, [], document)
