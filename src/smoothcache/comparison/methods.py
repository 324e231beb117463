"""The methods that a benchmark compares without training anything, each at several settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..calibration.calibrate import calibrate
from ..calibration.curves import Calibration
from ..checks import check_number
from ..diffusers_io.sampler import PipelineSampler
from ..diffusers_io.solvers import suitable_solvers
from ..errors import InvalidArgumentError
from ..planners.threshold import plan
from ..planners.uniform import plan_uniform
from ..schedule.schedule import Schedule
from ..searching.objectives import Objective
from ..searching.result import SearchedSchedule
from ..searching.search import search
from .benchmark import Case, Method
from .trial import Way

BUDGETS = (0.52, 0.36, 0.28, 0.22, 0.18)
INTERVALS = (2, 3, 4, 5, 6)
THRESHOLD_COSTS = (0.8, 0.5, 0.35, 0.28, 0.22, 0.18)
UNIFORM = {"hold": "FORA", "taylor": "uniform, Taylor 1", "taylor2": "uniform, Taylor 2"}


"""Predictor -> the family of computing every n-th step with it."""


CALIBRATION_SAMPLES, MAX_GAP = 10, 6
FEWER, SOLVERS, SMOOTHCACHE = "fewer steps", "better solver", "SmoothCache"
SEARCH, JOINT = "search", "joint search"
TRAINING_SEEDS = 1_000_000  # what is added to the seeds of the compared samples


def pipeline_case(sampler: PipelineSampler) -> Case:
    """What a sampler of a diffusers pipeline runs, as a case."""

    def sample(pipeline: Any, i: int, **options: Any) -> Any:
        return replace(sampler, pipeline=pipeline).sample(i, **options)

    def training(pipeline: Any, i: int, **options: Any) -> Any:
        apart = replace(sampler, pipeline=pipeline, seed=sampler.seed + TRAINING_SEEDS)
        return apart.sample(i, **options)

    name = f"{type(sampler.pipeline).__name__}, {sampler.steps} steps"
    return Case(name, sampler.pipeline, sample, training, sampler.steps)


def calibrated(
    case: Case, num_samples: int = CALIBRATION_SAMPLES, *, progress: bool = True
) -> Calibration:
    """The error curves of a case, measured on its training seeds."""
    return calibrate(
        case.model,
        lambda i: case.training(case.model, i),
        num_samples,
        max_gap=min(MAX_GAP, case.num_steps - 1),
        trajectory=False,
        progress=progress,
    )


def checked_budgets(budgets: Iterable[float]) -> tuple[float, ...]:
    """Different fractions in (0, 1], in the order in which they come.

    Raises:
        InvalidArgumentError: If one is none.
    """
    for budget in (budgets := tuple(budgets)):
        if not 0 < check_number("a budget", budget) <= 1:
            raise InvalidArgumentError(f"a budget must be in (0, 1], got {budget:g}.")
    return tuple(dict.fromkeys(budgets))


def training_free(
    case: Case,
    calibration: Calibration,
    *,
    budgets: Sequence[float] = BUDGETS,
    intervals: Sequence[int] = INTERVALS,
    costs: Sequence[float] = THRESHOLD_COSTS,
) -> list[Method]:
    """Fewer steps, better solvers, uniform schedules and thresholds.

    Args:
        case: What they are for.
        calibration: Of the case.
        budgets: Fractions of the uncached MACs at which fewer steps and solvers are run.
        intervals: Every how many steps uniform schedules compute.
        costs: Fractions that the thresholds are chosen for.
    """
    return [
        *fewer_steps(case, (0.8, *budgets)),
        *better_solvers(case, budgets),
        *uniform(case, calibration, intervals),
        *thresholds(case, calibration, costs),
    ]


def fewer_steps(case: Case, budgets: Iterable[float]) -> list[Method]:
    """The pipeline's own solver with as many steps as a budget buys."""
    return [
        Method(f"{count} steps", FEWER, partial(case.plain, count))
        for count in _counts(case, budgets)
    ]


def better_solvers(case: Case, budgets: Iterable[float]) -> list[Method]:
    """The multistep solvers of diffusers that suit the pipeline's model."""
    return [
        Method(f"{count} steps, {name}", f"{SOLVERS}: {name}", partial(case.plain, count, solver))
        for name, solver in suitable_solvers(case.model).items()
        for count in _counts(case, budgets)
    ]


