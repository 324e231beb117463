"""FORA, or static caching: compute every n-th step, for all layers."""

from __future__ import annotations

from ..calibration.curves import Calibration
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from ._assemble import assemble


def plan_uniform(
    calibration: Calibration, *, interval: int, predictor: str = "hold", last: bool = False
) -> Schedule:
    """Plans like ``Schedule.uniform`` for the calibrated layers, with the expected cost.

    Source: Selvaraju et al., "FORA", arXiv 2407.01425; ``predictor`` is our addition.

    Args:
        calibration: Source of the layers, their costs and the number of steps; errors are unused.
        interval: 1 computes everything; the number of steps or more computes only step 0.
        predictor: Name of a predictor in ``PREDICTORS``.
        last: Whether to compute the last step as well, as the published schedules do.

    Returns:
        A schedule bound to the calibrated layers, with its expected ``compute``.

    Raises:
        InvalidArgumentError: If an argument is invalid.

    Example:
        >>> import numpy as np
        >>> from smoothcache import CacheLayer, Calibration
        >>> layer = CacheLayer("blocks.0.ff", kind="ffn", block="blocks.0", macs=60)
        >>> errors = np.array([[[[np.nan, 0.5, 0.25]]]])
        >>> calibration = Calibration((layer,), errors, total_macs=80, timesteps=(9.0, 5.0, 1.0))
        >>> plan_uniform(calibration, interval=2).table()
        array([[ True, False,  True]])
    """
    row = Row.uniform(calibration.num_steps, interval, predictor=predictor, last=last)
    rows = {layer.path: row for layer in calibration.layers}
    settings = {"interval": interval, "predictor": predictor, "last": last}
    return assemble(calibration, rows, {"planner": "uniform", **settings})
