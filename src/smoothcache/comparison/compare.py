"""The fair comparison: cached runs beside the uncached one and beside plain fewer steps.

Every way of sampling starts from the same seeds. Each schedule is set beside the same sampler
with as many fewer steps as cost the same: a cache that does not beat that is of no use.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_count, listed
from ..errors import InvalidArgumentError
from ..metrics.modality import modality_of
from ..metrics.report import COLUMNS, ReportRow
from ..model.target import Target
from ..runtime.run import bound_schedule
from ..schedule.sampling import SamplingConfig
from ..schedule.schedule import Schedule
from .result import REFERENCE, Comparison
from .trial import Trial, Way

Sample = Callable[[int, int], Tensor]
Score = Callable[[Tensor], float]
ACCURACY = "_accuracy"
SCORES = ("class_accuracy", "label_divergence", "frechet_distance")


@dataclass(frozen=True)
class Variant(SamplingConfig):
    """One way of sampling, to be compared with the uncached one.

    >>> Variant("25 steps", num_steps=25).num_steps
    25

    Attributes:
        name: What its row is called.
        schedule: What to run under; None for plain sampling.
        num_steps: Solver steps of plain sampling; None with a schedule, which has its own.

    Raises:
        InvalidArgumentError: If it has no name, or not exactly one of the other two.
    """

    schedule: Schedule | None = None  # again here, so that it can be given by position
    num_steps: int | None = None
    solver: None = field(default=None, init=False, repr=False)  # compare() keeps the sampler's own

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or self.name == REFERENCE:
            raise InvalidArgumentError(
                f"a variant needs a name, and {REFERENCE!r} is taken; got {self.name!r}."
            )
        if not isinstance(self.schedule, Schedule | None):
            raise InvalidArgumentError(
                f"the variant {self.name!r} needs a Schedule, got {type(self.schedule).__name__}."
            )
        if (self.schedule is None) == (self.num_steps is None):
            raise InvalidArgumentError(
                f"the variant {self.name!r} needs either a schedule or a number of steps."
            )
        if self.num_steps is not None:
            check_count("num_steps", self.num_steps, least=1)


def fewer_steps(what: Schedule | float, num_steps: int) -> int:
    """The number of plain steps that cost the same as a schedule.

    Args:
        what: A schedule with a known cost, or a fraction of the uncached run's MACs.
        num_steps: Steps of the uncached run.

    Returns:
        The nearest whole number, at least 1.

    Raises:
        InvalidArgumentError: If the cost is not known, or not a positive number.

    Example:
        >>> fewer_steps(0.345, 50)
        17
    """
    check_count("num_steps", num_steps, least=1)
    compute = what.compute if isinstance(what, Schedule) else what
    if compute is None:
        raise InvalidArgumentError(
            "the schedule does not know its cost; plan it from a calibration, or use compare, "
            "which measures it."
        )
    if not math.isfinite(compute) or compute <= 0:
        raise InvalidArgumentError(f"compute must be a positive fraction, got {compute}.")
    return max(1, math.floor(compute * num_steps + 0.5))


def compare(
    model: Any,
    sample: Sample,
    variants: Sequence[Variant],
    *,
    num_steps: int,
    num_samples: int = 1,
    scores: Mapping[str, Score] | None = None,
    progress: bool = True,
) -> Comparison:
    """Samples without a cache, with each variant, and with fewer steps of the same cost.

    Generation 0 of each way runs first, and its MACs are counted. Then all ways take turns,
    generation by generation, so that other load on the machine affects wall-clock ratios little.
    Each ratio is the median over generations of the time relative to the uncached generation of the
    same number. Counting takes time, so generation 0 is timed only if it is the only one, in a
    second run.

    Args:
        model: A diffusers pipeline (all of its denoisers) or any module.
        sample: ``sample(i, num_steps)`` runs generation number i from start to end with its own
            fixed seed and that many steps, and returns a batch of one or more images in [0, 1],
            [batch, channels, height, width], of clips, [batch, frames, channels, height, width], or
            of sounds, [batch, channels, samples].
        variants: What to compare. Each schedule brings a row of fewer steps with it; schedules
            of the same cost share one.
        num_steps: What ``sample`` is asked for in the uncached run.
        num_samples: How many generations to run each way.
        scores: Further judgements of all samples of a row, which are columns of the report:
            ``class_accuracy``, ``label_divergence``, ``frechet_distance``, and for any attribute
            such as a colour ``colour_accuracy``.
        progress: Whether to show a progress bar.

    Returns:
        A row for each way of sampling, and the samples.

    Raises:
        InvalidArgumentError: If an argument has no sensible value, or ``sample`` does not do as
            described.
        ScheduleMismatchError: If a schedule does not fit the model or the number of steps.
        CalibrationError: If ``sample`` does not run the model once from start to end.
        MissingPackageError: If torchmetrics is not installed, which sounds do not need.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(
        ...     num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=2,
        ...     sample_size=16,
        ... ).eval()
        >>> def sample(i, num_steps):
        ...     x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(i))
        ...     for step in range(num_steps):
        ...         t = torch.tensor([999 - 900 * step // num_steps] * 2)
        ...         x = x - model(x, t, torch.tensor([1, 2])).sample / num_steps
        ...     return x.sigmoid()
        >>> half = Variant("every 2nd step", Schedule.uniform(model, num_steps=8, interval=2))
        >>> with torch.no_grad():
        ...     comparison = compare(model, sample, [half], num_steps=8, progress=False)
        >>> [(row.name, row.steps) for row in comparison.rows]
        [('uncached', 8), ('every 2nd step', 8), ('4 steps', 4)]
    """
    check_count("num_steps", num_steps, least=1)
    check_count("num_samples", num_samples, least=1)
    scores = dict(scores or {})
    _check_scores(scores)
    _check_variants(variants)

    model = target = Target.of(model)
    schedules = {x.name: bound_schedule(model, x.schedule) for x in variants if x.schedule}
    denoisers = tuple(target.denoisers.values())

    def way(asked: int, schedule: Schedule | None = None) -> Way:
        return Way(lambda i: sample(i, asked), denoisers, asked, model, schedule, asks=True)

    reference = Trial(REFERENCE, "", way(num_steps))
    _count(reference, reference)
    modality_of(reference.samples[0], "sample").check_packages()
    own: dict[str, Trial] = {}
    with tqdm(variants, "counting", unit="run", disable=not progress) as bar:
        for variant in bar:
            schedule = schedules.get(variant.name)
            asked = variant.num_steps or num_steps
            if schedule is not None and schedule.num_steps != reference.steps:
                asked = schedule.num_steps
            own[variant.name] = Trial(variant.name, "", way(asked, schedule), reference)
            _count(own[variant.name], reference)
    rivals = _rivals(own, reference, way)
    trials = _in_order(reference, own, rivals)
    turns = [(i, trial) for i in range(min(1, num_samples - 1), num_samples) for trial in trials]
    with tqdm(turns, "comparing", unit="run", disable=not progress) as bar:
        for i, one in bar:
            one.time(i)
    return Comparison(
        rows=tuple(_row(one, reference, scores) for one in trials),
        images={one.name: torch.cat(one.samples) for one in trials},
        rivals={name: rival.name for name, rival in rivals.items()},
        recomputed={one.name: one.recomputed for one in trials if one.recomputed},
    )


def _count(trial: Trial, reference: Trial) -> None:
    """Counts generation 0.

    Raises:
        InvalidArgumentError: If ``sample`` did not run the model, or not as asked, or returned
            something else than images, clips or sounds like those of the reference.
    """
    trial.count(0)
    call, asked = trial.way.call(0), reference.way.num_steps
    if not trial.steps:
        raise InvalidArgumentError(
            f"{call} did not run the model from start to end under {trial.name!r}; it must run "
            "the pipeline or module that was passed to compare."
        )
    if trial.steps == reference.steps and trial.way.num_steps != asked:
        raise InvalidArgumentError(
            f"{call} ran {trial.steps} steps, as it did when asked for {asked}; "
            "it must run as many steps as it is asked for."
        )


def _rivals(
    own: Mapping[str, Trial], reference: Trial, way: Callable[[int], Way]
) -> dict[str, Trial]:
    """For each schedule, plain sampling with as many fewer steps as cost the same, counted."""
    plain = {x.way.num_steps: x for x in [reference, *own.values()] if x.way.schedule is None}
    rivals = {}
    for name, one in own.items():
        if one.way.schedule is None:
            continue
        asked = fewer_steps(one.compute(reference), reference.way.num_steps)
        if asked not in plain:
            plain[asked] = Trial(_free_name(asked, own), "", way(asked), reference)
            _count(plain[asked], reference)
        rivals[name] = plain[asked]
    return rivals


def _in_order(
    reference: Trial, own: Mapping[str, Trial], rivals: Mapping[str, Trial]
) -> list[Trial]:
    """All ways of sampling in the order of their rows, a rival after its last schedule."""
    last_with = {rival.name: name for name, rival in rivals.items()}
    trials = [reference]
    for name, trial in own.items():
        trials.append(trial)
        rival = rivals.get(name, reference)
        if rival is not reference and rival.name not in own and last_with[rival.name] == name:
            trials.append(rival)
    return trials


def _row(trial: Trial, reference: Trial, scores: Mapping[str, Score]) -> ReportRow:
    """What a way of sampling cost and how good its samples are."""
    samples, uncached = torch.cat(trial.samples), torch.cat(reference.samples)
    judged: dict[str, Any] = dict(modality_of(samples, "sample").measured(samples, uncached))
    accuracies: dict[str, float] = {}
    for name, score in scores.items():
        place, key = (
            (judged, name) if name in COLUMNS else (accuracies, name.removesuffix(ACCURACY))
        )
        place[key] = float(score(samples))
    return ReportRow(
        trial.name,
        steps=trial.steps,
        compute=trial.compute(reference),
        time=statistics.median(trial.time_ratios(reference)),
        seconds=statistics.mean(trial.seconds.values()) * len(trial.samples),
        peak_bytes=trial.kept,
        accuracies=accuracies,
        **judged,
    )


def _free_name(steps: int, taken: Mapping[str, Trial]) -> str:
    name = "1 step" if steps == 1 else f"{steps} steps"
    return f"{name}, {REFERENCE}" if name in taken else name


def _check_variants(variants: Sequence[Variant]) -> None:
    if not variants:
        raise InvalidArgumentError("give at least one variant to compare with the uncached run.")
    for variant in variants:
        if not isinstance(variant, Variant):
            raise InvalidArgumentError(f"variants must be Variant, got {type(variant).__name__}.")
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidArgumentError(f"the names {listed(twice)} come twice.")


def _check_scores(scores: Mapping[str, Score]) -> None:
    for name, score in scores.items():
        if name not in SCORES and not name.endswith("_accuracy"):
            raise InvalidArgumentError(
                f"the score {name!r} has no column; there are {listed(SCORES)}, and accuracies of "
                "attributes, such as 'colour_accuracy'."
            )
        if not callable(score):
            raise InvalidArgumentError(
                f"the score {name!r} must be a function of samples, got {type(score).__name__}."
            )
