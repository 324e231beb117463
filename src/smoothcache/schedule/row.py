"""One layer's row of a schedule: the steps that compute it, and the predictor for the others."""

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
    """Whether one layer is computed or reused at each step, and how reused values are predicted.

    >>> Row(computed=(True, False, False)).computed
    (True, False, False)

    Attributes:
        computed: True where the layer is computed, False where it is reused; [steps].
        predictor: Name of the predictor in ``PREDICTORS``, which makes reused values from computed
            ones.
        gains: Fraction of the predicted change since the last computed value that is applied at
            each reused step, 1 at computed steps; [steps]. None for 1 everywhere. A search fits
            them.
        weights: Weights of the last computed values at each reused step, the newest first, for the
            predictor "fitted"; empty at computed steps; [steps]. They need not sum to 1.
        branch_weights: Weights of each further guidance branch, if branches have separate weights;
            ``weights`` then belong to the first branch.
        batch_parts: Number of guidance branches in the batch of one call.

    Raises:
        InvalidArgumentError: If step 0 is not computed, the predictor is unknown, the gains are
            not one finite number per step, or the weights do not match the computed steps.
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
            raise InvalidArgumentError(
                f"computed must hold booleans, one per step, got {computed}."
            )
        if not computed or not computed[0]:
            raise InvalidArgumentError("step 0 must be computed: there is nothing to reuse yet.")
        if self.predictor not in (*PREDICTORS, FITTED):
            known = listed((*PREDICTORS, FITTED), 20)
            raise InvalidArgumentError(
                f"the predictor {self.predictor!r} is unknown; known predictors are {known}."
            )
        object.__setattr__(self, "computed", tuple(bool(step) for step in computed))
        object.__setattr__(self, "gains", _check_gains(self.gains, self.computed))
        _refuse_weights_without_fit(self)
        if self.weights is not None:
            object.__setattr__(self, "weights", check_weights(self.weights, self.computed))
        object.__setattr__(self, "branch_weights", _check_branches(self))

    @property
    def weight_tables(self) -> tuple[tuple[tuple[float, ...], ...], ...]:
        """The weights of every branch, or one table for all branches; empty without weights."""
        return () if self.weights is None else (self.weights, *self.branch_weights)

    @property
    def order(self) -> int:
        """Number of computed values that a reuse combines, minus one."""
        if self.weights is None:
            return PREDICTORS[self.predictor].order
        return max(2, *map(len, self.weights)) - 1

    @property
    def axis(self) -> Axis:
        """Variable of the predictor's polynomial."""
        return "step" if self.weights is not None else PREDICTORS[self.predictor].axis

    def moved(self, computed: tuple[bool, ...]) -> Row:
        """Returns the row with other computed steps; gains are carried over gap by gap.

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
            of_gap[gap - 1] = gain  # the gain of the last step of the gap
        gaps = accumulate(computed)
        return Row(computed, self.predictor, tuple(of_gap[gap - 1] for gap in gaps))

    @classmethod
    def uniform(
        cls, num_steps: int, interval: int, *, predictor: str = "hold", last: bool = False
    ) -> Row:
        """Computes the steps 0, interval, 2 interval, ... and, with ``last``, the last step.

        >>> Row.uniform(6, 2, last=True).computed
        (True, False, True, False, True, True)

        Args:
            num_steps: Number of solver steps.
            interval: 1 computes every step; num_steps or more computes only step 0.
            predictor: Name of a predictor in ``PREDICTORS``.
            last: Whether to compute the last step as well.

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
            f"the predictor {FITTED!r} requires weights, and other predictors take none; got "
            f"{row.predictor!r} {'with' if row.weights is not None else 'without'} weights."
        )
    if is_fitted and row.gains is not None:
        raise InvalidArgumentError(f"the predictor {FITTED!r} has weights in place of gains.")


def _check_branches(row: Row) -> tuple[tuple[tuple[float, ...], ...], ...]:
    parts = check_count("batch_parts", row.batch_parts, least=1)
    tables = tuple(check_weights(table, row.computed) for table in row.branch_weights)
    if (tables or parts > 1) and row.weights is None:
        raise InvalidArgumentError("branch_weights and batch_parts require weights.")
    if (1 + len(tables)) % parts:
        raise InvalidArgumentError(
            f"there are weights for {1 + len(tables)} branches, which is not a multiple of "
            f"batch_parts = {parts}."
        )
    for table in tables:
        if [len(x) for x in table] != [len(x) for x in row.weights or ()]:
            raise InvalidArgumentError("the branches have different numbers of weights.")
    return tables


def check_weights(
    weights: Sequence[Sequence[float]], computed: Sequence[bool]
) -> tuple[tuple[float, ...], ...]:
    """Returns the validated weights of every step.

    Raises:
        InvalidArgumentError: If there are too many or too few, or one is not finite.
    """
    if len(weights) != len(computed):
        raise InvalidArgumentError(f"weights for {len(weights)} steps, expected {len(computed)}.")
    checked, known = [], 0
    for step, (given, is_computed) in enumerate(zip(weights, computed, strict=True)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise InvalidArgumentError(f"the weights of step {step} must be a list, got {given!r}.")
        most = 0 if is_computed else known
        if len(given) > most or (not is_computed and not given):
            needs = f"reused and needs 1 to {most}, one per last computed value"
            raise InvalidArgumentError(
                f"step {step} has {len(given)} weights; it is "
                f"{'computed and takes none' if is_computed else needs}."
            )
        checked.append(tuple(check_number(f"a weight of step {step}", x) for x in given))
        known += is_computed
    return tuple(checked)
