"""The whole method on a small trained pipeline of images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import plots
from ..comparison.benchmark import IMAGE_MEASURES, Case
from ..comparison.result import REFERENCE, Comparison
from ..diffusers_io.loading import load_pipeline
from ..metrics.distribution import class_accuracy, frechet_distance
from ..metrics.fidelity import relative_error
from ..metrics.report import Report
from .classifier import ShapeClassifier, load_classifier
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
from .shapes import CLASS_NAMES, generate

FOLDER = Path(__file__).with_name("shapes-dit")
NUM_STEPS, GUIDANCE = 50, 3.0
NUM_CLASSES, NUM_REAL = len(CLASS_NAMES), 3000


def run_demo(
    output_dir: str | os.PathLike[str] = "out/demo",
    *,
    folder: str | os.PathLike[str] | None = None,
    num_samples: int = 100,
    num_steps: int = NUM_STEPS,
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> DemoResult:
    """Runs the method from end to end on the demo's pipeline of ten shapes.

    The calibration set has one sample per class. The comparison covers FORA (every 2nd and 3rd
    step), FORA with Taylor extrapolation, the paper's thresholds at the same cost, and fewer steps
    at the same cost.

    Args:
        output_dir: Folder for pictures, the table, the calibration and the schedules; created if
            missing.
        folder: Another pipeline of the same kind with its ``classifier``; None for the demo's.
        num_samples: Number of images to compare, a multiple of the ten classes.
        num_steps: Number of solver steps of the uncached run.
        seed: Seed of the first generation.
        progress: Whether to show progress bars.
        tell: Called with a line of text at the start of every stage.

    Raises:
        InvalidArgumentError: If an argument is invalid.
        PipelineLoadError: If there is no pipeline in the folder.
        MissingPackageError: If a package of the ``demo`` extra is not installed.
    """
    output = checked_output(
        output_dir,
        num_samples=num_samples,
        batch=NUM_CLASSES,
        num_steps=num_steps,
        seed=seed,
    )
    source = FOLDER if folder is None else Path(folder)
    stages = Stages(tell)

    with stages("loading the pipeline"):
        pipe = load_pipeline(source, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        judge = Judge(load_classifier(source / "classifier"))

    def sample(i: int, steps: int) -> Tensor:
        return sample_shapes(pipe, list(range(NUM_CLASSES)), seed + i, steps)

    def calibration_sample(i: int) -> Tensor:
        return sample_shapes(pipe, [i % NUM_CLASSES], seed + CALIBRATION_SEEDS + i, num_steps)

    material = Material(
        pipe,
        "images",
        sample,
        count=num_samples,
        batches=num_samples // NUM_CLASSES,
        calibration_sample=calibration_sample,
        calibration_count=NUM_CLASSES,
        num_steps=num_steps,
        scores={"class_accuracy": judge.accuracy, "frechet_distance": judge.distance},
        describe=lambda comparison: _report(comparison, judge, num_samples),
        show=_grids,
        inputs=CLASS_NAMES,
        command=f"smoothcache demo --samples {num_samples} --steps {num_steps} --seed {seed}",
    )
    return run_course(material, output, stages, progress=progress)


def sample_shapes(
    pipe: Any, labels: list[int], seed: int, num_steps: int, scheduler: Any = None
) -> Tensor:
    """Runs one generation of the pipeline; returns images [labels, 3, 32, 32] in [0, 1]."""
    original = pipe.scheduler
    pipe.scheduler = original if scheduler is None else scheduler
    try:
        images: Tensor = pipe(
            labels,
            guidance_scale=GUIDANCE,
            num_inference_steps=num_steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pt",
        ).images
    finally:
        pipe.scheduler = original
    return images


def shapes_case(num_steps: int = NUM_STEPS, *, seed: int = 0) -> Case:
    """Returns the demo's pipeline as a benchmark case.

    Each generation is ten images, one per class. Training generations use other seeds.
    """
    pipe = load_pipeline(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(load_classifier(FOLDER / "classifier"))

    def sample(
        pipe: Any, i: int, num_inference_steps: int | None = None, scheduler: Any = None
    ) -> Tensor:
        steps = num_inference_steps or num_steps
        return sample_shapes(pipe, list(range(NUM_CLASSES)), seed + i, steps, scheduler)

    def training(
        pipe: Any, i: int, num_inference_steps: int | None = None, scheduler: Any = None
    ) -> Tensor:
        return sample(pipe, CALIBRATION_SEEDS + i, num_inference_steps, scheduler)

    return Case(
        f"Shapes DiT, {num_steps} DDIM steps, guidance {GUIDANCE:g}",
        pipe,
        sample,
        training,
        num_steps,
        measures={
            **IMAGE_MEASURES,
            "perceptual_distance": judge.perceptual_distance,
            "class_accuracy": lambda images, _: judge.recognised(images),
        },
        scores={"frechet_distance": judge.distance},
    )


class Judge:
    """Scores sets of images whose classes alternate.

    Args:
        classifier: A classifier trained on real images.
    """

    def __init__(self, classifier: ShapeClassifier) -> None:
        self._classifier = classifier
        labels = torch.arange(NUM_REAL) % NUM_CLASSES
        self._real = self._features(generate(labels, seed=DATA_SEED)[0])

    def accuracy(self, images: Tensor) -> float:
        """Returns the fraction of images [n, 3, 32, 32] in [0, 1] that are recognised."""
        return class_accuracy(self._logits(images), _labels(len(images)))

    def recognised(self, images: Tensor) -> Tensor:
        """Returns 1 for each recognised image [n, 3, 32, 32] in [0, 1], else 0; [n]."""
        return (self._logits(images).argmax(dim=1) == _labels(len(images))).double()

    def perceptual_distance(self, images: Tensor, reference: Tensor) -> Tensor:
        """Returns the relative L2 distance of feature maps, averaged over stages; [n].

        Args:
            images: Images [n, 3, 32, 32] in [0, 1].
            reference: References of the same shape.
        """
        pairs = zip(self._classifier.maps(2 * images - 1),
                    self._classifier.maps(2 * reference - 1), strict=True)  # fmt: skip
        distances = [relative_error(maps, other, norm="l2") for maps, other in pairs]
        return torch.stack(distances).mean(dim=0)

    def distance(self, images: Tensor) -> float:
        """Returns the Frechet distance of the classifier's features to those of real images."""
        return frechet_distance(self._features(2 * images - 1), self._real)

    def _logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self._classifier(2 * images - 1)
        return logits

    def _features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [images[i : i + 500] for i in range(0, len(images), 500)]
            return torch.cat([self._classifier.features(part) for part in parts])


