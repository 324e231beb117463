"""The benchmark: every method at several settings on one pipeline, with what it costs.

A method is one entry of a list; so is a rival of other packages. Whatever it claims, the
multiply-accumulates that it spends are counted while it runs, and every way of sampling starts
from the same seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_count, listed
from ..errors import InvalidArgumentError
from ..metrics.fidelity import SSIM_WINDOW, psnr, relative_error, ssim
from ..metrics.report import Report, ReportRow
from ..model.target import Target
from ..optional import optional_module
from ..schedule.schedule import Schedule
from ..searching.references import CONVERGED_FACTOR
from .result import HIGHEST_DECIBELS, REFERENCE, mean_with_interval
from .trial import Trial, Way

TIMED = 3  # generations that a method which must be counted in every one runs again, for its time
TOLERANCE = 1e-6  # of a budget
Measure = Callable[[Tensor, Tensor], Tensor | None]
Score = Callable[[Tensor], float]


def _ssim_where_it_fits(images: Tensor, reference: Tensor) -> Tensor | None:
    return ssim(images, reference) if min(images.shape[-2:]) >= SSIM_WINDOW else None


IMAGE_MEASURES: Mapping[str, Measure] = MappingProxyType(
    {"psnr": psnr, "ssim": _ssim_where_it_fits, "relative_error": relative_error}
)


"""Field of a row -> how far samples are from those of the uncached run, one value for each."""


@dataclass(frozen=True, eq=False)
class Case:
    """The setting of a benchmark: a pipeline, how to sample from it, and the metrics.

    Attributes:
        name: What the table is called.
        model: A diffusers pipeline or a module.
        sample: ``sample(model, i, num_inference_steps=None, scheduler=None)`` runs generation
            number i of this or another such pipeline from its own fixed seed, with the case's
            number of steps and the pipeline's own noise scheduler unless others are asked for.
            Gives images [batch, channels, height, width] in [0, 1].
        training: The same with other seeds, for whatever a method must measure beforehand.
        num_steps: Of the uncached run.
        measures: Field of a row -> a function of samples and the uncached ones that gives a value
            for each, or None where it cannot.
        scores: Field of a row -> a function of all samples of a row.
    """

    name: str
    model: Any
    sample: Callable[..., Tensor]
    training: Callable[..., Tensor]
    num_steps: int
    measures: Mapping[str, Measure] = field(default_factory=lambda: IMAGE_MEASURES)
    scores: Mapping[str, Score] = field(default_factory=dict)

    def plain(self, num_steps: int | None = None, scheduler: Any = None) -> Way:
        """Sampling without a cache, with another number of steps or another solver.

        Args:
            num_steps: Solver steps; None for those of the case.
            scheduler: A noise scheduler; None for the pipeline's own.

        Returns:
            A way of sampling that ``Method.make`` can give.
        """
        return self.under(None, num_steps, scheduler)

    def under(
        self,
        schedule: Schedule | None,
        num_steps: int | None = None,
        scheduler: Any = None,
        note: str = "",
    ) -> Way:
        """Sampling under a schedule.

        Args:
            schedule: What to run under; None for plain sampling.
            num_steps: Solver steps; None for those of the case.
            scheduler: A noise scheduler; None for the pipeline's own.
            note: A remark that is printed below the table.

        Returns:
            A way of sampling that ``Method.make`` can give.
        """
        options = {"num_inference_steps": num_steps, "scheduler": scheduler}
        given = {name: value for name, value in options.items() if value is not None}
        return Way(
            sample=lambda i: self.sample(self.model, i, **given),
            denoisers=tuple(Target.of(self.model).denoisers.values()),
            num_steps=self.num_steps if num_steps is None else num_steps,
            model=self.model,
            schedule=schedule,
            note=note,
        )


@dataclass(frozen=True, eq=False)
class Method:
    """One setting of a method, which becomes a row.

    Attributes:
        name: Of the row.
        family: The method; its settings are one line of the picture.
        make: Prepares it, by planning, searching or training, and gives the way to sample. What
            it raises is told in place of a row.
    """

    name: str
    family: str
    make: Callable[[], Way]


@dataclass(frozen=True)
class Aim:
    """A target for some families of methods at every budget, in one column.

    Attributes:
        column: The field of ``ReportRow``.
        own: Families that the target is for.
        apart: Families that they are not compared with.
        margin: By how much they are to be better, in the column's unit, at some budgets.
    """

    column: str
    own: tuple[str, ...]
    apart: tuple[str, ...] = ()
    margin: Mapping[float, float] = field(default_factory=dict)

    @property
    def sign(self) -> int:
        """1 if more is better, -1 if less is."""
        return -1 if self.column in ("frechet_distance", "perceptual_distance") else 1


@dataclass(frozen=True)
class Verdict:
    """The best row of some families at a budget against the best of all others.

    Attributes:
        aim: What was to be reached.
        budget: Fraction of the uncached MACs that both may spend.
        own: The best row of the families; None if none is so cheap.
        rival: The best of the others.
        gain: By how much ``own`` is better, negative if it is worse, in the column's unit.
        margin: Half the width of the 95 % confidence interval of ``gain`` over samples, which are
            taken in pairs; None where there is one value for all.
    """

    aim: Aim
    budget: float
    own: ReportRow | None
    rival: ReportRow | None
    gain: float = math.nan
    margin: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the aim is reached; None if there are not two rows to compare."""
        if self.own is None or self.rival is None:
            return None
        return self.gain >= self.aim.margin.get(self.budget, 0.0)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """The result of ``run_benchmark``.

    Attributes:
        name: Of the case.
        rows: The uncached run first, then one for each method that ran.
        failures: Name of a method -> why it has no row.
        notes: Name of a row -> what else is to be known of it.
        values: Name of a row -> field -> a value for each sample.
    """

    name: str
    rows: tuple[ReportRow, ...]
    failures: Mapping[str, str]
    notes: Mapping[str, str]
    values: Mapping[str, Mapping[str, Tensor]]

    def verdicts(self, budgets: Iterable[float], aims: Iterable[Aim]) -> list[Verdict]:
        """Each aim at each budget.

        Args:
            budgets: Fractions of the uncached MACs, in (0, 1].
            aims: What is to be reached.

        Returns:
            One verdict for each aim and budget, all budgets of an aim together.
        """
        return [self._verdict(budget, aim) for aim in aims for budget in budgets]

    def best(self, budget: float, aim: Aim, *, own: bool) -> ReportRow | None:
        """The best row within a budget: of an aim's own families, or of all that it faces.

        Args:
            budget: Fraction of the uncached MACs, in (0, 1].
            aim: Names the column and the families.
            own: Whether to look among the aim's own families or among all others.

        Returns:
            The row; None if no row is within the budget.
        """
        excluded = {*aim.own, *aim.apart}
        rows = [
            row
            for row in self.rows
            if (row.family in aim.own if own else row.family not in excluded)
            and row.compute is not None
            and row.compute <= budget + TOLERANCE
            and getattr(row, aim.column) is not None
        ]
        return max(rows, key=lambda row: aim.sign * getattr(row, aim.column), default=None)

    def report(self) -> Report:
        """The table, with the methods that did not run below it.

        Returns:
            A report that prints as text, Markdown or JSON.
        """
        failed = (f"{name} did not run: {reason}" for name, reason in self.failures.items())
        told = (f"{name}: {note}" for name, note in self.notes.items())
        return Report(self.rows, title=self.name, notes=(*told, *failed))

    def __str__(self) -> str:
        """The table, and the notes below it."""
        return str(self.report())

    def _repr_html_(self) -> str:
        """What a notebook shows: the table and its notes."""
        return self.report()._repr_html_()

    def _verdict(self, budget: float, aim: Aim) -> Verdict:
        own, rival = (self.best(budget, aim, own=side) for side in (True, False))
        if own is None or rival is None:
            return Verdict(aim, budget, own, rival)
        values = [self.values[row.name].get(aim.column) for row in (own, rival)]
        if values[0] is None or values[1] is None:
            gain = aim.sign * (getattr(own, aim.column) - getattr(rival, aim.column))
            return Verdict(aim, budget, own, rival, gain)
        gain, low, high = mean_with_interval(aim.sign * (values[0] - values[1]))
        margin = None if math.isnan(low) else (high - low) / 2
        return Verdict(aim, budget, own, rival, gain, margin)


