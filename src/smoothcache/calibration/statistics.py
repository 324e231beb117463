"""Means over samples and their confidence intervals."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@cache
def student_t_95(degrees: int) -> float:
    """Returns the half-width of a two-sided 95 % confidence interval, in standard errors.

    With t = sqrt(n) tan(a), the density of Student's t with n degrees of freedom is proportional
    to cos(a)^(n - 1), which is integrated up to 95 %.

    >>> round(student_t_95(9), 3)
    2.262
    """
    angle = np.linspace(0, np.pi / 2, 200_001)
    middle = (angle[1:] + angle[:-1]) / 2
    within = np.concatenate([[0.0], np.cumsum(np.cos(middle) ** (degrees - 1))])
    return float(np.sqrt(degrees) * np.tan(np.interp(0.95 * within[-1], within, angle)))


def mean_of_known(errors: FloatArray) -> FloatArray:
    """Returns the mean over layers that ran; [samples, layers, steps] to [samples, steps]."""
    known = ~np.isnan(errors)
    count = known.sum(axis=1)
    total = np.where(known, errors, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
