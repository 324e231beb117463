"""The candidates that a search proposes before it improves the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from ..planners.threshold import plan
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from .masks import FloatArray, Mask, every, every_from_last, least_error, spaced
from .space import STEP_PREDICTORS, Candidate, SearchSpace

POWERS = (0.8, 1.25, 1.6)  # uneven spacings: position of a computed step ~ index ** power
PROBES = 5  # steps at which the effect of an error is measured
MOST_ALPHAS = 40  # thresholds that are planned with
STEP_FACTORS = (1.5, 2.0, 3.0, math.inf)  # step counts of a joint search, over the affordable one


# A long class, because every kind of candidate is formed from the same few facts.
class Proposals:
    """Proposes candidates for a budget.

    Args:
        space: Forms the candidates.
        solvers: Names of solvers that may replace the sampler's own.
        joint: Whether to propose other solvers and numbers of steps as well.
        given: Schedules of the user, which are proposed too.
    """

    def __init__(
        self,
        space: SearchSpace,
        solvers: Iterable[str],
        *,
        joint: bool,
        given: Sequence[Schedule],
    ) -> None:
        self._space = space
        self._solvers = (None, *solvers)
        self._joint = joint
        self._given = [
            space.of_schedule(f"given {i}: {x.provenance.get('planner', 'by hand')}", x)
            for i, x in enumerate(given)
        ]

    def within(self, budget: float) -> list[Candidate]:
        """The first round: even spacings, thresholds, given schedules and other samplers."""
        found = [*self._even(budget), *self._thresholds(budget), *self._given]
        if self._joint:
            found += self._other_samplers(budget)
        return distinct(x for x in found if x.fits(budget))

    def baselines(self, budget: float) -> list[Candidate]:
        """What a plan must beat: every n-th step, thresholds and given schedules."""
        space = self._space
        found = []
        for granularity in space.granularities:
            count = space.affordable_steps(granularity, budget)
            masks = self._even_masks(count)
            found += [
                space.even(name, granularity, mask, predictor)
                for name, mask in masks.items()
                for predictor in STEP_PREDICTORS
                if _is_every(name) or (name.endswith("last") and predictor == "taylor2")
            ]
        found += [*self._thresholds(budget), *self._given]
        return distinct(x for x in found if x.fits(budget))

    def variants(self, budget: float) -> list[Candidate]:
        """The even spacings of layers that ``baselines`` leaves out."""
        space = self._space
        if "model" not in space.granularities:
            return []
        masks = self._even_masks(space.affordable_steps("layers", budget))
        found = [
            space.even(name, "layers", mask, predictor)
            for predictor in ("taylor2", "taylor")
            for name, mask in masks.items()
            if predictor in STEP_PREDICTORS
        ]
        return distinct(x for x in found if x.fits(budget))

    def uneven(
        self, ranked: Sequence[Candidate], budget: float, weights: Mapping[str, FloatArray]
    ) -> list[Candidate]:
        """Uneven spacings, with the predictors and granularities that did best when even.

        Args:
            ranked: All measured candidates within the budget, best first.
            budget: Fraction of the uncached MACs.
            weights: Name -> how much an error at each step counts; [steps].
        """
        space = self._space
        best = dict.fromkeys(x.even for x in ranked if x.even is not None)
        found = []
        for predictor, granularity in list(best)[:3]:
            count = space.affordable_steps(granularity, budget)
            masks = {
                f"{count} steps, power {p:g}": spaced(space.num_steps, count, p) for p in POWERS
            }
            for name, weight in weights.items():
                masks[f"{count} steps by {name}"] = least_error(self._mean_errors, weight, count)
            found += [
                space.candidate(name, granularity, mask, predictor)
                for name, mask in masks.items()
                if sum(mask) <= count
            ]
        return distinct(x for x in found if x.fits(budget))

    def probes(self) -> list[Candidate]:
        """Candidates that reuse at one step each, to measure how much an error there counts."""
        granularity = self._space.granularities[0]
        return [
            self._space.candidate(
                f"reuse at step {probe} alone",
                granularity,
                tuple(step != probe for step in range(self._space.num_steps)),
                "hold",
            )
            for probe in self._probed_steps
        ]

    def step_weights(self, effects: Sequence[float]) -> dict[str, FloatArray]:
        """How much an error at each step counts: equally, and as measured with the probes.

        Args:
            effects: Distance of each probe from the reference; may be infinite.
        """
        steps = self._space.num_steps
        largest = max((x for x in effects if math.isfinite(x)), default=1.0)
        ratios = [
            min(effect, largest) / max(self._mean_errors[0, step], 1e-12)
            for effect, step in zip(effects, self._probed_steps, strict=True)
        ]
        return {
            "error": np.ones(steps),
            "sensitivity": np.interp(np.arange(steps), self._probed_steps, ratios),
        }

    @property
    def _probed_steps(self) -> list[int]:
        return sorted({round(x) for x in np.linspace(1, self._space.num_steps - 1, PROBES)})

    @cached_property
    def _mean_errors(self) -> FloatArray:
        """Error of a reuse by gap and step, a mean over layers by their MACs; [max_gap, steps]."""
        calibration = self._space.calibration
        macs = np.array([float(x.macs or 1) for x in calibration.layers])
        errors = np.nan_to_num(calibration.errors.mean(axis=0))
        mean: FloatArray = np.tensordot(macs / macs.sum(), errors, axes=1)
        return mean

    def _even(self, budget: float) -> list[Candidate]:
        """Even spacings with every granularity and predictor.

        Predictors over the noise level are tried where they have helped: on the whole denoiser,
        under one spacing.
        """
        space = self._space
        found = []
        for granularity in space.granularities:
            masks = self._even_masks(space.affordable_steps(granularity, budget))
            for name, mask in masks.items():
                with_levels = granularity == "model" and not name.startswith("every")
                predictors = space.predictors if with_levels else STEP_PREDICTORS
                found += [space.even(name, granularity, mask, x) for x in predictors]
        return found

    def _even_masks(self, count: int) -> dict[str, Mask]:
        """The even spacings with at most ``count`` computed steps, counted from either end."""
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
        """For each predictor, the threshold schedule that spends most of the budget."""
        found = []
        for predictor, plans in self._threshold_plans.items():
            affordable = [x for x in plans if x[1] <= budget]
            if affordable:
                alpha, _, rows = max(affordable, key=lambda x: x[1])  # the first of equal costs
                name = f"threshold {alpha:.3g}, {predictor}"
                found.append(self._space.of_rows(name, self._space.calibration.layers, rows))
        return found

    @cached_property
    def _threshold_plans(self) -> dict[str, list[tuple[float, float, Mapping[str, Row]]]]:
        """Predictor -> (alpha, compute, rows) of SmoothCache schedules."""
        calibration = self._space.calibration
        errors = calibration.errors[np.isfinite(calibration.errors) & (calibration.errors > 0)]
        if not errors.size or calibration.layers[0].kind == "model":
            return {}
        alphas = [float(x) for x in np.geomspace(errors.min(), 1.01 * errors.max(), MOST_ALPHAS)]
        found = {}
        for predictor in ("hold", "taylor"):
            schedules = [plan(calibration, alpha=x, predictor=predictor) for x in alphas]
            found[predictor] = [
                (alpha, 1.0 if x.compute is None else x.compute, x.rows)
                for alpha, x in zip(alphas, schedules, strict=True)
            ]
        return found

    def _other_samplers(self, budget: float) -> list[Candidate]:
        """Other solvers and numbers of steps, first without a cache and then with one."""
        space = self._space
        most = int(space.num_steps * budget + 1e-9)  # plain steps that the budget allows
        found = [
            space.plain(n, solver) for solver in self._solvers for n in (most, most - 1) if n >= 2
        ]
        if "model" not in space.granularities or most < 2:
            return found
        for solver in self._solvers:
            for factor in STEP_FACTORS:
                n = round(min(space.num_steps, most * factor))
                count = space.affordable_steps("model", budget, n)
                if n > count >= 2:
                    name = f"{count} of {n} steps" + f" of {solver}" * bool(solver)
                    mask = spaced(n, count)
                    found += [
                        space.candidate(name, "model", mask, predictor, n, solver)
                        for predictor in ("taylor", "taylor2")
                    ]
        return found


def _is_every(name: str) -> bool:
    """Whether an even mask is that of a uniform schedule."""
    return name.startswith("every") and not name.endswith("last")


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates without repetitions; of several with the same effect, the first."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.key, candidate)
    return list(found.values())