def run_benchmark(
    case: Case,
    methods: Sequence[Method],
    *,
    num_generations: int = 1,
    converged: bool = True,
    progress: bool = True,
) -> Benchmark:
    """Runs every method on the same generations as the uncached pipeline.

    All methods take turns, generation by generation, so that other load on the machine affects
    wall-clock ratios little. Multiply-accumulates are counted in the first generation, and in every
    generation for dynamic methods. Times are of generations without counting.

    Args:
        case: The pipeline and its judges.
        methods: What to compare with the uncached run.
        num_generations: How many generations to run each way.
        converged: Whether to sample with ten times the steps as well, to compare with.
        progress: Whether to show progress bars.

    Returns:
        A row for each method that ran, and why the others did not.

    Raises:
        InvalidArgumentError: If two methods have one name, or the uncached run fails.
        MissingPackageError: If the case measures the SSIM, and torchmetrics is not installed.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(
        ...     num_attention_heads=2, attention_head_dim=8, num_layers=1, in_channels=4,
        ...     sample_size=8,
        ... ).eval()
        >>> @torch.no_grad()
        ... def sample(model, i, num_inference_steps=4):
        ...     x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        ...     for t in range(num_inference_steps, 0, -1):
        ...         x = x - 0.1 * model(x, torch.tensor([t]), torch.tensor([i])).sample[:, :4]
        ...     return x[:, :3].sigmoid()
        >>> case = Case("a small DiT", model, sample, sample, num_steps=4)
        >>> methods = [Method("2 steps", "fewer steps", lambda: case.plain(2))]
        >>> benchmark = run_benchmark(case, methods, converged=False, progress=False)
        >>> [(row.name, row.compute) for row in benchmark.rows]
        [('uncached', 1.0), ('2 steps', 0.5)]
    """
    check_count("num_generations", num_generations, least=1)
    names = [REFERENCE, *(method.name for method in methods)]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidArgumentError(f"the names {listed(twice)} come twice.")
    if "ssim" in case.measures:
        optional_module("torchmetrics.functional.image", extra="metrics")

    failures: dict[str, str] = {}
    reference = Trial(REFERENCE, REFERENCE, case.plain())
    trials = [reference]
    with tqdm(methods, "preparing", unit="method", disable=not progress) as bar:
        for method in bar:
            bar.set_postfix_str(method.name)
            way = _tried(method.make, method.name, failures)
            if way is not None:
                trials.append(Trial(method.name, method.family, way))
    _run_all(trials, num_generations, failures, progress)
    target = _converged(case, num_generations, progress) if converged else None
    judged = {}
    for trial in [trial for trial in trials if trial.name not in failures]:
        row = _tried(partial(_row, trial, reference, case, target), trial.name, failures)
        if row is not None:
            judged[trial.name] = row
    return Benchmark(
        case.name,
        rows=tuple(row for row, _ in judged.values()),
        failures=failures,
        notes={x.name: note for x in trials if x.name in judged and (note := _note(x))},
        values={name: values for name, (_, values) in judged.items()},
    )


