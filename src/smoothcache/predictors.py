"""How a reused value is made from computed ones; a predictor is one entry of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Predictor:
    """A polynomial through the last ``order + 1`` computed values of a layer.

    Attributes:
        name: What a schedule calls it.
        order: Degree of the polynomial; 0 holds the last value. While fewer values than that
            have been computed, the degree is lower.
    """

    name: str
    order: int


PREDICTORS: Mapping[str, Predictor] = MappingProxyType(
    {
        predictor.name: predictor
        for predictor in (Predictor("hold", 0), Predictor("taylor", 1), Predictor("taylor2", 2))
    }
)


def extrapolation_weights(steps: Sequence[int], at: int) -> list[float]:
    """Weights of the values at ``steps`` in their polynomial's value at step ``at`` (Lagrange).

    Example:
        >>> extrapolation_weights([0, 2], at=3)
        [-0.5, 1.5]
    """
    return [
        math.prod((at - other) / (step - other) for other in steps if other != step)
        for step in steps
    ]


def last_uses(computed: Sequence[bool], order: int) -> list[int | None]:
    """For each step, the last later step that reuses a value computed at it; None if none does.

    A value is in use while at most ``order`` further ones have been computed. Steps that are
    planned as reuse have an entry too: what is computed there after all is of use as long.

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
