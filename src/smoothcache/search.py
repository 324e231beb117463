"""Finds the best schedule for a budget by trying: every family, measured in real runs."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ._checks import check_count, check_number
from ._proposals import (
    Mask,
    affordable,
    every,
    every_from_last,
    least_error,
    neighbours,
    spaced,
)
from ._rollouts import OBJECTIVES, Candidate, Objective, Rollouts, agreed, join_processes
from .calibrate import calibrate
from .calibration import Calibration
from .denoisers import find_denoisers, noise_scheduler, solver_stages
from .errors import CalibrationError, InvalidArgumentError, ScheduleMismatchError
from .layers import CacheLayer, find_layers, identify
from .planners import plan
from .planners._assemble import assemble
from .predictors import PREDICTORS
from .schedule import Row, Schedule, compute_fraction

UNCACHED, CONVERGED = "uncached", "converged"
CONVERGED_FACTOR = 10  # times as many steps as the uncached run
BATCH = 4  # candidates that are tried before the next choice, whatever the number of processes
PROBES = 5  # steps at which the effect of an error is measured
POWERS = (0.8, 1.25, 1.6)
STEPPED = [name for name, x in PREDICTORS.items() if not x.needs_noise_levels]
# Of those over the noise level, what has been seen to help; all would cost too much to try.
TRIED = [*STEPPED, "taylor-angle"]
FITTED = 3  # of the best candidates are fitted, to begin with
DAMPED = (0.97, 0.94)  # shares of a layer's predicted change that are tried
FEWEST_STEPS = 4


@dataclass(frozen=True)
class Measured:
    """One way of sampling and what came of it.

    Attributes:
        name: How it was made.
        compute: MACs over those of the uncached run.
        error: Objective against the uncached run, mean over the samples it was measured on.
        converged_error: The same against the converged sample, with ten times the steps; None if
            that was not sampled.
        schedule: What it ran under; None for plain sampling.
        num_steps: Solver steps, if other than the uncached run's.
        solver: Class name of the noise scheduler, if another.
    """

    name: str
    compute: float
    error: float
    converged_error: float | None = None
    schedule: Schedule | None = field(default=None, repr=False)
    num_steps: int | None = None
    solver: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search found. Printed, it is a short text.

    Attributes:
        best: The winner, measured on samples that the search did not see.
        honest: Ways without a cache at no more cost, measured on the same samples.
        front: The best that was found at every cost, on the samples of the search.
        rollouts: Generations that were run to compare candidates.
        cost: All that was run, in uncached generations.
        verdict: Whether the cache pays, in a sentence.
        scheduler: The noise scheduler to sample with; None for the sampler's own.
        num_steps: Solver steps to sample with.
    """

    best: Measured
    honest: tuple[Measured, ...]
    front: tuple[Measured, ...]
    rollouts: int
    cost: float
    verdict: str
    scheduler: Any = field(default=None, repr=False)
    num_steps: int = 0

    def __str__(self) -> str:
        lines = [f"{'':32} compute   error" + "   to converged" * self._knows_converged]
        for row in (self.best, *self.honest):
            told = f"{row.name[:32]:32} {row.compute:7.1%} {row.error:7.4f}"
            if row.converged_error is not None:
                told += f"   {row.converged_error:.4f}"
            lines.append(told)
        lines.append(f"{self.rollouts} rollouts, as much as {self.cost:.1f} uncached generations")
        lines.append(self.verdict)
        return "\n".join(lines)

    @property
    def _knows_converged(self) -> bool:
        return self.best.converged_error is not None


@dataclass(frozen=True, eq=False)
class SearchedSchedule(Schedule):
    """A schedule that a search found, with all that it measured.

    Attributes:
        result: The search's result; not written to the schedule's file, which keeps the quality.
    """

    result: SearchResult | None = field(default=None, repr=False)


