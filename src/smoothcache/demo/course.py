"""Shared code of the demos: calibrate, plan, sample, compare and draw."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import plots
from ..calibration.calibrate import calibrate
from ..calibration.curves import Calibration
from ..checks import check_count
from ..comparison.compare import Variant, compare
from ..comparison.methods import plan_at_cost
from ..comparison.result import Comparison
from ..errors import InvalidArgumentError
from ..metrics.report import Report
from ..optional import optional_module
from ..planners.uniform import plan_uniform
from ..report.environment import environment
from ..report.page import write_page
from ..report.pages import comparison_page
from ..schedule.schedule import Schedule

MAX_GAP = 3
INTERVALS = (2, 3)
CALIBRATION_SEEDS, DATA_SEED = 1_000_000, 20_000  # disjoint from the compared samples

PAGE = "report.html"
"""Name of the report in the folder of the demo."""

Groups = Mapping[int, Mapping[str, Schedule]]


@dataclass(frozen=True, eq=False)
class DemoResult:
    """Results of a demo.

    Attributes:
        report: The table, with notes on the measurement and the verdict.
        comparison: Rows and samples of the comparison.
        calibration: The error curves.
        schedules: Schedules by name of the row.
        folder: Output folder.
        files: Written files, pictures first.
        seconds: Wall-clock time of each stage.
    """

    report: Report
    comparison: Comparison
    calibration: Calibration
    schedules: Mapping[str, Schedule]
    folder: Path
    files: tuple[Path, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Material:
    """The parts of a demo that depend on the modality.

    Attributes:
        pipeline: The pipeline.
        noun: Plural noun of its samples.
        sample: Function from generation number and number of steps to a batch of samples.
        count: Number of samples to compare.
        batches: Number of generations for these samples.
        calibration_sample: Function from generation number to one sample with all steps.
        calibration_count: Size of the calibration set.
        num_steps: Number of solver steps of the uncached run.
        scores: Additional columns of the table.
        describe: Adds title and notes to a comparison.
        show: Writes samples and pictures of all rows into a folder.
        last: Whether FORA also computes the last step, as in the published schedules.
        inputs: What the samples of a row are made from, used in turn; they name them in the report.
        sampling_rate: Of sounds, samples a second.
        command: What runs this demo again.
    """

    pipeline: Any
    noun: str
    sample: Callable[[int, int], Tensor]
    count: int
    batches: int
    calibration_sample: Callable[[int], Tensor]
    calibration_count: int
    num_steps: int
    scores: Mapping[str, Callable[[Tensor], float]]
    describe: Callable[[Comparison], Report]
    show: Callable[[Path, Groups, Comparison], list[Path]]
    last: bool = False
    inputs: Sequence[str] = ()
    sampling_rate: int | None = None
    command: str = "smoothcache demo"


def checked_output(
    output_dir: str | os.PathLike[str],
    *,
    num_samples: int,
    batch: int,
    num_steps: int,
    seed: int,
    packages: Sequence[str] = (),
    extra: str = "demo",
) -> Path:
    """Validates the arguments of a demo and creates its output folder.

    Args:
        output_dir: The folder.
        num_samples: Number of samples per row.
        batch: Number of samples per generation.
        num_steps: Number of solver steps of the uncached run.
        seed: Seed of the first sample.
        packages: Additional packages that the demo requires.
        extra: Extra that installs them.

    Raises:
        InvalidArgumentError: If an argument is invalid.
        MissingPackageError: If a package is not installed.
    """
    check_count("num_samples", num_samples, least=1)
    check_count("num_steps", num_steps, least=2)
    check_count("seed", seed, least=0)
    if num_samples % batch:
        raise InvalidArgumentError(
            f"num_samples must be a multiple of the batch size {batch}, got {num_samples}."
        )
    for package in packages:
        optional_module(package, extra=extra)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    return output


@dataclass
class Stages:
    """Announces each stage and measures its time."""

    tell: Callable[[str], None] | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.tell is not None:
            self.tell(name)
        start = time.perf_counter()
        yield
        self.seconds[name.partition(",")[0]] = time.perf_counter() - start


def run_course(material: Material, output: Path, stages: Stages, *, progress: bool) -> DemoResult:
    """Calibrates, plans, compares and draws; returns the results.

    Args:
        material: The parts that depend on the modality.
        output: Existing output folder.
        stages: Announces each stage.
        progress: Whether to show progress bars.
    """
    count, steps = material.calibration_count, material.num_steps
    with stages(f"calibrating on {count} samples of {steps} steps"):
        calibration = calibrate(
            material.pipeline,
            material.calibration_sample,
            count,
            min(MAX_GAP, steps - 1),
            progress=progress,
        )
    with stages("planning"):
        groups = plan_beside_fora(calibration, last=material.last)
        schedules = {name: x for group in groups.values() for name, x in group.items()}
    with stages(f"sampling {material.count} {material.noun} in each way"):
        comparison = compare(
            material.pipeline,
            material.sample,
            [Variant(name, schedule) for name, schedule in schedules.items()],
            num_steps=steps,
            num_samples=material.batches,
            scores=material.scores,
            progress=progress,
        )
    report = material.describe(comparison)
    with stages(f"writing, into {output}"):
        files = _pictures(output, calibration, groups)
        files += material.show(output, groups, comparison)
        files += _documents(output, calibration, groups, report)
        page = comparison_page(
            comparison,
            title=f"Demo: {material.noun} with and without a cache",
            report=report,
            schedules=schedules,
            calibration=calibration,
            sampling_rate=material.sampling_rate,
            inputs=material.inputs,
            environment=environment(material.pipeline),
            command=material.command,
        )
        write_page(page, output / PAGE)
        files.append(output / PAGE)
    return DemoResult(
        report, comparison, calibration, schedules, output, tuple(files), stages.seconds
    )


def plan_beside_fora(
    calibration: Calibration, *, last: bool = False
) -> dict[int, dict[str, Schedule]]:
    """Plans schedules of similar cost for each of FORA's intervals; returns them by row name.

    Args:
        calibration: The calibration.
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


def rows_to_show(comparison: Comparison, group: Mapping[str, Schedule]) -> list[str]:
    """Returns the names of a group's schedules and of the rows with fewer steps beside them."""
    return list(dict.fromkeys([*group, *(comparison.rivals[name] for name in group)]))


def _pictures(folder: Path, calibration: Calibration, groups: Groups) -> list[Path]:
    files = [folder / "error-curves.png", folder / "composition.png"]
    thresholds = [_alpha(x) for group in groups.values() for x in group.values() if _alpha(x)]
    plots.plot_error_curves(calibration, files[0], alphas=sorted(set(thresholds)))
    plots.plot_composition(calibration, files[1])
    for interval, group in groups.items():
        for name, schedule in group.items():
            files.append(folder / f"{stem(interval, schedule)}.png")
            plots.plot_schedule(schedule, files[-1], title=name)
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
            files.append(folder / f"{stem(interval, schedule)}.json")
            schedule.save(files[-1])
    return files


def _alpha(schedule: Schedule) -> float:
    """Returns the threshold of a schedule; 0 if it has none."""
    return float(schedule.provenance.get("alpha", 0))


def stem(interval: int, schedule: Schedule) -> str:
    """Returns the file stem of a schedule, independent of its threshold."""
    extrapolates = schedule.provenance["predictor"] != "hold"
    method = "smoothcache" if _alpha(schedule) else "taylor" if extrapolates else "fora"
    return f"schedule-n{interval}-{method}"
