"""Metrics of other environments, by stand-ins that write the files that they write."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from smoothcache.errors import FileFormatError, InvalidArgumentError
from smoothcache.metrics import (
    ExternalToolError,
    MetricResult,
    over_runs,
    preference_score,
    vbench,
    vbench_name,
    vbench_total,
)
from smoothcache.metrics.external import DIMENSIONS

STAND_IN = """
import json, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
videos = sorted(pathlib.Path(options["--videos_path"]).iterdir())
results = [{"video_path": str(x), "video_results": 0.5 + i / 10} for i, x in enumerate(videos)]
score = sum(x["video_results"] for x in results) / len(results)
answer = {options["--dimension"]: [score, results]}
folder = pathlib.Path(options["--output_path"])
folder.joinpath("results_2026_eval_results.json").write_text(json.dumps(answer))
folder.joinpath("results_2026_full_info.json").write_text("[]")
with pathlib.Path(sys.argv[0]).with_suffix(".log").open("a") as log:
    print(options["--dimension"], file=log)
"""


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for index in range(3):
        (folder / vbench_name("a cat", index)).touch()
    return folder


def program(folder: Path, source: str) -> list[str]:
    (folder / "program.py").write_text(source)
    return [sys.executable, str(folder / "program.py")]


def test_vbench_is_run_and_read(tmp_path: Path, videos: Path) -> None:
    command = program(tmp_path, STAND_IN)
    asked = ["subject_consistency", "scene"]
    results = vbench(videos, command=command, output=tmp_path / "out", dimensions=asked)
    assert list(results) == asked
    scene = results["scene"]
    assert (scene.metric, scene.num_samples) == ("vbench_scene", 3)
    assert scene.value == pytest.approx(0.6)
    assert scene.spread == pytest.approx(0.1 / math.sqrt(3), rel=1e-4)
    assert vbench(videos, command=command, output=tmp_path / "out", dimensions=asked) == results
    assert (tmp_path / "program.log").read_text().split() == asked  # not measured again


def test_vbench_results_of_other_videos_are_refused(tmp_path: Path, videos: Path) -> None:
    command = program(tmp_path, STAND_IN)
    vbench(videos, command=command, output=tmp_path / "out", dimensions=["scene"])
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / vbench_name("a dog", 0)).touch()
    with pytest.raises(FileFormatError, match=r"other videos.*'a cat-0\.mp4'"):
        output = tmp_path / "out"
        vbench(tmp_path / "others", command=command, output=output, dimensions=["scene"])


def test_vbench_total_weighs_its_dimensions() -> None:
    def results(**changed: float) -> dict[str, MetricResult]:
        top = {"motion_smoothness": 0.9975, "scene": 0.8222, "appearance_style": 0.2855}
        top |= {"temporal_style": 0.364, "overall_consistency": 0.364}
        values = {name: top.get(name, 1.0) for name in DIMENSIONS} | changed
        return {
            name: MetricResult(name, value, num_samples=5, unit="", protocol="")
            for name, value in values.items()
        }

    assert vbench_total(results()).value == pytest.approx(100)
    # Half a weight of 6.5 in the quality score, which counts 4 of 5.
    lower = vbench_total(results(dynamic_degree=0.0)).value
    assert lower == pytest.approx(100 * (1 - 0.8 * 0.5 / 6.5))
    lower = vbench_total(results(color=0.0)).value
    assert lower == pytest.approx(100 * (1 - 0.2 / 9))
    with pytest.raises(InvalidArgumentError, match="no 'scene'"):
        vbench_total({k: v for k, v in results().items() if k != "scene"})


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("raise SystemExit('no GPU')", ExternalToolError, "exit status 1:\nno GPU"),
        ("pass", ExternalToolError, "wrote no"),
        (STAND_IN.replace('options["--dimension"]: [', '"other": ['), FileFormatError, "'other'"),
        (STAND_IN.replace("json.dumps(answer)", "'[1'"), FileFormatError, "cut short"),
        (STAND_IN.replace("[score, results]", "[score]"), FileFormatError, "a list of videos"),
        (STAND_IN.replace("[score,", "['high',"), FileFormatError, "finite number"),
        ("import time; time.sleep(60)", ExternalToolError, "longer than 2 s"),
    ],
    ids=["fails", "silent", "other", "cut", "alone", "text", "slow"],
)
def test_vbench_that_fails(
    tmp_path: Path, videos: Path, source: str, error: type[Exception], message: str
) -> None:
    command = program(tmp_path, source)
    with pytest.raises(error, match=message):
        vbench(videos, command=command, output=tmp_path, dimensions=["scene"], timeout=2)


def test_vbench_that_is_not_there(tmp_path: Path, videos: Path) -> None:
    absent = [str(tmp_path / "vbench"), "evaluate"]
    with pytest.raises(ExternalToolError, match="could not be started"):
        vbench(videos, command=absent, output=tmp_path, dimensions=["scene"])
    with pytest.raises(InvalidArgumentError, match="no dimension 'beauty'"):
        vbench(videos, command=absent, output=tmp_path, dimensions=["beauty"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgumentError, match="not a folder with videos"):
        vbench(tmp_path / "empty", command=absent, output=tmp_path)
    with pytest.raises(InvalidArgumentError, match="no file name"):
        vbench_name("a/b", 0)


SCORERS = {
    "image_reward": ("ImageReward", "load = lambda name: type('M', (), {'score': SCORE})()"),
    "hps_v2": ("hpsv2", "score = lambda image, prompt, hps_version: [len(prompt)]"),
    "hps_v3": (
        "hpsv3",
        "HPSv3RewardInferencer = type('M', (), {'reward': lambda self, prompts, image_paths: "
        "[[len(x)] for x in prompts]})",
    ),
    "vqa_score": (
        "t2v_metrics",
        "VQAScore = lambda model: lambda images, texts: [[len(x)] for x in texts]",
    ),
}


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        path.touch()
    return paths


@pytest.mark.parametrize("scorer", SCORERS)
def test_scorers_are_called_in_their_environment(
    scorer: str, tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package, source = SCORERS[scorer]
    source = source.replace("SCORE", "lambda self, prompt, image: len(prompt)")
    (tmp_path / f"{package}.py").write_text(f"__version__ = '9'\n{source}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    prompts = ["a", "bb", "cccccc"]
    result = preference_score(pictures, prompts, scorer=scorer, python=sys.executable)
    assert (result.value, result.num_samples) == (3, 3)
    assert result.spread == pytest.approx(math.sqrt(7 / 3))
    assert result.protocol.endswith(" 9")


def test_scorers_that_fail(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a", "b", "c"]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ExternalToolError, match=r"package hpsv2.*failed[\s\S]*No module named"):
        preference_score(pictures, prompts, scorer="hps_v2", python=sys.executable)
    (tmp_path / "hpsv2.py").write_text("score = lambda *a, **k: [float('nan')]")
    with pytest.raises(FileFormatError, match="finite number"):
        preference_score(pictures, prompts, scorer="hps_v2", python=sys.executable)
    with pytest.raises(InvalidArgumentError, match="no scorer 'taste'"):
        preference_score(pictures, prompts, scorer="taste", python=sys.executable)
    with pytest.raises(InvalidArgumentError, match="3 images and 2 prompts"):
        preference_score(pictures, prompts[:2], scorer="hps_v2", python=sys.executable)
    with pytest.raises(InvalidArgumentError, match="no picture"):
        absent = [tmp_path / "absent.png"]
        preference_score(absent, ["a"], scorer="hps_v2", python=sys.executable)


def test_runs_have_a_mean_and_a_deviation() -> None:
    runs = [
        MetricResult("fid", x, num_samples=9, unit="", protocol="p", spread=7) for x in (1.0, 3.0)
    ]
    result = over_runs(runs)
    assert (result.value, result.spread) == (2, pytest.approx(math.sqrt(2)))
    assert result.spread_of == "standard deviation over 2 runs"
    assert json.loads(json.dumps(result.to_json()))["protocol"] == "p"
    with pytest.raises(InvalidArgumentError, match="differ in num_samples"):
        over_runs([runs[0], MetricResult("fid", 1, num_samples=8, unit="", protocol="p")])
    with pytest.raises(InvalidArgumentError, match="at least 2 runs"):
        over_runs(runs[:1])
