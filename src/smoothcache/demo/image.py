"""The whole method on a small trained pipeline: calibrate, plan, sample, compare, draw."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import plots
from .._checks import check_count
from ..benchmark import IMAGE_MEASURES, Case
from ..calibrate import calibrate
from ..calibration import Calibration
from ..compare import REFERENCE, Comparison, Variant, compare
from ..diffusers_io import load_pipeline
from ..errors import InvalidArgumentError
from ..methods import plan_at_cost
from ..metrics import class_accuracy, frechet_distance, relative_error
from ..planners import plan_uniform
from ..report import Report
from ..schedule import Schedule
from .classifier import ShapeClassifier, load_classifier
from .shapes import CLASS_NAMES, generate

FOLDER = Path(__file__).with_name("shapes-dit")
NUM_STEPS, GUIDANCE, MAX_GAP = 50, 3.0, 3
INTERVALS = (2, 3)
CALIBRATION_SEEDS, DATA_SEED = 1_000_000, 20_000  # apart from those of the compared samples
NUM_CLASSES, NUM_REAL = len(CLASS_NAMES), 3000

Groups = Mapping[int, Mapping[str, Schedule]]


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo measured and where it wrote it.

    Attributes:
        report: The table, with what it was measured on and the verdict below it.
        comparison: The rows and samples behind it.
        calibration: The error curves.
        schedules: Name of a row -> its schedule.
        folder: Where everything was written.
        files: What was written, pictures first.
        seconds: Stage -> wall clock.
    """

    report: Report
    comparison: Comparison
    calibration: Calibration
    schedules: Mapping[str, Schedule]
    folder: Path
    files: tuple[Path, ...]
    seconds: Mapping[str, float]


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

    Calibrates on one sample of each class. Compares computing every 2nd and every 3rd step
    (FORA), the same with Taylor extrapolation, the paper's thresholds that cost the same, and
    plain fewer steps of the same cost.

    Args:
        output_dir: Where to write pictures, the table, the calibration and the schedules; made
            if it does not exist.
        folder: Another pipeline of the same kind, with its ``classifier``; None for the demo's.
        num_samples: How many images to compare, a multiple of the ten classes.
        num_steps: Solver steps of the uncached run.
        seed: Other seeds give other images.
        progress: Whether to show progress bars.
        tell: Is called with a line at the start of every stage.

    Raises:
        InvalidArgumentError: If an argument has no sensible value.
        PipelineLoadError: If there is no pipeline in the folder.
        MissingPackageError: If a package of the ``demo`` extra is not installed.
    """
    check_count("num_samples", num_samples, least=1)
    check_count("num_steps", num_steps, least=2)
    check_count("seed", seed, least=0)
    if num_samples % NUM_CLASSES:
        raise InvalidArgumentError(
            f"num_samples must be a multiple of {NUM_CLASSES}, one for each class, got "
            f"{num_samples}."
        )
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    source = FOLDER if folder is None else Path(folder)
    stages = _Stages(tell)

    with stages("loading the pipeline"):
        pipe = load_pipeline(source, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        judge = Judge(load_classifier(source / "classifier"))

    def sample(i: int, steps: int) -> Tensor:
        return sample_shapes(pipe, list(range(NUM_CLASSES)), seed + i, steps)

    def calibration_sample(i: int) -> Tensor:
        return sample_shapes(pipe, [i % NUM_CLASSES], seed + CALIBRATION_SEEDS + i, num_steps)

    with stages(f"calibrating on {NUM_CLASSES} samples of {num_steps} steps"):
        gap = min(MAX_GAP, num_steps - 1)
        calibration = calibrate(pipe, calibration_sample, NUM_CLASSES, gap, progress=progress)
    with stages("planning"):
        groups = plan_demo(calibration)
        schedules = {name: x for group in groups.values() for name, x in group.items()}
    with stages(f"sampling {num_samples} images in each way"):
        comparison = compare(
            pipe,
            sample,
            [Variant(name, schedule) for name, schedule in schedules.items()],
            num_steps=num_steps,
            num_samples=num_samples // NUM_CLASSES,
            scores={"class_accuracy": judge.accuracy, "frechet_distance": judge.distance},
            progress=progress,
        )
    report = _report(comparison, judge, num_samples)
    with stages(f"drawing, into {output}"):
        files = _pictures(output, calibration, groups, comparison)
        files += _documents(output, calibration, groups, report)
    return DemoResult(
        report, comparison, calibration, schedules, output, tuple(files), stages.seconds
    )


def sample_shapes(
    pipe: Any, labels: list[int], seed: int, num_steps: int, scheduler: Any = None
) -> Tensor:
    """One generation of the pipeline: images [labels, 3, 32, 32] in [0, 1]."""
    own = pipe.scheduler
    pipe.scheduler = own if scheduler is None else scheduler
    try:
        images: Tensor = pipe(
            labels,
            guidance_scale=GUIDANCE,
            num_inference_steps=num_steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pt",
        ).images
    finally:
        pipe.scheduler = own
    return images


def shapes_case(num_steps: int = NUM_STEPS, *, seed: int = 0) -> Case:
    """The demo's pipeline for a benchmark: a generation is ten images, one of each class.

    So is a training generation, of other seeds.
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
    """Scores balanced sets of images, which hold the classes in turn, by a classifier.

    Args:
        classifier: Was trained on real images.
    """

    def __init__(self, classifier: ShapeClassifier) -> None:
        self._classifier = classifier
        labels = torch.arange(NUM_REAL) % NUM_CLASSES
        self._real = self._features(generate(labels, seed=DATA_SEED)[0])

    def accuracy(self, images: Tensor) -> float:
        """Share of images [n, 3, 32, 32] in [0, 1] that are recognised."""
        return class_accuracy(self._logits(images), _labels(len(images)))

    def recognised(self, images: Tensor) -> Tensor:
        """1 for each image [n, 3, 32, 32] in [0, 1] that is recognised, else 0; [n]."""
        return (self._logits(images).argmax(dim=1) == _labels(len(images))).double()

    def perceptual_distance(self, images: Tensor, reference: Tensor) -> Tensor:
        """Relative L2 distance of the classifier's feature maps, mean over its stages; [n].

        Args:
            images: [n, 3, 32, 32] in [0, 1].
            reference: What they should be; the same shape.
        """
        pairs = zip(self._classifier.maps(2 * images - 1),
                    self._classifier.maps(2 * reference - 1), strict=True)  # fmt: skip
        distances = [relative_error(own, other, norm="l2") for own, other in pairs]
        return torch.stack(distances).mean(dim=0)

    def distance(self, images: Tensor) -> float:
        """Frechet distance of the classifier's features to those of real images."""
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
    """Images that neither training nor ``Judge`` saw, the classes in turn; in [0, 1]."""
    return generate(_labels(count), seed=DATA_SEED + 1)[0] / 2 + 0.5


