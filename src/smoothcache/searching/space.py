"""Candidates of a search, and the families that they are drawn from."""

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
from ..model.denoisers import find_denoisers
from ..planners._assemble import assemble
from ..schedule.expected_cost import compute_fraction
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from ..steps.predictors import PREDICTORS
from .masks import Mask, affordable, spaced


@dataclass(frozen=True)
class Candidate:
    """One way of sampling.

    Attributes:
        name: How it was made, for people.
        compute: MACs over those of the uncached run.
        schedule: What to run under; None for plain sampling.
        num_steps: Solver steps to ask the sampler for; None for its own number.
        solver: Name of another noise scheduler to ask for; None for its own.
    """

    name: str
    compute: float
    schedule: Schedule | None = None
    num_steps: int | None = None
    solver: str | None = None

    @cached_property
    def key(self) -> str:
        """The same for candidates that do the same."""
        rows = self.schedule.rows if self.schedule else {}
        does = [
            [path, *_prediction(row), "".join("01"[x] for x in row.computed)]
            for path, row in rows.items()
            if not all(row.computed)
        ]
        told = json.dumps([does, self.num_steps, self.solver])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def _prediction(row: Row) -> tuple[int, str, list[float]]:
    """The order of a row's predictor, or as much of it as the computed steps allow; axis, gains."""
    order = min(PREDICTORS[row.predictor].order, sum(row.computed[: last_reused_step(row)]) - 1)
    if order == 0:
        return 0, "step", []
    return order, PREDICTORS[row.predictor].axis, [round(x, 6) for x in row.gains or ()]


def last_reused_step(row: Row) -> int:
    return max(step for step, is_computed in enumerate(row.computed) if not is_computed)


STEPPED = [name for name, x in PREDICTORS.items() if not x.needs_noise_levels]
# Of those over the noise level, what has been seen to help; all would cost too much to try.
TRIED = [*STEPPED, "taylor-angle"]


class SearchSpace:
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
