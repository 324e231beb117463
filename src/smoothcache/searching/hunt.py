"""The order of a search: what is tried, kept and improved within the budget."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import CalibrationError, InvalidArgumentError
from ..planners.threshold import plan
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from ..steps.predictors import PREDICTORS
from .masks import Mask, every, every_from_last, least_error, neighbours, spaced
from .processes import agreed
from .result import Measured, SearchedSchedule, SearchResult, joint_error, verdict_of
from .rollouts import Rollouts
from .space import STEPPED, Candidate, SearchSpace

UNCACHED, CONVERGED = "uncached", "converged"
CONVERGED_FACTOR = 10  # times as many steps as the uncached run
BATCH = 4  # candidates that are tried before the next choice, whatever the number of processes
PROBES = 5  # steps at which the effect of an error is measured
POWERS = (0.8, 1.25, 1.6)
FITTED = 3  # of the best candidates are fitted, to begin with
DAMPED = (0.97, 0.94)  # shares of a layer's predicted change that are tried


class Hunt:
    """One search: what it looks for, what it may spend, and how it decides."""

    def __init__(
        self,
        space: SearchSpace,
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
            best, winner = min(rows, key=lambda row: joint_error(row[1]))
        schedule = best.schedule or self._computing_everything(best)
        result = SearchResult(
            best=winner,
            honest=honest,
            front=self._front(),
            rollouts=self._rollouts.rollouts,
            cost=self._rollouts.cost,
            verdict=verdict_of(winner, honest, self._joint),
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
