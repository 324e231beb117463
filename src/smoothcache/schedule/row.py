"""One layer's row of a schedule: which steps compute it, and how the others predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ..checks import check_count, check_number, listed
from ..errors import InvalidArgumentError
from ..steps.predictors import PREDICTORS


@dataclass(frozen=True)
class Row:
    """What one layer does at every step.

    >>> Row(computed=(True, False, False)).computed
    (True, False, False)

    Attributes:
        computed: True where the layer is computed, False where it is reused; [steps].
        predictor: How a reused value is made from computed ones, a name in ``PREDICTORS``.
        gains: How much of the predicted change since the last computed value is taken at each
            reused step, 1 at computed ones; [steps]. None for 1 everywhere. A search fits them.

    Raises:
        InvalidArgumentError: If step 0 is not computed, the predictor is unknown, or the gains
            are not as many finite numbers.
    """

    computed: tuple[bool, ...]
    predictor: str = "hold"
    gains: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        computed = tuple(self.computed)
        if not all(isinstance(step, bool | np.bool_) for step in computed):
            raise InvalidArgumentError(f"a row says True or False at each step, got {computed}.")
        if not computed or not computed[0]:
            raise InvalidArgumentError("step 0 must be computed: there is nothing to reuse yet.")
        if self.predictor not in PREDICTORS:
            raise InvalidArgumentError(
                f"the predictor {self.predictor!r} is unknown; there are {listed(PREDICTORS, 20)}."
            )
        object.__setattr__(self, "computed", tuple(bool(step) for step in computed))
        object.__setattr__(self, "gains", _check_gains(self.gains, self.computed))

    def moved(self, computed: tuple[bool, ...]) -> Row:
        """The same with other computed steps; the gains go along, gap by gap.

        >>> row = Row((True, False, True, False), "taylor", (1, 0.5, 1, 2))
        >>> row.moved((True, True, False, False))
        Row(computed=(True, True, False, False), predictor='taylor', gains=(1.0, 1.0, 2.0, 2.0))

        Args:
            computed: True where the layer is computed; [steps], as many as before.

        Returns:
            A row with the same predictor.
        """
        if self.gains is None:
            return Row(computed, self.predictor)
        of_gap = [1.0] * len(computed)
        for gap, gain in zip(accumulate(self.computed), self.gains, strict=True):
            of_gap[gap - 1] = gain  # the last of the gap, which is a reused step if there is one
        gaps = accumulate(computed)
        return Row(computed, self.predictor, tuple(of_gap[gap - 1] for gap in gaps))

    @classmethod
    def uniform(
        cls, num_steps: int, interval: int, *, predictor: str = "hold", last: bool = False
    ) -> Row:
        """Computes the steps 0, interval, 2 interval, ... and, with ``last``, the last one.

        >>> Row.uniform(6, 2, last=True).computed
        (True, False, True, False, True, True)

        Args:
            num_steps: Solver steps of a generation.
            interval: 1 computes every step; num_steps or more computes step 0 alone.
            predictor: How reused values are made, a name in ``PREDICTORS``.
            last: Compute the last step as well.

        Returns:
            The row of one layer.

        Raises:
            InvalidArgumentError: If a number is not an integer of at least 1.
        """
        num_steps = check_count("num_steps", num_steps, least=1)
        interval = check_count("interval", interval, least=1)
        steps = range(num_steps)
        return cls(tuple(x % interval == 0 or (last and x == steps[-1]) for x in steps), predictor)


def _check_gains(gains: Sequence[float] | None, computed: Sequence[bool]) -> Any:
    if gains is None:
        return None
    if len(gains) != len(computed):
        raise InvalidArgumentError(f"{len(gains)} gains for {len(computed)} steps.")
    values = [check_number("a gain", gain) for gain in gains]
    values = [1.0 if done else gain for gain, done in zip(values, computed, strict=True)]
    return None if set(values) == {1.0} else tuple(values)