def search(
    model: Any,
    sample: Callable[..., Any],
    calibration: Calibration | None = None,
    *,
    speedup: float | None = None,
    compute: float | None = None,
    max_error: float | None = None,
    seconds: float | None = None,
    objective: str | Objective = "latent_l2",
    joint: bool = False,
    num_samples: int | None = None,
    num_validation: int | None = None,
    max_cost: float = 60.0,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    solvers: Mapping[str, Any] | None = None,
    proposals: Sequence[Schedule] = (),
    progress: bool = True,
) -> SearchedSchedule:
    """Finds the schedule that ends closest to the uncached run within a budget, by measuring.

    Schedules of every family (even and uneven spacings, thresholds, weighted dynamic programming)
    with every predictor, of the layers and of the whole denoiser's output, are run for real and
    compared with the uncached outputs; the best are improved by fitting how much of a predicted
    change to take in each gap, and by moving computed steps; and the winner is measured again on
    samples that the search has not seen, beside what needs no cache: plain fewer steps and, where
    ``sample`` takes a ``scheduler``, better solvers.

    Args:
        model: A diffusers pipeline or any module.
        sample: ``sample(i)`` runs generation number i and returns its final tensor (or tensors).
            If it also takes ``num_inference_steps`` (and ``scheduler``), the alternatives without
            a cache are measured, and quality is also told against the converged sample.
        calibration: What ``calibrate`` measured; measured here on the samples if None. It says
            what is reused beside the whole denoiser's output: calibrate with
            ``granularity="block"`` to search over blocks instead of layers.
        speedup: The budget: at most 1 / speedup of the uncached multiply-accumulates.
        compute: The same budget as a fraction, in (0, 1].
        max_error: Instead of a budget: the cheapest schedule whose error on unseen samples is at
            most this.
        seconds: Stop improving after so long.
        objective: "latent_l2", the relative L2 distance of the outputs; "typical_l2", its
            geometric mean over the samples of a batch, which no single sample that comes out
            differently decides; or a function of an output and its reference that gives a number,
            smaller for better.
        joint: Look for solver, number of steps and schedule together, by the distance to the
            converged sample.
        num_samples: Generations that candidates are compared on: sample(0), sample(1), ...; None
            for 2, or for 1 in a joint search, where each also needs its converged sample.
        num_validation: Further ones that only the winners are measured on; None for as many.
        max_cost: Stop improving when all that was run costs as much as so many uncached
            generations. The references and a first round of candidates are run in any case.
        seed: Of the order in which moves are tried. The same seed gives the same schedule.
        journal: A file for the results; a search that was interrupted goes on from it.
        solvers: Noise schedulers by name, for the alternatives; None for those that suit the
            pipeline's own (multistep ones of diffusers), if ``sample`` takes a ``scheduler``.
        proposals: Further schedules to try, of whatever origin, as ``plan_learned``; those beyond
            the budget are passed over. What it took to make them is not in the search's cost.
        progress: Whether to show a progress bar.

    Returns:
        The schedule, with its measured quality, and with everything else in ``result``.

    Raises:
        InvalidArgumentError: If not exactly one target is given or it makes no sense, no schedule
            meets it, ``sample`` returns nothing or something else each time, or the journal is of
            another search.
        CalibrationError: If the model cannot be calibrated.
        ScheduleMismatchError: If the calibration, or a proposal, is of another model.

    Example:
        >>> import torch
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(
        ...     num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
        ...     sample_size=8,
        ... ).eval().requires_grad_(False)
        >>> def sample(i, num_inference_steps=8):
        ...     x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        ...     for step in range(num_inference_steps):
        ...         t = torch.tensor([1000 - 1000 * step // num_inference_steps])
        ...         x = x - model(x, t, torch.tensor([0])).sample / num_inference_steps
        ...     return x
        >>> schedule = search(model, sample, speedup=2.0, max_cost=20, progress=False)
        >>> schedule.compute <= 0.5
        True
    """
    if sum(x is not None for x in (speedup, compute, max_error)) != 1:
        raise InvalidArgumentError("give exactly one of speedup, compute and max_error.")
    budget = _budget(speedup, compute)
    if max_error is not None and check_number("max_error", max_error) < 0:
        raise InvalidArgumentError(f"max_error must not be negative, got {max_error}.")
    if seconds is not None and check_number("seconds", seconds) <= 0:
        raise InvalidArgumentError(f"seconds must be positive, got {seconds}.")
    if not callable(sample):
        raise InvalidArgumentError(f"sample must be a function, got {type(sample).__name__}.")
    measure = OBJECTIVES.get(objective) if isinstance(objective, str) else objective
    if not callable(measure):
        raise InvalidArgumentError(
            f"objective must be a function or one of {', '.join(OBJECTIVES)}, got {objective!r}."
        )
    num_samples = 2 - joint if num_samples is None else num_samples
    num_samples = check_count("num_samples", num_samples, least=1)
    num_validation = num_samples if num_validation is None else num_validation
    num_validation = check_count("num_validation", num_validation, least=1)
    check_count("seed", seed, least=0)
    if check_number("max_cost", max_cost) <= 0:
        raise InvalidArgumentError(f"max_cost must be positive, got {max_cost}.")
    takes = _keywords(sample)
    if joint and not {"num_inference_steps", "scheduler"} <= takes:
        raise InvalidArgumentError(
            "a joint search asks the sampler for other solvers and numbers of steps: sample must "
            "take the keywords num_inference_steps and scheduler"
        )
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    for name, solver in (solvers or {}).items():
        if solver_stages(solver) not in (None, 1):
            raise InvalidArgumentError(
                f"the solver {name!r} asks the model {solver_stages(solver)} times in a step, and "
                "costs are told in steps here; leave it out"
            )
    join_processes()
    spent = 0.0
    if calibration is None:
        calibration = _calibrated(model, sample, num_samples, progress)
        spent = float(num_samples)
    elif calibration.model not in (None, identify(model)):
        raise ScheduleMismatchError(
            "the calibration is of another model; calibrate this one, or leave it out"
        )
    if calibration.num_steps < FEWEST_STEPS:
        raise InvalidArgumentError(
            f"a generation of {calibration.num_steps} steps leaves nothing to plan; "
            f"{FEWEST_STEPS} are the fewest"
        )
    for proposal in proposals:
        _check_proposal(proposal, calibration)
    if solvers is None:
        solvers = _suitable_solvers(model) if "scheduler" in takes else {}
    solvers = dict(sorted(solvers.items()))
    settings = {
        "model": identify(model).fingerprint,
        "steps": calibration.num_steps,
        "objective": objective if isinstance(objective, str) else _name(objective),
        "solvers": sorted(solvers),
    }
    rollouts = Rollouts(model, sample, measure, solvers, journal, settings, spent)
    with tqdm(desc="searching", unit="rollout", disable=not progress) as bar:
        hunt = _Hunt(
            _Space(model, calibration, solvers),
            rollouts,
            bar,
            takes=takes,
            solvers=solvers,
            joint=joint,
            train=range(num_samples),
            unseen=range(num_samples, num_samples + num_validation),
            max_cost=max_cost,
            deadline=deadline,
            rng=random.Random(seed),
            given=proposals,
        )
        return hunt.cheapest(max_error) if max_error is not None else hunt.best_within(budget)


