"""Metrics of packages that need a separate environment, chosen by the user.

VBench, ImageReward, HPS and VQAScore pin old libraries. They run as subprocesses, which read a
folder of samples and write JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..checks import check_count, listed
from ..errors import FileFormatError, InvalidArgumentError, SmoothCacheError
from ..files.document import Value, parse_json
from .result import MetricResult, mean_result

SCORERS = {
    "image_reward": ("image-reward", "ImageReward-v1.0"),
    "hps_v2": ("hpsv2", "HPS v2.1"),
    "hps_v3": ("hpsv3", "HPSv3"),
    "vqa_score": ("t2v-metrics", "clip-flant5-xxl"),
}
# Lower and upper bound by which VBench's authors scale each dimension, and its weight.
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
DIMENSIONS = (*QUALITY, *SEMANTIC)


class ExternalToolError(SmoothCacheError, RuntimeError):
    """A program in another environment failed or produced no valid result."""


def vbench_name(prompt: str, index: int, suffix: str = ".mp4") -> str:
    """Returns the name of a video in the folder that VBench reads: 5 per prompt, 0 to 4.

    Args:
        prompt: Prompt from VBench's list.
        index: Index of the video among the videos of the prompt.
        suffix: Suffix of the file.

    Returns:
        The file name, without a folder.

    Raises:
        InvalidArgumentError: If the prompt cannot be part of a file's name.

    Example:
        >>> vbench_name("a cat", 0)
        'a cat-0.mp4'
    """
    check_count("index", index, least=0)
    if "/" in prompt or "\0" in prompt or not prompt:
        raise InvalidArgumentError(
            f"VBench names videos by their prompts, and {prompt!r} is no file name."
        )
    return f"{prompt}-{index}{suffix}"


def vbench(
    folder: str | os.PathLike[str],
    *,
    command: Sequence[str],
    output: str | os.PathLike[str],
    dimensions: Sequence[str] = DIMENSIONS,
    timeout: float | None = None,
) -> dict[str, MetricResult]:
    """Runs VBench on a folder of videos, one dimension at a time.

    A dimension with a result in the output folder is not measured again.

    Args:
        folder: Folder of videos with names from ``vbench_name``.
        command: Command that runs VBench in its environment, for example
            ``["/envs/vbench/bin/vbench", "evaluate"]``, optionally with more options.
            ``--videos_path``, ``--dimension`` and ``--output_path`` are added.
        output: Folder for VBench's results, created if missing. Use one folder per set of videos.
        dimensions: Dimensions to measure.
        timeout: Timeout of each dimension, in seconds.

    Returns:
        Scores in [0, 1] by dimension. The spread is the standard error over videos, if the score
        is the mean over videos.

    Raises:
        InvalidArgumentError: If the folder is empty, or a dimension is unknown.
        ExternalToolError: If VBench cannot be started, fails, or writes no result.
        FileFormatError: If its result is invalid.

    Source: Huang et al., "VBench", arXiv 2311.17982.

    Example:
        VBench downloads published weights, so this example is not run as a test.

        >>> results = vbench(  # doctest: +SKIP
        ...     "videos", command=["/envs/vbench/bin/vbench", "evaluate"], output="vbench-results"
        ... )
    """
    videos = Path(folder)
    if not videos.is_dir() or not any(videos.iterdir()):
        raise InvalidArgumentError(f"'{folder}' is not a folder with videos.")
    unknown = [x for x in dimensions if x not in DIMENSIONS]
    if unknown:
        raise InvalidArgumentError(
            f"VBench has no dimension {listed(unknown)}; it has {listed(DIMENSIONS, 20)}."
        )
    results = {}
    for dimension in dimensions:
        target = Path(output) / dimension
        target.mkdir(parents=True, exist_ok=True)
        if not list(target.glob("*_eval_results.json")):
            options = ["--videos_path", str(videos.resolve()), "--dimension", dimension]
            options += ["--output_path", str(target.resolve())]
            _run([*command, *options], what="VBench", timeout=timeout)
        found = sorted(target.glob("*_eval_results.json"))
        if not found:
            raise ExternalToolError(
                f"VBench ended without an error, but wrote no *_eval_results.json to '{target}'."
            )
        results[dimension] = _vbench_result(found[-1], dimension, videos)
    return results


def vbench_total(results: Mapping[str, MetricResult]) -> MetricResult:
    """Computes VBench's total score in per cent from all 16 dimensions.

    Each dimension is scaled by the bounds of VBench's authors. The quality score has weight 4, the
    semantic score weight 1.

    Args:
        results: Result of ``vbench``: scores by dimension.

    Returns:
        The total score; its protocol contains the quality and the semantic score.

    Raises:
        InvalidArgumentError: If a dimension is missing.

    Example:
        >>> best = {
        ...     name: MetricResult(name, high, num_samples=5, unit="", protocol="VBench")
        ...     for name, (_, high, _) in {**QUALITY, **SEMANTIC}.items()
        ... }
        >>> print(vbench_total(best))
        vbench_total 100 % (n = 5)
    """
    missing = [x for x in DIMENSIONS if x not in results]
    if missing:
        raise InvalidArgumentError(
            f"the total score needs all {len(DIMENSIONS)} dimensions; there is no "
            f"{listed(missing, 20)}."
        )

    def part(bounds: Mapping[str, tuple[float, float, float]]) -> float:
        scaled = [
            weight * (results[name].value - low) / (high - low)
            for name, (low, high, weight) in bounds.items()
        ]
        return sum(scaled) / sum(weight for _, _, weight in bounds.values())

    quality, semantic = part(QUALITY), part(SEMANTIC)
    return MetricResult(
        "vbench_total",
        100 * (4 * quality + semantic) / 5,
        num_samples=max(x.num_samples for x in results.values()),
        unit="%",
        protocol=f"quality {100 * quality:.2f} %, semantic {100 * semantic:.2f} %, weights 4 and 1",
    )


def preference_score(
    images: Sequence[str | os.PathLike[str]],
    prompts: Sequence[str],
    *,
    scorer: str,
    python: str | os.PathLike[str],
    timeout: float | None = None,
) -> MetricResult:
    """Scores images with a human preference model.

    Args:
        images: Image files.
        prompts: One prompt per image.
        scorer: ``"image_reward"``, ``"hps_v2"``, ``"hps_v3"`` or ``"vqa_score"``.
        python: Python interpreter of an environment with the scorer's package: image-reward,
            hpsv2, hpsv3 or t2v-metrics.
        timeout: Timeout in seconds.

    Returns:
        The mean score, with its standard error over images.

    Raises:
        InvalidArgumentError: If the scorer is unknown, a file is missing, or the numbers of
            prompts and images differ.
        ExternalToolError: If the interpreter cannot be started, or the scorer fails.
        FileFormatError: If its result is invalid.

    Example:
        Scorers download published weights, so this example is not run as a test.

        >>> result = preference_score(  # doctest: +SKIP
        ...     ["cat.png"], ["a cat"], scorer="hps_v2", python="/envs/hps/bin/python"
        ... )
    """
    if scorer not in SCORERS:
        raise InvalidArgumentError(f"there is no scorer {scorer!r}; there are {listed(SCORERS)}.")
    if len(images) != len(prompts) or not images:
        raise InvalidArgumentError(
            f"there are {len(images)} images and {len(prompts)} prompts; each image needs one."
        )
    missing = [str(x) for x in images if not Path(x).is_file()]
    if missing:
        raise InvalidArgumentError(f"there is no picture {listed(missing)}.")
    package, version = SCORERS[scorer]
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked = {"images": [str(Path(x).resolve()) for x in images], "prompts": list(prompts)}
        request.write_text(json.dumps(asked), encoding="utf-8")
        script = Path(__file__).with_name("scorer.py")
        command = [str(python), str(script), scorer, str(request), str(answer)]
        _run(command, what=f"{scorer} (package {package})", timeout=timeout)
        if not answer.is_file():
            raise ExternalToolError(f"{scorer} ended without an error, but wrote no scores.")
        fields = parse_json(answer.read_bytes(), str(answer)).fields("scores", "version")
    scores = fields["scores"].list_of(Value.number)
    if len(scores) != len(images):
        raise FileFormatError(f"{scorer} gave {len(scores)} scores of {len(images)} images.")
    return mean_result(
        scorer,
        torch.tensor(scores, dtype=torch.float64),
        unit="",
        protocol=f"{version}, {package} {fields['version'].text()}",
    )


def _vbench_result(path: Path, dimension: str, folder: Path) -> MetricResult:
    entries = parse_json(path.read_bytes(), str(path)).entries()
    if dimension not in entries:
        raise FileFormatError(
            f"{path}: no result of '{dimension}'; there is {listed(entries)}. Delete the file to "
            "measure again."
        )
    parts = entries[dimension].items()
    if len(parts) != 2:
        raise entries[dimension].error("expected a score and a list of videos")
    score = parts[0].number()
    measured_on = [video.entries() for video in parts[1].items()]
    paths = [x["video_path"].text() for x in measured_on if "video_path" in x]
    others = sorted({Path(x).name for x in paths} - {x.name for x in folder.iterdir()})
    if others:
        raise FileFormatError(
            f"{path}: the result is of other videos, which '{folder}' does not hold: "
            f"{listed(others)}. Use one output folder for each set of videos."
        )
    videos = [x.get("video_results") for x in measured_on]
    single = [
        float(x.raw)
        for x in videos
        if x is not None and isinstance(x.raw, int | float)  # bool as well: dynamic or not
    ]
    spread = None
    if len(single) == len(videos) > 1:
        measured = mean_result(dimension, torch.tensor(single), unit="", protocol="")
        # The spread is unknown for dimensions that are not a mean over videos.
        if abs(measured.value - score) <= 1e-3 * abs(score):
            spread = measured.spread
    return MetricResult(
        f"vbench_{dimension}",
        score,
        num_samples=len(videos),
        unit="",
        protocol="VBench",
        spread=spread,
        spread_of=None if spread is None else "standard error of the mean over videos",
    )


def _run(command: Sequence[str], *, what: str, timeout: float | None) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, errors="replace", check=False
        )
    except OSError as error:
        raise ExternalToolError(
            f"{what} could not be started: {error}. Name a program in the environment in which it "
            f"is installed; this was {command[0]!r}."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ExternalToolError(f"{what} took longer than {timeout} s and was ended.") from error
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise ExternalToolError(f"{what} failed with exit status {done.returncode}:\n{tail}")
