"""Schedules side by side: generated, measured and timed, in one table."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..comparison.trial import Trial, Way
from ..diffusers_io.sampler import PipelineSampler, steps_to_ask_for
from ..errors import InvalidArgumentError
from ..generation.from_pipeline import sample_pipeline
from ..metrics.result import MetricResult
from ..model.target import Target
from ..processes import from_rank_zero, join_processes
from ..schedule.schedule import Schedule
from .evaluate import evaluate
from .registry import METRICS
from .table import EvaluationRow, EvaluationTable

UNCACHED = "uncached"


@dataclass(frozen=True)
class Candidate:
    """One row to be measured.

    Attributes:
        name: Of the row, and of its folder.
        schedule: What to run under; None for plain sampling.
        num_steps: Solver steps; None for those of the schedule, or else of the sampler.
    """

    name: str
    schedule: Schedule | None = None
    num_steps: int | None = None


@dataclass(frozen=True)
class Cost:
    """What one sample costs.

    Attributes:
        macs: Multiply-accumulates of the denoisers, of all steps.
        seconds: Wall clock; None if it was not taken.
    """

    macs: float
    seconds: float | None = None


def evaluate_schedules(
    sampler: PipelineSampler,
    candidates: Sequence[Candidate],
    folder: str | os.PathLike[str],
    num_samples: int,
    metrics: Sequence[str],
    reference: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 1,
    layout: str | None = None,
    names: Sequence[str] = (),
    timings: int = 3,
    title: str = "",
    progress: bool = True,
    **settings: Any,
) -> EvaluationTable:
    """Generates the samples of every candidate, measures them, and times a batch; over ranks.

    What was generated before is not generated again, so that a broken off evaluation goes on.

    Args:
        sampler: The pipeline with its inputs, guidance and seed.
        candidates: The rows. The first one is what ``compute`` is relative to.
        folder: Gets a folder of samples for each candidate.
        num_samples: Of each.
        metrics: Names in ``METRICS``.
        reference: As of ``evaluate``; metrics of pairs are always measured against the samples of
            the first candidate.
        batch_size: Samples that are generated together.
        layout: As of ``sample_pipeline``.
        names: Of the inputs, for the names of files.
        timings: How many batches are timed, after one that warms up; 0 for none.
        title: Of the table.
        progress: Whether rank 0 shows progress bars.
        settings: Passed on to ``evaluate``.

    Returns:
        The table, in all ranks.

    Raises:
        InvalidArgumentError: As ``sample_many`` and ``evaluate``; or if two candidates have one
            name.
        ScheduleMismatchError: If a schedule does not fit the pipeline.

    Example:
        >>> import tempfile
        >>> from smoothcache import Schedule
        >>> from smoothcache.demo.image import FOLDER
        >>> from smoothcache.diffusers_io import load_pipeline
        >>> pipe = load_pipeline(FOLDER)
        >>> pipe.set_progress_bar_config(disable=True)
        >>> candidates = [
        ...     Candidate("uncached"),
        ...     Candidate("every 2nd step", Schedule.uniform(pipe, num_steps=4, interval=2)),
        ... ]
        >>> sampler = PipelineSampler(pipe, class_labels=(0, 3), num_steps=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = evaluate_schedules(
        ...         sampler, candidates, folder, 2, ["psnr"], timings=0, progress=False
        ...     )
        >>> [f"{row.compute:.2f}" for row in table.rows]
        ['1.00', '0.51']
    """
    join_processes()
    names_of_rows = [x.name for x in candidates]
    places = {x.name: Path(folder) / folder_name(x.name) for x in candidates}
    if len(set(places.values())) < len(candidates) or not candidates:
        raise InvalidArgumentError(
            f"the rows {names_of_rows} do not all have names of their own, which folders can have."
        )
    pairs, others = split_pairs(metrics)
    rows: list[EvaluationRow] = []
    baseline: Cost | None = None
    for candidate in candidates:
        own = sampler_of(sampler, candidate)
        place = places[candidate.name]
        sample_pipeline(
            own,
            place,
            num_samples,
            schedule=candidate.schedule,
            batch_size=batch_size,
            layout=layout,
            names=names,
            progress=progress,
        )
        results: dict[str, MetricResult] = {}
        if others:
            results |= evaluate(place, reference, others, progress=progress, **settings)
        if pairs:
            against = places[candidates[0].name]
            results |= evaluate(place, against, pairs, progress=progress, **settings)
        cost = from_rank_zero(partial(cost_of, own, candidate, batch_size, timings))
        baseline = baseline or cost
        rows.append(
            EvaluationRow(
                candidate.name,
                own.steps,
                cost.macs / 1e12,
                cost.macs / baseline.macs,
                cost.seconds,
                {name: results[name] for name in (*metrics, *results) if name in results},
            )
        )
    return EvaluationTable(tuple(rows), title, (_note(num_samples, batch_size, timings),))


def sampler_of(sampler: PipelineSampler, candidate: Candidate) -> PipelineSampler:
    """The sampler with the steps of a candidate."""
    planned = None
    if candidate.schedule is not None:
        runs = candidate.schedule.num_steps
        planned = steps_to_ask_for(sampler.pipeline, runs, sampler.options)
    return replace(sampler, num_steps=candidate.num_steps or planned or sampler.num_steps)


def cost_of(
    sampler: PipelineSampler, candidate: Candidate, batch_size: int, timings: int = 0
) -> Cost:
    """What a sample of a candidate costs: counted in one batch, timed in others."""

    def batch(i: int) -> Any:
        return sampler.batch(range(i * batch_size, (i + 1) * batch_size))

    denoisers = list(Target.of(sampler.pipeline).denoisers.values())
    way = Way(batch, denoisers, sampler.steps, sampler.pipeline, candidate.schedule)
    trial = Trial(candidate.name, "", way)
    trial.count(0)
    for i in range(1, timings + 1):
        trial.time(i)
    seconds = statistics.median(trial.seconds.values()) / batch_size if timings else None
    return Cost(trial.macs[0] / batch_size, seconds)


def split_pairs(metrics: Sequence[str]) -> tuple[list[str], list[str]]:
    """Metrics that compare samples of the same numbers, and all others."""
    pairs = [x for x in metrics if x in METRICS and METRICS[x].is_of_samples]
    return pairs, [x for x in metrics if x not in pairs]


def folder_name(name: str) -> str:
    """The name of a row as that of a folder.

    >>> folder_name("every 2nd step (FORA)")
    'every-2nd-step-FORA'
    """
    words = "".join(x if x.isalnum() or x in "-_." else " " for x in name).split()
    return "-".join(words).strip(".") or "row"


def _note(num_samples: int, batch_size: int, timings: int) -> str:
    timed = f"; seconds: median of {timings} batches, for each sample" if timings else ""
    return (
        f"{num_samples} samples in batches of {batch_size}; TMACs: of the denoisers for one "
        f"sample, all steps, guidance included{timed}."
    )