def _check_proposal(proposal: object, calibration: Calibration) -> None:
    """Refuses what could not run beside the search's own schedules.

    Raises:
        InvalidArgumentError: If it is no schedule of as many steps that knows its layers.
        ScheduleMismatchError: If it is for other layers, or another model.
    """
    if not isinstance(proposal, Schedule) or proposal.layers is None:
        raise InvalidArgumentError(
            f"proposals must be schedules that know their layers, got {type(proposal).__name__}; "
            "bind a published one to the layers first"
        )
    if proposal.num_steps != calibration.num_steps:
        raise InvalidArgumentError(
            f"a proposal has {proposal.num_steps} steps, but a generation {calibration.num_steps}"
        )
    proposal.bind(calibration.layers, calibration.model)


def _budget(speedup: float | None, compute: float | None) -> float:
    if speedup is not None:
        if check_number("speedup", speedup) < 1:
            raise InvalidArgumentError(f"speedup must be at least 1, got {speedup}.")
        return 1 / speedup
    if compute is not None:
        if not 0 < check_number("compute", compute) <= 1:
            raise InvalidArgumentError(f"compute must be in (0, 1], got {compute}.")
        return compute
    return 1.0


def _keywords(sample: Callable[..., Any]) -> set[str]:
    """Which of the options that a search may ask for ``sample`` takes by name."""
    try:
        parameters = inspect.signature(sample).parameters
    except (TypeError, ValueError):
        return set()
    return {"num_inference_steps", "scheduler"} & set(parameters)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _calibrated(
    model: Any, sample: Callable[..., Any], num_samples: int, progress: bool
) -> Calibration:
    return calibrate(model, sample, num_samples, max_gap=3, progress=progress)


def _suitable_solvers(model: Any) -> Mapping[str, Any]:
    scheduler = noise_scheduler(model)
    if scheduler is None or not hasattr(scheduler, "config"):
        return {}
    from .diffusers_io import multistep_solvers  # imports diffusers

    solvers: Mapping[str, Any] = multistep_solvers(scheduler)
    return solvers


class _Space:
    """The schedules of a model: layers at both granularities, and what they cost."""

    def __init__(self, model: Any, calibration: Calibration, solvers: Mapping[str, Any]) -> None:
        self.calibration = calibration
        self._solver_classes = {name: type(x).__name__ for name, x in solvers.items()}
        self.num_steps = calibration.num_steps
        self._total = calibration.total_macs
        self._layers: dict[str, tuple[CacheLayer, ...]] = {"layers": calibration.layers}
        if len(find_denoisers(model)) == 1 and calibration.layers[0].kind != "model":
            (whole,) = find_layers(model, granularity="model")
            self._layers["model"] = (replace(whole, macs=self._total),)

    @property
    def grains(self) -> tuple[str, ...]:
        return tuple(self._layers)

    @property
    def predictors(self) -> list[str]:
        """Those to try, without any that needs what is not known."""
        return STEPPED if self.calibration.noise_levels is None else TRIED

    def count(self, grain: str, budget: float, num_steps: int | None = None) -> int:
        """Computed steps within a budget, as a fraction of the uncached run."""
        steps = num_steps or self.num_steps
        run = sum((x.macs or 0) for x in self._layers[grain])
        share = run / self._total if self._total else 1.0
        count = affordable(steps, min(share, 1.0), budget * self.num_steps / steps)
        # Denoisers that share a generation are each computed at their first step, planned or not.
        while count > 0:
            trial = self.candidate("even", grain, spaced(steps, count), "hold", num_steps)
            if trial.compute <= budget + 1e-9:
                break
            count -= 1
        return count

    def candidate(
        self,
        name: str,
        grain: str,
        mask: Mask,
        predictor: str,
        num_steps: int | None = None,
        solver: str | None = None,
    ) -> Candidate:
        """One mask for all layers of a granularity."""
        layers = self._layers[grain]
        row = Row(mask, predictor)
        return self.of_rows(
            f"{name}, {predictor}, {grain}",
            layers,
            {x.path: row for x in layers},
            num_steps,
            solver,
        )

    def of_rows(
        self,
        name: str,
        layers: tuple[CacheLayer, ...],
        rows: Mapping[str, Row],
        num_steps: int | None = None,
        solver: str | None = None,
    ) -> Candidate:
        """Rows as a candidate, with its cost over that of the uncached run."""
        calibration = self.calibration
        if num_steps is None and layers is calibration.layers:
            schedule = assemble(calibration, rows, {"planner": "search", "family": name})
        else:
            own = num_steps is None
            schedule = Schedule(
                num_steps=num_steps or self.num_steps,
                rows=rows,
                layers=layers,
                model=calibration.model,
                solver=calibration.solver if solver is None else self._solver_classes[solver],
                timesteps=calibration.timesteps if own else None,
                noise_levels=calibration.noise_levels if own else None,
                compute=compute_fraction(rows, layers, self._total),
                provenance={"planner": "search", "family": name},
            )
        fraction = 1.0 if schedule.compute is None else schedule.compute
        steps = (num_steps or self.num_steps) / self.num_steps
        return Candidate(name, fraction * steps, schedule, num_steps, solver)


