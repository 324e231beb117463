"""Learning-to-Cache: plans a schedule from trained routers."""

from __future__ import annotations

import numpy as np

from ..checks import check_number
from ..errors import InvalidArgumentError
from ..schedule.expected_cost import compute_fraction
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from ..steps.predictors import PREDICTORS
from .routers import Routers


def plan_learned(
    routers: Routers,
    *,
    threshold: float | None = None,
    compute: float | None = None,
    predictor: str | None = None,
) -> Schedule:
    """Plans from trained routers: a layer is computed if its router is above a threshold.

    This is not training-free: ``learn_routers`` trains the routers with gradients through the
    model.

    Source: Ma et al., "Learning-to-Cache", arXiv 2406.01733. ``compute``, which determines the
    threshold from a budget, is an addition.

    >>> from smoothcache.layers import CacheLayer
    >>> layer = CacheLayer("blocks.0.attn", kind="self_attn", block="blocks.0", macs=50)
    >>> values = np.array([[1, 0.2, 1, 0.7]])
    >>> routers = Routers((layer,), values, 2, timesteps=(9, 6, 3, 0), total_macs=50)
    >>> plan_learned(routers, threshold=0.5).table()
    array([[ True, False,  True,  True]])
    >>> plan_learned(routers, compute=0.5).table()
    array([[ True, False,  True, False]])

    Args:
        routers: Trained routers, from ``learn_routers``.
        threshold: Largest beta at which a layer is reused, in [0, 1).
        compute: Budget instead of a threshold: the smallest threshold is used whose schedule costs
            at most this fraction of the uncached MACs, in (0, 1].
        predictor: Name of a predictor in ``PREDICTORS``; by default the predictor used in training.

    Returns:
        A schedule bound to the layers of the routers.

    Raises:
        InvalidArgumentError: If not exactly one of threshold and compute is given, or an argument
            is invalid; if the budget is too small; or if the costs of layers are unknown.
    """
    if (threshold is None) == (compute is None):
        raise InvalidArgumentError("pass exactly one of threshold and compute.")
    if predictor is not None and predictor not in PREDICTORS:
        raise InvalidArgumentError(
            f"the predictor {predictor!r} is unknown; known predictors are {', '.join(PREDICTORS)}."
        )
    if threshold is not None:
        if not 0 <= check_number("threshold", threshold) < 1:
            raise InvalidArgumentError(f"threshold must be in [0, 1), got {threshold}.")
        return _at(routers, threshold, predictor)
    if not 0 < check_number("compute", compute) <= 1:
        raise InvalidArgumentError(f"compute must be in (0, 1], got {compute}.")
    return _within(routers, float(compute or 0), predictor)


def _within(routers: Routers, budget: float, predictor: str | None) -> Schedule:
    """Returns the schedule with the largest compute within a budget."""
    thresholds = np.unique([0.0, *routers.values[routers.values < 1]]).tolist()
    schedules = (_at(routers, threshold, predictor) for threshold in thresholds)
    least = 1.0
    for schedule in schedules:
        if schedule.compute is None:
            raise InvalidArgumentError(
                "a budget needs the costs of layers, which are unknown for these routers; pass a "
                "threshold, or learn routers from a calibration with MACs."
            )
        if schedule.compute <= budget:
            return schedule
        least = schedule.compute
    raise InvalidArgumentError(
        f"no threshold is as cheap as {budget:.3f} of the uncached MACs; the smallest possible "
        f"fraction is {least:.3f}. Learn routers with an interval above {routers.interval}."
    )


def _at(routers: Routers, threshold: float, predictor: str | None) -> Schedule:
    predictor = predictor or routers.predictor
    is_computed = (routers.values > threshold).tolist()
    rows = {
        layer.path: Row(tuple(row), predictor)
        for layer, row in zip(routers.layers, is_computed, strict=True)
    }
    return Schedule(
        num_steps=routers.num_steps,
        rows=rows,
        layers=routers.layers,
        model=routers.model,
        solver=routers.solver,
        timesteps=routers.timesteps,
        compute=compute_fraction(rows, routers.layers, routers.total_macs),
        provenance={
            **{f"routers {name}": text for name, text in routers.provenance.items()},
            "planner": "learned (not training-free)",
            "interval": str(routers.interval),
            "threshold": f"{threshold:.6g}",
            "predictor": predictor,
        },
    )
