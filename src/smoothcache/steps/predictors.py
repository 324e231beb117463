"""Predictors, which make reused values from computed ones; each is one entry of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Axis = Literal["step", "log_snr", "angle"]
_MIN_NOISE = 1e-4  # clips noise levels 0 and 1, whose log-SNR is infinite


@dataclass(frozen=True)
class Predictor:
    """A polynomial through the last ``order + 1`` computed values of a layer.

    Attributes:
        name: Name in schedules.
        order: Degree of the polynomial; 0 holds the last value. The degree is lower until
            ``order + 1`` values have been computed.
        axis: Variable of the polynomial: the step index, or the step's noise level as log-SNR or as
            the angle whose tangent is noise over signal.
    """

    name: str
    order: int
    axis: Axis = "step"

    @property
    def needs_noise_levels(self) -> bool:
        """Whether the predictor requires noise levels."""
        return self.axis != "step"


PREDICTORS: Mapping[str, Predictor] = MappingProxyType(
    {
        predictor.name: predictor
        for predictor in (
            Predictor("hold", 0),
            Predictor("taylor", 1),
            Predictor("taylor2", 2),
            Predictor("taylor-log-snr", 1, "log_snr"),
            Predictor("taylor2-log-snr", 2, "log_snr"),
            Predictor("taylor-angle", 1, "angle"),
            Predictor("taylor2-angle", 2, "angle"),
        )
    }
)
"""All predictors, by name."""
FITTED, POLYNOMIAL = "fitted", "taylor2"
"""The predictor with fitted weights per step, and its replacement if the weights do not apply."""


def axis_positions(axis: Axis, steps: int, noise_levels: Sequence[float] | None) -> list[float]:
    """Returns the position of each step on an axis; [steps].

    >>> axis_positions("step", 3, None)
    [0.0, 1.0, 2.0]
    >>> [round(x, 2) for x in axis_positions("angle", 3, (1.0, 0.5, 0.0))]
    [1.57, 0.79, 0.0]

    Args:
        axis: Axis of a predictor.
        steps: Number of steps.
        noise_levels: sigma / (alpha + sigma) of each step, in [0, 1]; required unless axis is
            "step".
    """
    if axis == "step" or noise_levels is None:
        return [float(step) for step in range(steps)]
    if axis == "angle":
        return [math.atan2(noise, 1 - noise) for noise in noise_levels]
    clipped = [min(max(noise, _MIN_NOISE), 1 - _MIN_NOISE) for noise in noise_levels]
    return [2 * math.log((1 - noise) / noise) for noise in clipped]


def extrapolation_weights(known: Sequence[float], at: float, gain: float = 1.0) -> list[float]:
    """Returns the Lagrange weights of values at ``known`` for an extrapolation to ``at``.

    If positions coincide, only the newest is used and the degree decreases by one for each other.
    That happens on the log-SNR axis where noise levels are clipped.

    Example:
        >>> extrapolation_weights([0, 2], at=3)
        [-0.5, 1.5]
        >>> extrapolation_weights([0, 2], at=3, gain=2)
        [-1.0, 2.0]
        >>> extrapolation_weights([0, 2, 2], at=3)
        [-0.5, 0.0, 1.5]

    Args:
        known: Positions of the computed values, the newest last.
        at: Position of the extrapolation.
        gain: Fraction of the change since the newest value; 1 gives the polynomial, 0 holds.

    Returns:
        Weights that sum to 1.
    """
    weights = [0.0] * len(known)
    distinct = [i for i, here in enumerate(known) if not _is_close_to_any(here, known[i + 1 :])]
    for i in distinct:
        others = (known[j] for j in distinct if j != i)
        weights[i] = math.prod((at - other) / (known[i] - other) for other in others)
    if gain == 1:
        return weights
    older = [gain * weight for weight in weights[:-1]]
    return [*older, 1 - sum(older)]


def _is_close_to_any(here: float, others: Sequence[float]) -> bool:
    return any(math.isclose(here, other, rel_tol=1e-9, abs_tol=1e-9) for other in others)


def last_uses(computed: Sequence[bool], order: int) -> list[int | None]:
    """Returns, for each step, the last step that reuses its value; None if none does.

    A value is used until more than ``order`` newer values have been computed. Steps planned for
    reuse have an entry too, in case they must be computed.

    Example:
        >>> last_uses([True, False, False, True, True], order=0)
        [2, 2, None, None, None]
    """
    return [_last_use(computed, order, step) for step in range(len(computed))]


def _last_use(computed: Sequence[bool], order: int, step: int) -> int | None:
    last, newer = None, 0
    for later in range(step + 1, len(computed)):
        newer += computed[later]
        if newer > order:
            break
        if not computed[later]:
            last = later
    return last


def planned_sources(computed: Sequence[bool], step: int, count: int) -> tuple[int, ...]:
    """Returns the last ``count`` computed steps before a step, the newest last.

    >>> planned_sources([True, False, True, False], step=3, count=2)
    (0, 2)
    """
    return tuple([at for at in range(step) if computed[at]][-count:])
