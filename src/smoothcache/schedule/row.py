"""One layer's row of a schedule: which steps compute it, and how the others predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ..checks import check_count, check_number, listed
from ..errors import InvalidArgumentError
from ..steps.predictors import FITTED, POLYNOMIAL, PREDICTORS, Axis


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
        weights: Of the predictor "fitted", the weights of the last computed values at each reused
            step, the newest first, and none at computed steps; [steps]. They need not sum to 1.
        branch_weights: The same for each further guidance branch, if branches have weights of
            their own; ``weights`` are those of the first one then.
        batch_parts: In how many equal parts the batch of one call holds branches.

    Raises:
        InvalidArgumentError: If step 0 is not computed, the predictor is unknown, the gains are
            not as many finite numbers, or the weights are not such of values that are computed.
    """

    computed: tuple[bool, ...]
    predictor: str = "hold"
    gains: tuple[float, ...] | None = None
    weights: tuple[tuple[float, ...], ...] | None = None
    branch_weights: tuple[tuple[tuple[float, ...], ...], ...] = ()
    batch_parts: int = 1

    def __post_init__(self) -> None:
        computed = tuple(self.computed)
        if not all(isinstance(step, bool | np.bool_) for step in computed):
            raise InvalidArgumentError(f"a row says True or False at each step, got {computed}.")
        if not computed or not computed[0]:
            raise InvalidArgumentError("step 0 must be computed: there is nothing to reuse yet.")
        if self.predictor not in (*PREDICTORS, FITTED):
            known = listed((*PREDICTORS, FITTED), 20)
            raise InvalidArgumentError(
                f"the predictor {self.predictor!r} is unknown; there are {known}."
            )
        object.__setattr__(self, "computed", tuple(bool(step) for step in computed))
        object.__setattr__(self, "gains", _check_gains(self.gains, self.computed))
        _refuse_weights_without_fit(self)
        if self.weights is not None:
            object.__setattr__(self, "weights", check_weights(self.weights, self.computed))
        object.__setattr__(self, "branch_weights", _check_branches(self))

    @property
    def weight_tables(self) -> tuple[tuple[tuple[float, ...], ...], ...]:
        """The weights of every branch that has its own, or those of all; none without weights."""
        return () if self.weights is None else (self.weights, *self.branch_weights)

    @property
    def order(self) -> int:
        """How many computed values a reuse combines, less one."""
        if self.weights is None:
            return PREDICTORS[self.predictor].order
        return max(2, *map(len, self.weights)) - 1

    @property
    def axis(self) -> Axis:
        """What the predictor's polynomial runs over."""
        return "step" if self.weights is not None else PREDICTORS[self.predictor].axis

    def moved(self, computed: tuple[bool, ...]) -> Row:
        """The same with other computed steps; the gains go along, gap by gap.

        >>> row = Row((True, False, True, False), "taylor", (1, 0.5, 1, 2))
        >>> row.moved((True, True, False, False)).gains
        (1.0, 1.0, 2.0, 2.0)

        Args:
            computed: True where the layer is computed; [steps], as many as before.

        Returns:
            A row with the same predictor.
        """
        if self.gains is None:
            return Row(computed, self.predictor if self.weights is None else POLYNOMIAL)
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


def _refuse_weights_without_fit(row: Row) -> None:
    is_fitted = row.predictor == FITTED
    if is_fitted != (row.weights is not None):
        raise InvalidArgumentError(
            f"the predictor {FITTED!r} needs weights, and no other has any; got "
            f"{row.predictor!r} {'with' if row.weights is not None else 'without'} weights."
        )
    if is_fitted and row.gains is not None:
        raise InvalidArgumentError(f"the predictor {FITTED!r} has weights in place of gains.")


def _check_branches(row: Row) -> tuple[tuple[tuple[float, ...], ...], ...]:
    parts = check_count("batch_parts", row.batch_parts, least=1)
    tables = tuple(check_weights(table, row.computed) for table in row.branch_weights)
    if (tables or parts > 1) and row.weights is None:
        raise InvalidArgumentError("branches have weights of their own, but there are no weights.")
    if (1 + len(tables)) % parts:
        raise InvalidArgumentError(
            f"weights of {1 + len(tables)} branches, which cannot be {parts} in each call."
        )
    for table in tables:
        if [len(x) for x in table] != [len(x) for x in row.weights or ()]:
            raise InvalidArgumentError("the branches have different numbers of weights.")
    return tables


def check_weights(
    weights: Sequence[Sequence[float]], computed: Sequence[bool]
) -> tuple[tuple[float, ...], ...]:
    """The weights of every step, if each has as many as there can be.

    Raises:
        InvalidArgumentError: If there are too many or too few, or one is not finite.
    """
    if len(weights) != len(computed):
        raise InvalidArgumentError(f"weights for {len(weights)} of {len(computed)} steps.")
    checked, known = [], 0
    for step, (given, is_computed) in enumerate(zip(weights, computed, strict=True)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise InvalidArgumentError(f"the weights of step {step} are no list, got {given!r}.")
        most = 0 if is_computed else known
        if len(given) > most or (not is_computed and not given):
            needs = f"reused and needs 1 to {most}, one for each of the last computed values"
            raise InvalidArgumentError(
                f"step {step} has {len(given)} weights; it is "
                f"{'computed and has none' if is_computed else needs}."
            )
        checked.append(tuple(check_number(f"a weight of step {step}", x) for x in given))
        known += is_computed
    return tuple(checked)