def uniform(
    case: Case, calibration: Calibration, intervals: Iterable[int] = INTERVALS
) -> list[Method]:
    """Every n-th step, with every predictor."""
    return [
        Method(
            f"{family}, n = {interval}",
            family,
            _under(case, partial(plan_uniform, calibration, interval=interval, predictor=name)),
        )
        for name, family in UNIFORM.items()
        for interval in intervals
        if interval < case.num_steps
    ]


def thresholds(case: Case, calibration: Calibration, costs: Iterable[float]) -> list[Method]:
    """The paper's schedules, under the thresholds whose costs come nearest to the wanted ones."""
    plans = threshold_plans(calibration)
    nearest = {alpha: x for cost in costs for alpha, x in [_nearest(plans, cost)]}
    return [
        Method(f"SmoothCache, α = {alpha:g}", SMOOTHCACHE, partial(case.under, schedule))
        for alpha, schedule in nearest.items()
    ]


def searched(
    case: Case,
    budgets: Iterable[float] = BUDGETS,
    *,
    joint: bool = False,
    max_cost: float | None = None,
    num_samples: int | None = None,
    objective: str | Objective = "latent_l2",
    progress: bool = False,
) -> list[Method]:
    """The best schedule that a search finds for each budget; with its solver, if ``joint``.

    The last four options are those of ``search``.
    """
    family = JOINT if joint else SEARCH

    def make(budget: float) -> Way:
        found = search(
            case.model,
            _training_sample(case),
            compute=budget,
            joint=joint,
            max_cost=max_cost,
            num_samples=num_samples,
            objective=objective,
            progress=progress,
        )
        return _searched(case, found, joint)

    return [Method(f"{family}, ≤ {budget:g}", family, partial(make, budget)) for budget in budgets]


def threshold_plans(calibration: Calibration) -> Mapping[float, Schedule]:
    """Threshold -> the paper's schedule, for every threshold that makes a difference."""
    curves = [
        calibration.curve(gap=gap, kind=kind).mean
        for kind in calibration.kinds
        for gap in range(1, calibration.max_gap + 1)
    ]
    errors = np.concatenate(curves)
    alphas = np.unique(np.ceil(1000 * errors[np.isfinite(errors)] + 1e-9) / 1000)
    return {float(alpha): plan(calibration, alpha=float(alpha)) for alpha in alphas}


def plan_at_cost(calibration: Calibration, compute: float) -> Schedule:
    """The paper's schedule under the threshold whose cost comes nearest.

    Args:
        calibration: What was measured.
        compute: Wanted fraction of the uncached MACs.
    """
    return _nearest(threshold_plans(calibration), compute)[1]


def _nearest(plans: Mapping[float, Schedule], compute: float) -> tuple[float, Schedule]:
    if not plans:
        raise InvalidArgumentError("the calibration has no error to set a threshold for.")
    return min(plans.items(), key=lambda item: abs((item[1].compute or 1.0) - compute))


def _counts(case: Case, budgets: Iterable[float]) -> list[int]:
    """Numbers of steps that the budgets buy, two or more, the most first."""
    counts = {int(budget * case.num_steps + 1e-9) for budget in budgets}
    return sorted({count for count in counts if 2 <= count < case.num_steps}, reverse=True)


def _under(case: Case, planned: Callable[[], Schedule]) -> Callable[[], Way]:
    return lambda: case.under(planned())


def _training_sample(case: Case) -> Callable[..., Any]:
    """The case's training generations, as a search asks for them."""

    def sample(i: int, num_inference_steps: int | None = None, scheduler: Any = None) -> Any:
        return case.training(
            case.model, i, num_inference_steps=num_inference_steps, scheduler=scheduler
        )

    return sample


def _searched(case: Case, found: SearchedSchedule, joint: bool) -> Way:
    result = found.result
    if result is None:
        raise InvalidArgumentError("the search returned no result.")
    note = f"{result.best.name}; found at the cost of {result.cost:.1f} uncached generations"
    if not joint:
        return case.under(found, note=note)
    schedule = None if result.best.schedule is None else found  # None: plain sampling is best
    return case.under(schedule, result.num_steps, result.scheduler, note)