def _tried(action: Callable[[], Any], name: str, failures: dict[str, str]) -> Any:
    """What an action gives; None if it fails, and then why is written down."""
    try:
        return action()
    except Exception as error:  # whatever a rival raises is its result
        failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None


def _run_all(
    trials: Sequence[Trial], num_generations: int, failures: dict[str, str], progress: bool
) -> None:
    turns = [(i, trial) for i in range(num_generations) for trial in trials]
    with tqdm(turns, "comparing", unit="run", disable=not progress) as bar:
        for i, trial in bar:
            if trial.name == REFERENCE:
                _run(trial, i, num_generations)
            elif trial.name not in failures:
                _tried(partial(_run, trial, i, num_generations), trial.name, failures)


def _run(trial: Trial, i: int, num_generations: int) -> None:
    """Counts where it must, and takes the time of other generations."""
    way = trial.way
    is_counted = i == 0 or way.varies
    if is_counted:
        trial.count(i, weigh=i == 0)
        if trial.recomputed:
            reasons = "; ".join(trial.recomputed)
            raise InvalidArgumentError(f"'{trial.name}' had to compute after all: {reasons}.")
    leaks_if_it_differs = way.is_foreign and i == 0
    is_repeated = num_generations == 1 or leaks_if_it_differs or (way.varies and i <= TIMED)
    if not is_counted or is_repeated:
        trial.time(i)


def _converged(case: Case, num_generations: int, progress: bool) -> Tensor:
    way = case.plain(CONVERGED_FACTOR * case.num_steps)
    turns = range(num_generations)
    with tqdm(turns, "converged samples", unit="run", disable=not progress) as bar:
        return torch.cat([way.sample(i).detach().cpu() for i in bar])


def _note(trial: Trial) -> str:
    leaks = "run twice, a generation gave two results" * trial.differs
    return "; ".join(filter(None, (trial.way.note, leaks)))


def _row(
    trial: Trial, reference: Trial, case: Case, converged: Tensor | None
) -> tuple[ReportRow, dict[str, Tensor]]:
    """What a way of sampling cost and how good it is, and the values of each sample."""
    samples, uncached = torch.cat(trial.samples), torch.cat(reference.samples)
    values = {name: measure(samples, uncached) for name, measure in case.measures.items()}
    if converged is not None and "psnr" in case.measures:
        values["converged_psnr"] = case.measures["psnr"](samples, converged)
    known = {name: value.double() for name, value in values.items() if value is not None}
    ratios = trial.time_ratios(reference)
    known_margins = {name: _half_width(value) for name, value in known.items()}
    known_margins["time"] = _half_width(torch.tensor(ratios, dtype=torch.float64))
    beyond = 0 if trial.way.schedule else reference.kept  # what sampling itself keeps
    judged: dict[str, Any] = {name: float(value.mean()) for name, value in known.items()}
    judged |= {name: float(score(samples)) for name, score in case.scores.items()}
    row = ReportRow(
        trial.name,
        family=trial.family,
        steps=trial.way.num_steps,
        compute=trial.compute(reference),
        time=statistics.median(ratios),
        peak_bytes=max(0, trial.kept - beyond),
        margins={name: x for name, x in known_margins.items() if math.isfinite(x) and x > 0},
        **judged,
    )
    return row, {name: value.clamp(max=HIGHEST_DECIBELS) for name, value in known.items()}


def _half_width(values: Tensor) -> float:
    """Of the 95 % confidence interval of the mean; NaN if it is not known."""
    _, low, high = mean_with_interval(values)
    return (high - low) / 2
