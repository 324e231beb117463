"""Last step of every planner: turns rows into a schedule for the calibrated model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..calibration.curves import INTERPOLATED, TIMESTEPS, Calibration
from ..schedule.expected_cost import compute_fraction
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from ..steps.resample import CARRIED_OVER


def assemble(
    calibration: Calibration, rows: Mapping[str, Row], settings: Mapping[str, object]
) -> Schedule:
    """Returns the schedule of these rows, with identity and cost from the calibration.

    A layer is computed at the first step at which it runs. Steps at which it does not run, because
    another denoiser does, are marked as computed. Interpolated timesteps are omitted, because no
    solver would produce them.

    Args:
        calibration: Calibration that the rows were planned from.
        rows: Rows by layer path, for every layer of the calibration.
        settings: Name and arguments of the planner, for the provenance.
    """
    rows = {
        layer.path: _from_first_run(rows[layer.path], run)
        for layer, run in zip(calibration.layers, calibration.steps_run, strict=True)
    }
    made_from = {
        name if name == CARRIED_OVER else f"calibration {name}": text
        for name, text in calibration.provenance.items()
    }
    are_known = calibration.provenance.get(TIMESTEPS) != INTERPOLATED
    return Schedule(
        num_steps=calibration.num_steps,
        rows=rows,
        layers=calibration.layers,
        model=calibration.model,
        solver=calibration.solver,
        timesteps=calibration.timesteps if are_known else None,
        noise_levels=calibration.noise_levels,
        compute=compute_fraction(rows, calibration.layers, calibration.total_macs),
        provenance={**made_from, **{name: str(value) for name, value in settings.items()}},
    )


def _from_first_run(row: Row, run: range) -> Row:
    computed = enumerate(row.computed)
    return replace(row, computed=tuple(x or t not in run[1:] for t, x in computed))
