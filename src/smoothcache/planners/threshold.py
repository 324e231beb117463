"""SmoothCache: reuse a layer for as long as its measured error stays below a threshold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from ..calibration.curves import Calibration
from ..calibration.statistics import FloatArray
from ..checks import check_count, check_number
from ..errors import InvalidArgumentError
from ..layers.layer import CacheLayer
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from ..steps.resample import CARRIED_OVER, as_timesteps
from ._assemble import assemble
from ._few_patterns import with_few_patterns
from ._within_memory import within_bytes


def plan(
    calibration: Calibration,
    *,
    alpha: float,
    per: Literal["kind", "block"] = "kind",
    max_gap: int | None = None,
    predictor: str = "hold",
    patterns: int | None = None,
    max_bytes: int | None = None,
    num_steps: int | None = None,
    timesteps: Iterable[float] | None = None,
) -> Schedule:
    """Plans with one threshold for the whole model, as in the paper.

    Source: Liu et al., "SmoothCache", arXiv 2411.10510, section 3. The defaults follow the paper:
    E(t, k) is averaged over samples and over all blocks of a kind, and compared with alpha.
    ``per="block"`` and predictors other than "hold" are additions. The calibration measures the
    error of "hold"; with other predictors, alpha controls the cost but does not bound an error.

    >>> from smoothcache.layers import CacheLayer
    >>> layer = CacheLayer("blocks.0.attn", kind="self_attn", block="blocks.0", macs=50)
    >>> errors = np.array([[[[np.nan, 0.1, 0.2, 0.1]]]])
    >>> calibration = Calibration((layer,), errors, total_macs=50, timesteps=(9, 6, 3, 0))
    >>> plan(calibration, alpha=0.15).table()
    array([[ True, False,  True,  True]])

    Args:
        calibration: Measured error curves.
        alpha: Upper bound of the relative L1 error of a reuse; 0 computes everything.
        per: "kind" uses one row for all layers of a kind, "block" one row per layer.
        max_gap: Largest number of consecutive reuses (k_max in the paper); by default the largest
            measured gap.
        predictor: Name of a predictor in ``PREDICTORS``.
        patterns: Largest number of distinct steps (sets of layers that are computed together), each
            of which ``torch.compile`` turns into a graph. More layers are computed, and errors stay
            below alpha.
        max_bytes: Largest number of bytes that a run keeps, compiled or not, at the calibrated
            batch size and dtype. The layers that save the fewest MACs per byte are computed.
        num_steps: Number of steps to plan for, with error curves interpolated by
            ``Calibration.resample``, not measured; None for the calibrated number.
        timesteps: The model's own timestep at each of these steps, in running order [num_steps];
            by default, positions in the calibration are spaced evenly.

    Returns:
        A schedule bound to the calibrated layers, with its expected ``compute``.

    Raises:
        InvalidArgumentError: If an argument is invalid, or num_steps is so small that the measured
            gaps do not reach the next step.
    """
    alpha = check_number("alpha", alpha)
    if alpha < 0:
        raise InvalidArgumentError(f"alpha must not be negative, got {alpha}.")
    if per not in ("kind", "block"):
        raise InvalidArgumentError(f"per must be 'kind' or 'block', got {per!r}.")
    if timesteps is not None:
        timesteps = as_timesteps(timesteps)
        num_steps = len(timesteps) if num_steps is None else num_steps
    if num_steps is not None:
        calibration = calibration.resample(num_steps, timesteps=timesteps)
    max_gap = calibration.max_gap if max_gap is None else check_count("max_gap", max_gap, least=1)
    if max_gap > calibration.max_gap:
        is_carried_over = CARRIED_OVER in calibration.provenance
        suffix = f" of {calibration.num_steps} steps" if is_carried_over else ""
        raise InvalidArgumentError(
            f"max_gap is {max_gap}, but only gaps up to {calibration.max_gap}{suffix} were "
            "measured. Calibrate again with a larger max_gap, or plan with a smaller one."
        )

    units = calibration.kinds if per == "kind" else [layer.path for layer in calibration.layers]
    errors = [
        np.stack(
            [calibration.curve(gap=gap, **{_BY[per]: u}).mean for gap in range(1, max_gap + 1)]
        )
        for u in units
    ]
    computed = np.array([threshold_mask(of_unit, alpha) for of_unit in errors])
    if patterns is not None:
        members = [[x.macs or 1 for x in calibration.layers if _unit(x, per) == u] for u in units]
        costs = [sum(macs) for macs in members]
        most = check_count("patterns", patterns, least=1)
        computed = with_few_patterns(computed, errors, alpha, costs, most)
    row_of = {
        u: Row(tuple(map(bool, mask)), predictor) for u, mask in zip(units, computed, strict=True)
    }
    rows = {layer.path: row_of[_unit(layer, per)] for layer in calibration.layers}
    settings = {"alpha": alpha, "per": per, "max_gap": max_gap, "predictor": predictor}
    if max_bytes is not None:
        most = check_count("max_bytes", max_bytes, least=0)
        rows = within_bytes(rows, calibration.layers, most)
        settings["max_bytes"] = most
    if patterns is not None:
        settings["patterns"] = patterns
    return assemble(calibration, rows, {"planner": "threshold", **settings})


_BY = {"kind": "kind", "block": "layer"}


def _unit(layer: CacheLayer, per: str) -> str:
    """Returns the unit of a layer that shares one row: its kind, or the layer itself."""
    return layer.kind if per == "kind" else layer.path


def threshold_mask(errors: FloatArray, alpha: float) -> tuple[bool, ...]:
    """Returns which steps are computed: after each, reuse continues while errors are below alpha.

    Args:
        errors: errors[k - 1, t] is the error E(t, k) at step t of reusing the output computed k
            steps earlier; [max_gap, steps].
        alpha: The threshold.

    Returns:
        True where a step is computed, which includes the first and last step; [steps].
    """
    max_gap, num_steps = errors.shape
    last = num_steps - 1
    computed = [True] * num_steps
    step = 0
    while step < last:
        gap = 1
        while gap <= max_gap and step + gap < last and errors[gap - 1, step + gap] < alpha:
            computed[step + gap] = False
            gap += 1
        step += gap
    return tuple(computed)