def real_images(count: int) -> Tensor:
    """Returns real images unseen in training and by ``Judge``, with alternating classes."""
    return generate(_labels(count), seed=DATA_SEED + 1)[0] / 2 + 0.5


def _labels(count: int) -> Tensor:
    return torch.arange(count) % NUM_CLASSES


def _report(comparison: Comparison, judge: Judge, num_samples: int) -> Report:
    real = real_images(num_samples)
    num_steps = comparison.row(REFERENCE).steps
    report = comparison.report(
        f"Shapes DiT, {num_samples} images, {num_steps} DDIM steps, guidance {GUIDANCE:g}"
    )
    notes = (
        "compute: MACs over those of the uncached run; time: wall clock likewise, median over "
        f"batches of {NUM_CLASSES}; PSNR, SSIM, relative error: against the uncached images of the "
        "same seeds.",
        f"Class accuracy and Frechet distance: by a classifier trained on real images, of which "
        f"{num_samples} score {100 * judge.accuracy(real):.1f} % and {judge.distance(real):.3g}.",
        "Each α is the threshold whose schedule costs as much as FORA above or below it, as "
        "nearly as thresholds allow.",
    )
    return replace(report, notes=(*notes, *report.notes))


def _grids(folder: Path, groups: Groups, comparison: Comparison) -> list[Path]:
    files = []
    uncached = comparison.images[REFERENCE][:NUM_CLASSES]
    for interval, group in groups.items():
        shown = rows_to_show(comparison, group)
        rows = [(name, comparison.images[name][:NUM_CLASSES]) for name in shown]
        files.append(folder / f"images-n{interval}.png")
        plots.plot_image_grid(rows, uncached, files[-1])
    return files
