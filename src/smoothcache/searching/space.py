"""The candidates that a search can form for a model, and what each of them costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..calibration.curves import Calibration
from ..layers.find import find_layers
from ..layers.layer import CacheLayer
from ..model.target import Target
from ..planners._assemble import assemble
from ..schedule.expected_cost import compute_fraction
from ..schedule.row import Row
from ..schedule.sampling import SamplingConfig
from ..schedule.schedule import Schedule
from ..steps.predictors import PREDICTORS
from .masks import Mask, affordable, spaced

STEP_PREDICTORS = [name for name, x in PREDICTORS.items() if not x.needs_noise_levels]
# Trying every predictor over the noise level costs too much; this one has been seen to help.
ALL_PREDICTORS = [*STEP_PREDICTORS, "taylor-angle"]
ROUNDING = 1e-9  # tolerance when a cost is compared with a budget


@dataclass(frozen=True)
class Candidate(SamplingConfig):
    """One way of sampling that a search may try.

    Attributes:
        compute: MACs as a fraction of those of the uncached run.
        even: Predictor and granularity of a candidate that the search made by spacing the computed
            steps evenly; None for any other.
    """

    compute: float
    even: tuple[str, str] | None = None

    @cached_property
    def key(self) -> str:
        """An identifier that candidates with the same effect share."""
        reuses = [
            [path, *_effective_prediction(row), "".join("01"[x] for x in row.computed)]
            for path, row in self.rows.items()
            if not all(row.computed)
        ]
        text = json.dumps([reuses, self.num_steps, self.solver])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def rows(self) -> Mapping[str, Row]:
        """Layer path -> row; empty without a schedule."""
        return self.schedule.rows if self.schedule else {}

    @property
    def common_row(self) -> Row | None:
        """The row that all layers share; None if they differ or there is no schedule."""
        rows = set(self.rows.values())
        return next(iter(rows)) if len(rows) == 1 else None

    @property
    def reuses_whole_denoiser(self) -> bool:
        """Whether it extrapolates the output of a whole denoiser, so that gains can be fitted."""
        return self._extrapolates and list(self.rows) == [""]

    @property
    def reuses_layers(self) -> bool:
        """Whether it extrapolates the outputs of layers, all of them at the same steps."""
        return self._extrapolates and list(self.rows) != [""]

    @property
    def is_fitted(self) -> bool:
        """Whether weights were fitted to it."""
        return any(row.weights is not None for row in self.rows.values())

    @property
    def _extrapolates(self) -> bool:
        row = self.common_row
        if row is None or row.weights is not None:  # fitted weights need no gains
            return False
        return row.order > 0 and not all(row.computed)

    def fits(self, budget: float) -> bool:
        """Whether it costs no more than a fraction of the uncached MACs."""
        return self.compute <= budget + ROUNDING


def _effective_prediction(row: Row) -> tuple[int, str, list[float]]:
    """Order, axis and gains of a row's predictor; the computed steps may limit the order."""
    order = min(row.order, sum(row.computed[: last_reused_step(row)]) - 1)
    if row.weights is not None:
        return (
            order,
            "fitted",
            [round(x, 6) for table in row.weight_tables for step in table for x in step],
        )
    if order == 0:
        return 0, "step", []
    return order, row.axis, [round(x, 6) for x in row.gains or ()]


def last_reused_step(row: Row) -> int:
    """The last step at which a row reuses."""
    return max(step for step, is_computed in enumerate(row.computed) if not is_computed)