class _Hunt:
    """One search: what it looks for, what it may spend, and how it decides."""

    def __init__(
        self,
        space: _Space,
        rollouts: Rollouts,
        bar: Any,
        *,
        takes: set[str],
        solvers: Mapping[str, Any],
        joint: bool,
        train: range,
        unseen: range,
        max_cost: float,
        deadline: float,
        rng: random.Random,
        given: Sequence[Schedule],
    ) -> None:
        self._space = space
        self._rollouts = rollouts
        self._bar = bar
        self._takes = takes
        self._solvers = solvers
        self._joint = joint
        self._train = train
        self._unseen = unseen
        self._max_cost = max_cost
        self._deadline = deadline
        self._rng = rng
        layers = space.calibration.layers
        self._given = [
            space.of_rows(f"given {i}: {x.provenance.get('planner', 'by hand')}", layers, x.rows)
            for i, x in enumerate(given)
        ]
        self._errors: dict[str, tuple[Candidate, list[float]]] = {}
        self._target = CONVERGED if joint else UNCACHED
        self._plain = Candidate(UNCACHED, 1.0)
        self._refer()

    def _refer(self) -> None:
        """Samples the references, and makes sure that sampling twice gives the same."""
        steps = self._space.num_steps
        converged = Candidate(CONVERGED, CONVERGED_FACTOR, num_steps=CONVERGED_FACTOR * steps)
        for i in (*self._train, *self._unseen):
            is_seen = i in self._train
            self._rollouts.set_reference(
                UNCACHED, i, self._plain, fitted_to=is_seen and not self._joint
            )
            if self._joint or ("num_inference_steps" in self._takes and not is_seen):
                self._rollouts.set_reference(
                    CONVERGED, i, converged, fitted_to=is_seen and self._joint
                )
        noise = self._rollouts.noise(UNCACHED, self._train[0], self._plain)
        if noise > 1e-4:
            raise InvalidArgumentError(
                f"sample({self._train[0]}) run twice gave two results ({noise:.2g} apart); "
                "make it draw its noise from a generator seeded with i, and put the model in "
                "evaluation mode"
            )

    # ---------------------------------------------------------------------------------- targets

    def best_within(self, budget: float) -> SearchedSchedule:
        """The best schedule whose compute is at most the budget."""
        proposals = self._proposals(budget)
        if not proposals:
            least = min(self._least(grain) for grain in self._space.grains)
            raise InvalidArgumentError(
                f"no schedule is as cheap as {budget:.3f} of the uncached run; with one computed "
                f"step it is {least:.3f}. Ask for less, or sample with fewer steps"
            )
        self._screen(proposals)
        self._improve(budget)
        return self._result(self._best(budget), budget)

    def cheapest(self, max_error: float) -> SearchedSchedule:
        """The cheapest schedule that keeps an error, on unseen samples too."""
        steps = self._space.num_steps
        counts = sorted({1, *(max(2, round(steps * f)) for f in np.geomspace(2 / steps, 1, 12))})
        low, high = 0, len(counts) - 1  # the last one computes everything
        while low < high:
            middle = (low + high) // 2
            budget = counts[middle] / steps
            if self._tries(budget) and self._error(self._best(budget)) <= max_error:
                high = middle
            else:
                low = middle + 1
        reserve = 2 * self._final(counts[high] / steps)
        while high and self._tries(budget := counts[high - 1] / steps):
            self._improve(budget, until=max_error, reserve=reserve)
            if self._error(self._best(budget)) > max_error:
                break
            high -= 1
        for count in counts[high:]:
            budget = count / steps
            if not self._tries(budget):
                continue
            self._improve(budget, until=max_error)
            fitting = [c for c, _ in self._errors.values() if self._is_fit(c, budget, max_error)]
            for candidate in sorted(fitting, key=lambda c: (c.compute, self._error(c), c.key)):
                if not self._can_pay(self._final(candidate.compute)):
                    break
                if self._mean(self._target, candidate, self._unseen) <= max_error:
                    return self._result(candidate, candidate.compute)
        raise InvalidArgumentError(
            f"no schedule was found that keeps an error of {max_error:g} on samples that the "
            f"search has not seen; {self._rollouts.cost:.1f} of the {self._max_cost:g} generations "
            "that max_cost allows were spent. Allow more of either, or sample without a cache"
        )

    def _tries(self, budget: float) -> bool:
        """Screens what is proposed for a budget, if it can be paid; whether something fits it."""
        proposals = self._proposals(budget)
        if self._can_pay(self._price(proposals) + self._final(budget)):
            self._screen(proposals)
        return bool(self._ranked(budget))

    def _is_fit(self, candidate: Candidate, budget: float, max_error: float) -> bool:
        return candidate.compute <= budget + 1e-9 and self._error(candidate) <= max_error

    def _least(self, grain: str) -> float:
        first = spaced(self._space.num_steps, 1)
        return self._space.candidate("one step", grain, first, "hold").compute

    # -------------------------------------------------------------------------------- proposals

    def _proposals(self, budget: float) -> list[Candidate]:
        """Even spacings with every predictor and granularity, and thresholds."""
        found = [
            self._space.candidate(name, grain, mask, predictor)
            for grain in self._space.grains
            for name, mask in self._even(self._space.count(grain, budget)).items()
            for predictor in self._space.predictors
            if predictor in STEPPED or (grain == "model" and not name.startswith("every"))
        ]
        found += self._thresholds(budget)
        found += self._given
        found += self._other_samplers(budget)
        return _distinct(x for x in found if x.compute <= budget + 1e-9)

    def _even(self, count: int) -> dict[str, Mask]:
        """The even spacings with at most so many computed steps, counted from either end."""
        steps = self._space.num_steps
        if count < 1:
            return {}
        interval = math.ceil(steps / count)
        return {
            f"{count} even steps": spaced(steps, count),
            f"every {interval}": every(steps, interval),
            f"every {interval} from the last": every_from_last(steps, interval, count),
        }

    def _thresholds(self, budget: float) -> list[Candidate]:
        """The paper's plans, each with the alpha that spends most of the budget."""
        found = []
        for predictor, plans in self._plans.items():
            fitting = [x for x in plans if x[1] <= budget]
            if fitting:
                alpha, _, rows = max(fitting, key=lambda x: x[1])  # the first of the dearest
                name = f"threshold {alpha:.3g}, {predictor}"
                found.append(self._space.of_rows(name, self._space.calibration.layers, rows))
        return found

    @cached_property
    def _plans(self) -> dict[str, list[tuple[float, float, Mapping[str, Row]]]]:
        """Predictor -> the alpha, compute and rows of the paper's plans."""
        calibration = self._space.calibration
        known = calibration.errors[np.isfinite(calibration.errors) & (calibration.errors > 0)]
        if not known.size or calibration.layers[0].kind == "model":
            return {}
        alphas = [float(x) for x in np.geomspace(known.min(), 1.01 * known.max(), 40)]
        found = {}
        for predictor in ("hold", "taylor"):
            schedules = [plan(calibration, alpha=x, predictor=predictor) for x in alphas]
            found[predictor] = [
                (alpha, 1.0 if x.compute is None else x.compute, x.rows)
                for alpha, x in zip(alphas, schedules, strict=True)
            ]
        return found

    def _other_samplers(self, budget: float) -> list[Candidate]:
        """Other solvers and numbers of steps, with a cache over them and without."""
        if not self._joint:
            return []
        steps = self._space.num_steps
        affordable_steps = int(steps * budget + 1e-9)
        found = [
            Candidate(f"{n} steps" + f" of {solver}" * bool(solver), n / steps, None, n, solver)
            for solver in (None, *self._solvers)
            for n in (affordable_steps, affordable_steps - 1)
            if n >= 2
        ]
        if "model" not in self._space.grains:
            return found
        for solver in (None, *self._solvers):
            for factor in (1.5, 2.0, 3.0, math.inf):
                n = round(min(steps, affordable_steps * factor))
                count = self._space.count("model", budget, n)
                if affordable_steps >= 2 and n > count >= 2:
                    of = f"{count} of {n} steps" + f" of {solver}" * bool(solver)
                    found += [
                        self._space.candidate(of, "model", spaced(n, count), x, n, solver)
                        for x in ("taylor", "taylor2")
                    ]
        return found

    def _refined(self, budget: float) -> list[Candidate]:
        """Uneven spacings, with the predictors and granularities that did best so far."""
        steps = self._space.num_steps
        ways = []
        for candidate in self._ranked(budget):
            parts = candidate.name.split(", ")
            is_even = "even" in parts[0] or parts[0].startswith("every")
            if candidate.num_steps is None and len(parts) == 3 and is_even:
                ways.append((parts[1], parts[2]))
        weights = self._sensitivity()
        found = []
        for predictor, grain in list(dict.fromkeys(ways))[:3]:
            count = self._space.count(grain, budget)
            masks = {f"{count} steps, power {p:g}": spaced(steps, count, p) for p in POWERS}
            table = self._table()
            for name, weight in weights.items():
                masks[f"{count} steps by {name}"] = least_error(table, weight, count)
            found += [
                self._space.candidate(name, grain, mask, predictor)
                for name, mask in masks.items()
                if sum(mask) <= count
            ]
        return found

    def _table(self) -> Any:
        """Error of a reuse by gap and step, over layers in proportion to their cost."""
        calibration = self._space.calibration
        macs = np.array([float(x.macs or 1) for x in calibration.layers])
        errors = np.nan_to_num(calibration.errors.mean(axis=0))
        return np.tensordot(macs / macs.sum(), errors, axes=1)

    def _sensitivity(self) -> dict[str, Any]:
        """What an error at each step counts: alike, and as measured at a few steps."""
        steps = self._space.num_steps
        alike = np.ones(steps)
        grain = self._space.grains[0]
        probes = sorted({round(x) for x in np.linspace(1, steps - 1, PROBES)})
        runs = []
        for probe in probes:
            mask = tuple(step != probe for step in range(steps))
            name = f"reuse at step {probe} alone"
            runs.append((self._space.candidate(name, grain, mask, "hold"), self._train[0]))
        table = self._table()[0]
        effects = self._rollouts.distances(UNCACHED, runs)
        largest = max((x for x in effects if math.isfinite(x)), default=1.0)
        ratios = [
            min(e, largest) / max(table[p], 1e-12) for e, p in zip(effects, probes, strict=True)
        ]
        return {
            "error": alike,
            "sensitivity": np.interp(np.arange(steps), probes, ratios),
        }

    # ----------------------------------------------------------------------------- measurements

    def _screen(self, candidates: Sequence[Candidate]) -> bool:
        """Tries candidates on one sample, and the better half on the others; False if none."""
        if not candidates:
            return False
        first, rest = self._train[0], self._train[1:]
        errors = self._rollouts.distances(self._target, [(c, first) for c in candidates])
        order = sorted(range(len(candidates)), key=lambda i: (errors[i], i))
        kept = order[: max(3, len(order) // 2)]
        runs = [(candidates[i], j) for i in kept for j in rest]
        others = self._rollouts.distances(self._target, runs)
        for position, i in enumerate(kept):
            own = others[position * len(rest) : (position + 1) * len(rest)]
            self._note(candidates[i], [errors[i], *own])
        return True

    def _price(self, candidates: Sequence[Candidate]) -> float:
        """What screening candidates costs at most, in uncached generations."""
        rest = len(self._train) - 1
        dearest = sorted((c.compute for c in candidates), reverse=True)
        return sum(dearest) + rest * sum(dearest[: max(3, len(dearest) // 2)])

    def _note(self, candidate: Candidate, errors: list[float]) -> None:
        self._errors.setdefault(candidate.key, (candidate, errors))
        self._bar.update(self._rollouts.rollouts - self._bar.n)
        best = min(float(np.mean(e)) for _, e in self._errors.values())
        self._bar.set_postfix_str(f"best error {best:.4g}")

    def _error(self, candidate: Candidate) -> float:
        return float(np.mean(self._errors[candidate.key][1]))

    def _mean(self, reference: str, candidate: Candidate, samples: Sequence[int]) -> float:
        runs = [(candidate, i) for i in samples]
        return float(np.mean(self._rollouts.distances(reference, runs)))

    def _ranked(self, budget: float) -> list[Candidate]:
        fitting = [c for c, _ in self._errors.values() if c.compute <= budget + 1e-9]
        return sorted(fitting, key=lambda c: (self._error(c), c.key))

    def _final(self, budget: float) -> float:
        """What it costs at most to measure the winner and what needs no cache."""
        solvers = len(self._solvers) if "scheduler" in self._takes else 0
        return budget * len(self._unseen) * (2 + solvers)

    def _best(self, budget: float) -> Candidate:
        return self._ranked(budget)[0]

    def _may_go_on(self, needed: float) -> bool:
        return agreed(time.monotonic() < self._deadline) and self._can_pay(needed)

    def _can_pay(self, needed: float) -> bool:
        return self._rollouts.cost + needed <= self._max_cost

    # ------------------------------------------------------------------------------ improvement

    def _improve(self, budget: float, until: float = -math.inf, reserve: float = 0.0) -> None:
        """Uneven spacings, then moves of single computed steps of the best two, while it pays."""
        final = max(reserve, self._final(budget))
        if self._error(self._best(budget)) <= until:
            return
        if self._may_go_on(PROBES + final):
            refined = _distinct(c for c in self._refined(budget) if c.compute <= budget + 1e-9)
            while refined and not self._may_go_on(self._price(refined) + final):
                refined.pop()
            self._screen(refined)
        self._fit([c for c in self._ranked(budget) if _is_of_denoiser(c)][:FITTED], final)
        self._damp([c for c in self._ranked(budget) if _is_of_layers(c)][:1], final)
        stuck: set[str] = set()
        while self._may_go_on(BATCH * len(self._train) * budget + final):
            uniform = [c for c in self._ranked(budget) if _row(c) is not None][:2]
            candidate = next((c for c in uniform if c.key not in stuck), None)
            if self._error(self._best(budget)) <= until:
                return
            if candidate is None:
                if not self._fit([c for c in uniform if _is_of_denoiser(c)], final):
                    return
            elif not self._climb(candidate, budget, final):
                stuck.add(candidate.key)

    def _fit(self, candidates: Sequence[Candidate], final: float) -> bool:
        """Tries candidates with the gains that suit their gaps; whether one is better for it."""
        is_better = False
        for candidate in candidates:
            if not self._may_go_on(2 * len(self._train) * candidate.compute + final):
                break
            row = self._rollouts.fitted(self._target, candidate, self._train)
            fitted = self._with_row(candidate, row, "fitted")
            if fitted.key not in self._errors:
                runs = [(fitted, i) for i in self._train]
                self._note(fitted, self._rollouts.distances(self._target, runs))
                is_better |= self._error(fitted) < self._error(candidate)
        return is_better

    def _damp(self, candidates: Sequence[Candidate], final: float) -> None:
        """Tries candidates with a little less than the changes that are predicted."""
        for candidate, gain in itertools.product(candidates, DAMPED):
            row = _row(candidate)
            if row is None or not self._may_go_on(len(self._train) * candidate.compute + final):
                return
            damped = replace(row, gains=tuple(1.0 if x else gain for x in row.computed))
            self._screen([self._with_row(candidate, damped, f"damped {gain:g}")])

    def _climb(self, candidate: Candidate, budget: float, final: float) -> bool:
        """Tries moves of a candidate, a batch at a time; whether one is better."""
        row = _row(candidate)
        if row is None:
            return False
        before, own = self._error(candidate), self._errors[candidate.key][1][0]
        masks = neighbours(row.computed, self._rng)
        moved = (self._with_row(candidate, row.moved(mask), "moved") for mask in masks)
        untried = (c for c in moved if c.key not in self._errors and c.compute <= budget + 1e-9)
        first, others = self._train[0], self._train[1:]
        while batch := list(itertools.islice(untried, BATCH)):
            if not self._may_go_on(len(batch) * len(self._train) * budget + final):
                return False
            errors = self._rollouts.distances(self._target, [(c, first) for c in batch])
            is_better = False
            for trial, error in zip(batch, errors, strict=True):
                if error >= own:  # worse already on the first sample
                    continue
                rest = self._rollouts.distances(self._target, [(trial, i) for i in others])
                self._note(trial, [error, *rest])
                is_better |= self._error(trial) < before
            if is_better:
                return True
        return False

    def _with_row(self, candidate: Candidate, row: Row, how: str) -> Candidate:
        """A candidate with another row for all layers; its name says how that came about."""
        schedule = candidate.schedule
        if schedule is None or schedule.layers is None:
            return candidate
        rows = dict.fromkeys(schedule.rows, row)
        name = candidate.name if f", {how}" in candidate.name else f"{candidate.name}, {how}"
        layers = schedule.layers
        if candidate.num_steps is None and layers == self._space.calibration.layers:
            layers = self._space.calibration.layers  # its schedules keep what the calibration knows
        return self._space.of_rows(name, layers, rows, candidate.num_steps, candidate.solver)

    # ----------------------------------------------------------------------------------- result

    def _result(self, best: Candidate, budget: float) -> SearchedSchedule:
        plain = self._without_cache(budget)
        winner, *judged = map(self._judged, (best, *plain))
        honest = tuple(judged)
        if self._joint:  # whatever does best is what was asked for
            rows = list(zip((best, *plain), (winner, *honest), strict=True))
            best, winner = min(rows, key=lambda row: _joint_error(row[1]))
        schedule = best.schedule or self._computing_everything(best)
        result = SearchResult(
            best=winner,
            honest=honest,
            front=self._front(),
            rollouts=self._rollouts.rollouts,
            cost=self._rollouts.cost,
            verdict=_verdict(winner, honest, self._joint),
            scheduler=self._solvers.get(best.solver or ""),
            num_steps=best.num_steps or self._space.num_steps,
        )
        quality = {"error": winner.error}
        if winner.converged_error is not None:
            quality["error to the converged sample"] = winner.converged_error
        values = {item: getattr(schedule, item) for item in Schedule.__dataclass_fields__}
        told = {"rollouts": str(result.rollouts), "search cost": f"{result.cost:.1f} generations"}
        values["quality"] = quality
        values["provenance"] = {**schedule.provenance, **told, "verdict": result.verdict}
        return SearchedSchedule(**values, result=result)

    def _computing_everything(self, candidate: Candidate) -> Schedule:
        """The schedule of plain sampling, for when that is best."""
        steps = candidate.num_steps or self._space.num_steps
        everything = self._space.candidate(
            candidate.name, "layers", (True,) * steps, "hold", candidate.num_steps, candidate.solver
        )
        if everything.schedule is None:
            raise CalibrationError("a schedule without rows cannot be made")
        return everything.schedule

    def _without_cache(self, budget: float) -> list[Candidate]:
        """Plain sampling that costs no more than the budget."""
        steps = self._space.num_steps
        fewer = int(steps * budget + 1e-9)
        if "num_inference_steps" not in self._takes or fewer < 1:
            return []
        solvers = [None, *self._solvers] if "scheduler" in self._takes else [None]
        return [
            Candidate(f"{fewer} steps" + f" of {s}" * bool(s), fewer / steps, None, fewer, s)
            for s in solvers
        ]

    def _judged(self, candidate: Candidate) -> Measured:
        """A candidate on the unseen samples."""
        knows_converged = self._joint or "num_inference_steps" in self._takes
        return Measured(
            name=candidate.name,
            compute=candidate.compute,
            error=self._mean(UNCACHED, candidate, self._unseen),
            converged_error=(
                self._mean(CONVERGED, candidate, self._unseen) if knows_converged else None
            ),
            schedule=candidate.schedule,
            num_steps=candidate.num_steps,
            solver=candidate.solver,
        )

    def _front(self) -> tuple[Measured, ...]:
        """The candidates that none is both cheaper and better than, cheapest first."""
        front: list[Measured] = []
        order = sorted(self._errors.values(), key=lambda x: (x[0].compute, float(np.mean(x[1]))))
        for candidate, errors in order:
            error = float(np.mean(errors))
            if not front or error < front[-1].error:
                front.append(
                    Measured(
                        candidate.name,
                        candidate.compute,
                        error,
                        schedule=candidate.schedule,
                        num_steps=candidate.num_steps,
                        solver=candidate.solver,
                    )
                )
        return tuple(front)


def _rows(candidate: Candidate) -> Mapping[str, Row]:
    return candidate.schedule.rows if candidate.schedule else {}


def _row(candidate: Candidate) -> Row | None:
    """The row that all layers share; None if they differ or there is no schedule."""
    rows = set(_rows(candidate).values())
    return next(iter(rows)) if len(rows) == 1 else None


def _is_of_denoiser(candidate: Candidate) -> bool:
    """Whether a candidate extrapolates the output of a whole denoiser, so that it can be fitted."""
    return _extrapolates(candidate) and list(_rows(candidate)) == [""]


def _is_of_layers(candidate: Candidate) -> bool:
    """Whether a candidate extrapolates the outputs of layers, all at the same steps."""
    return _extrapolates(candidate) and list(_rows(candidate)) != [""]


def _extrapolates(candidate: Candidate) -> bool:
    row = _row(candidate)
    return row is not None and PREDICTORS[row.predictor].order > 0 and not all(row.computed)


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The first of those that do the same."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.key, candidate)
    return list(found.values())


def _joint_error(row: Measured) -> float:
    """What a joint search goes by: the distance to the converged sample."""
    return row.error if row.converged_error is None else row.converged_error


def _verdict(best: Measured, honest: Sequence[Measured], joint: bool) -> str:
    """Whether the cache pays, in a sentence."""

    def quality(row: Measured) -> float:
        return _joint_error(row) if joint else row.error

    if best.schedule is None:
        return f"no cache is needed: {best.name} came out best of all that was tried"
    if not honest:
        return (
            "not compared with fewer steps: sample takes no num_inference_steps, so whether the "
            "cache pays is not known"
        )
    rival = min(honest, key=quality)
    target = "converged sample" if joint else "uncached run"
    if quality(rival) <= quality(best):
        closer = "closer" if quality(rival) < quality(best) else "as close"
        return (
            f"NO CACHE IS BETTER: {rival.name} costs {rival.compute:.1%} and ends {closer} to the "
            f"{target} ({quality(rival):.4f} against {quality(best):.4f})"
        )
    cost = "at no less cost"
    if rival.compute < best.compute - 1e-9:
        cost = f"for {best.compute:.1%} of the uncached MACs instead of {rival.compute:.1%}"
    told = (
        f"the schedule pays: it ends closer to the {target} than {rival.name} {cost} "
        f"({quality(best):.4f} against {quality(rival):.4f})"
    )
    closest = min(honest, key=_joint_error)
    if joint or _joint_error(closest) >= _joint_error(best):
        return told
    return (
        f"{told}; BUT TO THE CONVERGED SAMPLE {closest.name} ends closer "
        f"({_joint_error(closest):.4f} against {_joint_error(best):.4f})"
    )
