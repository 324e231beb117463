"""The whole method on a small trained text-to-video pipeline in the style of Open-Sora."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import plots
from ..comparison.result import REFERENCE, Comparison
from ..diffusers_io.loading import load_pipeline
from ..metrics.distribution import attribute_accuracy, frechet_distance
from ..metrics.report import Report
from .classifier import load_as
from .clip_classifier import ClipClassifier
from .clips import ATTRIBUTES, caption, generate, spread_labels
from .course import (
    CALIBRATION_SEEDS,
    DATA_SEED,
    DemoResult,
    Groups,
    Material,
    Stages,
    checked_output,
    rows_to_show,
    run_course,
)

FOLDER = Path(__file__).with_name("clips-stdit")
NUM_STEPS, GUIDANCE = 30, 2.0
BATCH, NUM_CALIBRATION, NUM_REAL = 12, 10, 600
SHOWN = 2  # number of clips whose frames are all drawn


def run_demo(
    output_dir: str | os.PathLike[str] = "out/demo-video",
    *,
    folder: str | os.PathLike[str] | None = None,
    num_samples: int = 48,
    num_steps: int = NUM_STEPS,
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> DemoResult:
    """Runs the method from end to end on the demo's pipeline of moving shapes.

    The calibration set has ten captions. The comparison covers FORA (every 2nd and 3rd step, and
    the last), FORA with Taylor extrapolation, the paper's thresholds at the same cost, and fewer
    steps at the same cost.

    Args:
        output_dir: Folder for pictures, the table, the calibration and the schedules; created if
            missing.
        folder: Another pipeline of the same kind with its ``classifier``; None for the demo's.
        num_samples: Number of clips to compare, a multiple of twelve.
        num_steps: Number of solver steps of the uncached run.
        seed: Seed of the first generation.
        progress: Whether to show progress bars.
        tell: Called with a line of text at the start of every stage.

    Raises:
        InvalidArgumentError: If an argument is invalid.
        PipelineLoadError: If there is no pipeline in the folder.
        MissingPackageError: If a package of the ``video`` extra is not installed.
    """
    output = checked_output(
        output_dir,
        num_samples=num_samples,
        batch=BATCH,
        num_steps=num_steps,
        seed=seed,
        packages=("transformers", "PIL"),
        extra="video",
    )
    source = FOLDER if folder is None else Path(folder)
    stages = Stages(tell)

    with stages("loading the pipeline"):
        pipe = load_pipeline(source, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        judge = Judge(load_as(ClipClassifier, source / "classifier"))
    labels = spread_labels(num_samples)

    def sample(i: int, steps: int) -> Tensor:
        return sample_clips(pipe, labels[i * BATCH : (i + 1) * BATCH], seed + i, steps)

    def calibration_sample(i: int) -> Tensor:
        row = spread_labels(NUM_CALIBRATION)[i : i + 1]
        return sample_clips(pipe, row, seed + CALIBRATION_SEEDS + i, num_steps)

    material = Material(
        pipe,
        "clips",
        sample,
        count=num_samples,
        batches=num_samples // BATCH,
        calibration_sample=calibration_sample,
        calibration_count=NUM_CALIBRATION,
        num_steps=num_steps,
        scores=judge.scores(),
        describe=lambda comparison: _report(comparison, judge, num_samples),
        show=_show,
        last=True,  # the sample is the transformer's prediction at the last step
        inputs=[caption(row) for row in labels],
        command=(
            f"smoothcache demo --modality video --samples {num_samples} --steps {num_steps} "
            f"--seed {seed}"
        ),
    )
    return run_course(material, output, stages, progress=progress)


def sample_clips(pipe: Any, labels: Tensor, seed: int, num_steps: int) -> Tensor:
    """Runs one generation; returns clips [labels, frames, 3, height, width] in [0, 1]."""
    clips: Tensor = pipe(
        [caption(row) for row in labels],
        guidance_scale=GUIDANCE,
        num_inference_steps=num_steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
    ).frames
    return clips


class Judge:
    """Scores sets of clips with the captions of ``spread_labels``.

    Args:
        classifier: A classifier trained on real clips.
    """

    def __init__(self, classifier: ClipClassifier) -> None:
        self._classifier = classifier
        self._real = self._features(generate(spread_labels(NUM_REAL), seed=DATA_SEED)[0])

    def accuracies(self, clips: Tensor) -> dict[str, float]:
        """Returns the fraction of clips [n, frames, 3, h, w] in [0, 1] matching each attribute."""
        wanted = dict(zip(ATTRIBUTES, spread_labels(len(clips)).unbind(1), strict=True))
        with torch.no_grad():
            return attribute_accuracy(self._classifier(2 * clips - 1), wanted)

    def distance(self, clips: Tensor) -> float:
        """Returns the Frechet distance of the classifier's features to those of real clips."""
        return frechet_distance(self._features(2 * clips - 1), self._real)

    def scores(self) -> dict[str, Callable[[Tensor], float]]:
        """Returns the classifier's columns of the table."""

        def accuracy(name: str) -> Callable[[Tensor], float]:
            return lambda clips: self.accuracies(clips)[name]

        named = {f"{name}_accuracy": accuracy(name) for name in ATTRIBUTES}
        return {**named, "frechet_distance": self.distance}

    def _features(self, clips: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._classifier.features(part) for part in torch.split(clips, 100)])


def real_clips(count: int) -> Tensor:
    """Returns real clips unseen in training and by ``Judge``, in the order of the captions."""
    return generate(spread_labels(count), seed=DATA_SEED + 1)[0] / 2 + 0.5


def _report(comparison: Comparison, judge: Judge, num_samples: int) -> Report:
    real = real_clips(num_samples)
    num_steps = comparison.row(REFERENCE).steps
    report = comparison.report(
        f"Clips STDiT, {num_samples} clips, {num_steps} rectified flow steps, guidance {GUIDANCE:g}"
    )
    rates = ", ".join(f"{name} {100 * x:.1f} %" for name, x in judge.accuracies(real).items())
    notes = (
        "compute: MACs over those of the uncached run; time: wall clock likewise, median over "
        f"batches of {BATCH}, text encoder and decoder included; PSNR, SSIM: mean over frames, "
        "they, relative error and motion error (the same of the changes from frame to frame): "
        "against the uncached clips of the same seeds.",
        "Accuracies and Frechet distance: by a classifier trained on real clips, of which "
        f"{num_samples} score {rates}, and {judge.distance(real):.3g}.",
        "Each α is the threshold whose schedule costs as much as FORA above or below it, as "
        "nearly as thresholds allow.",
    )
    return replace(report, notes=(*notes, *report.notes))


def _show(folder: Path, groups: Groups, comparison: Comparison) -> list[Path]:
    """Writes all frames of a few clips, and animations of more clips; returns the files."""
    files = []
    uncached = comparison.images[REFERENCE][:BATCH]
    for interval, group in groups.items():
        rows = [(name, comparison.images[name][:BATCH]) for name in rows_to_show(comparison, group)]
        for i in range(min(SHOWN, len(uncached))):
            files.append(folder / f"frames-n{interval}-{i}.png")
            plots.plot_image_grid(
                [(name, clips[i]) for name, clips in rows], uncached[i], files[-1]
            )
        files.append(folder / f"clips-n{interval}.gif")
        plots.animate_clip_grid(rows, uncached, files[-1])
    return files