class SearchSpace:
    """Forms candidates for a model and computes their costs.

    The granularity "layers" reuses the layers of the calibration. The granularity "model" reuses
    the output of the whole denoiser; it exists if there is only one denoiser.

    Args:
        model: A pipeline or a module.
        calibration: What was measured on it.
        solvers: Noise schedulers by name that candidates may use.
    """

    def __init__(self, model: Any, calibration: Calibration, solvers: Mapping[str, Any]) -> None:
        self.calibration = calibration
        self.num_steps = calibration.num_steps
        self._solver_classes = {name: type(x).__name__ for name, x in solvers.items()}
        self._total_macs = calibration.total_macs
        self._layers: dict[str, tuple[CacheLayer, ...]] = {"layers": calibration.layers}
        if len(Target.of(model).denoisers) == 1 and calibration.layers[0].kind != "model":
            (denoiser,) = find_layers(model, granularity="model")
            self._layers["model"] = (replace(denoiser, macs=self._total_macs),)

    @property
    def granularities(self) -> tuple[str, ...]:
        return tuple(self._layers)

    @property
    def predictors(self) -> list[str]:
        """The predictors to try; those over the noise level only if the levels are known."""
        return STEP_PREDICTORS if self.calibration.noise_levels is None else ALL_PREDICTORS

    def affordable_steps(
        self, granularity: str, budget: float, num_steps: int | None = None
    ) -> int:
        """The most computed steps that a budget allows.

        Args:
            granularity: "layers" or "model".
            budget: Fraction of the MACs of the uncached run.
            num_steps: Number of solver steps, if not that of the uncached run.
        """
        steps = num_steps or self.num_steps
        reusable = sum((x.macs or 0) for x in self._layers[granularity])
        share = reusable / self._total_macs if self._total_macs else 1.0
        count = affordable(steps, min(share, 1.0), budget * self.num_steps / steps)
        # Each of several denoisers is computed at its own first step, whatever the mask says, so
        # a schedule may cost more than its mask.
        while count > 0:
            trial = self.candidate("even", granularity, spaced(steps, count), "hold", num_steps)
            if trial.fits(budget):
                break
            count -= 1
        return count

    def least_compute(self) -> float:
        """The cost of the cheapest schedule, which computes step 0 alone."""
        mask = spaced(self.num_steps, 1)
        return min(self.candidate("", x, mask, "hold").compute for x in self.granularities)

    def plain(self, num_steps: int, solver: str | None) -> Candidate:
        """Sampling without a cache, with another number of steps and maybe another solver."""
        name = f"{num_steps} steps" + f" of {solver}" * bool(solver)
        return Candidate(name, num_steps / self.num_steps, num_steps=num_steps, solver=solver)

    def even(self, name: str, granularity: str, mask: Mask, predictor: str) -> Candidate:
        """An evenly spaced mask for all layers of a granularity."""
        made = self.candidate(name, granularity, mask, predictor)
        return replace(made, even=(predictor, granularity))

    def candidate(
        self,
        name: str,
        granularity: str,
        mask: Mask,
        predictor: str,
        num_steps: int | None = None,
        solver: str | None = None,
    ) -> Candidate:
        """One mask for all layers of a granularity."""
        layers = self._layers[granularity]
        rows = dict.fromkeys((x.path for x in layers), Row(mask, predictor))
        full_name = f"{name}, {predictor}, {granularity}"
        return self.of_rows(full_name, layers, rows, num_steps, solver)

    def of_rows(
        self,
        name: str,
        layers: tuple[CacheLayer, ...],
        rows: Mapping[str, Row],
        num_steps: int | None = None,
        solver: str | None = None,
    ) -> Candidate:
        """A candidate with these rows.

        Args:
            name: Its name.
            layers: The layers that the rows are for.
            rows: Layer path -> row.
            num_steps: Number of solver steps, if not that of the uncached run.
            solver: Name of the solver, if not the sampler's own.
        """
        calibration = self.calibration
        provenance = {"planner": "search", "family": name}
        if num_steps is None and layers is calibration.layers:
            schedule = assemble(calibration, rows, provenance)
        else:
            has_own_steps = num_steps is None
            schedule = Schedule(
                num_steps=num_steps or self.num_steps,
                rows=rows,
                layers=layers,
                model=calibration.model,
                solver=calibration.solver if solver is None else self._solver_classes[solver],
                timesteps=calibration.timesteps if has_own_steps else None,
                noise_levels=calibration.noise_levels if has_own_steps else None,
                compute=compute_fraction(rows, layers, self._total_macs),
                provenance=provenance,
            )
        fraction = 1.0 if schedule.compute is None else schedule.compute
        steps = (num_steps or self.num_steps) / self.num_steps
        return Candidate(
            name, fraction * steps, schedule=schedule, num_steps=num_steps, solver=solver
        )

    def of_schedule(self, name: str, schedule: Schedule) -> Candidate:
        """A schedule of somebody else, of the calibrated layers or of the whole denoiser."""
        for layers in self._layers.values():
            if {x.path for x in layers} == set(schedule.rows):
                return self.of_rows(name, layers, schedule.rows)
        return self.of_rows(name, self.calibration.layers, schedule.rows)

    def bind(self, schedule: Schedule) -> None:
        """Checks that a schedule is of the calibrated layers or of the whole denoiser.

        Raises:
            ScheduleMismatchError: If it is not.
        """
        model = self._layers.get("model", ())
        is_whole = bool(model) and {x.path for x in model} == set(schedule.rows)
        schedule.bind(model if is_whole else self.calibration.layers, self.calibration.model)

    def with_row(self, candidate: Candidate, row: Row, change: str) -> Candidate:
        """The same candidate with another row for all layers.

        Args:
            candidate: What to change; without a schedule it is returned as it is.
            row: The new row.
            change: What was done to the row, such as "moved"; the name lists it once.
        """
        schedule = candidate.schedule
        if schedule is None or schedule.layers is None:
            return candidate
        name = candidate.name
        if f", {change}" not in name:
            name = f"{name}, {change}"
        layers = schedule.layers
        if candidate.num_steps is None and layers == self.calibration.layers:
            layers = self.calibration.layers  # of_rows recognises them by identity
        rows = dict.fromkeys(schedule.rows, row)
        return self.of_rows(name, layers, rows, candidate.num_steps, candidate.solver)