def plan_demo(calibration: Calibration, *, last: bool = False) -> dict[int, dict[str, Schedule]]:
    """FORA's interval -> name of a row -> schedule; those of an interval cost about the same.

    Args:
        calibration: What was measured.
        last: Whether FORA also computes the last step, as in the published schedules.
    """
    groups = {}
    for interval in INTERVALS:
        even = plan_uniform(calibration, interval=interval, last=last)
        threshold = plan_at_cost(calibration, even.compute or 1.0)
        taylor = plan_uniform(calibration, interval=interval, predictor="taylor", last=last)
        groups[interval] = {
            f"α = {threshold.provenance['alpha']}": threshold,
            f"FORA n = {interval}": even,
            f"FORA n = {interval}, Taylor": taylor,
        }
    return groups


def _labels(count: int) -> Tensor:
    return torch.arange(count) % NUM_CLASSES


@dataclass
class _Stages:
    """Announces each stage and takes its time."""

    tell: Callable[[str], None] | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.tell is not None:
            self.tell(name)
        start = time.perf_counter()
        yield
        self.seconds[name.partition(",")[0]] = time.perf_counter() - start


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


def _pictures(
    folder: Path, calibration: Calibration, groups: Groups, comparison: Comparison
) -> list[Path]:
    files = [folder / "error-curves.png", folder / "composition.png"]
    thresholds = [_alpha(x) for group in groups.values() for x in group.values() if _alpha(x)]
    plots.plot_error_curves(calibration, files[0], alphas=sorted(set(thresholds)))
    plots.plot_composition(calibration, files[1])
    uncached = comparison.images[REFERENCE][:NUM_CLASSES]
    for interval, group in groups.items():
        for name, schedule in group.items():
            files.append(folder / f"{_stem(interval, schedule)}.png")
            plots.plot_schedule(schedule, files[-1], title=name)
        shown = dict.fromkeys([*group, *(comparison.rivals[name] for name in group)])
        rows = [(name, comparison.images[name][:NUM_CLASSES]) for name in shown]
        files.append(folder / f"images-n{interval}.png")
        plots.plot_image_grid(rows, uncached, files[-1])
    return files


def _documents(
    folder: Path, calibration: Calibration, groups: Groups, report: Report
) -> list[Path]:
    files = [folder / "table.md", folder / "table.json", folder / "calibration.safetensors"]
    files[0].write_text(report.to_markdown() + "\n", encoding="utf-8")
    files[1].write_text(report.to_json() + "\n", encoding="utf-8")
    calibration.save(files[2])
    for interval, group in groups.items():
        for schedule in group.values():
            files.append(folder / f"{_stem(interval, schedule)}.json")
            schedule.save(files[-1])
    return files


def _alpha(schedule: Schedule) -> float:
    """The threshold of a schedule; 0 if it has none."""
    return float(schedule.provenance.get("alpha", 0))


def _stem(interval: int, schedule: Schedule) -> str:
    """Name of a schedule's files, the same whatever threshold was found."""
    extrapolates = schedule.provenance["predictor"] != "hold"
    method = "smoothcache" if _alpha(schedule) else "taylor" if extrapolates else "fora"
    return f"schedule-n{interval}-{method}"
