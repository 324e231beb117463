"""The values that a layer keeps between calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.outputs import float_tensors, written_into
from ..model.residuals import bases_at, bases_of, plus
from ..tracking.branches import Place
from .host_memory import Parked
from .summary import Tally


@dataclass(slots=True)
class KeptValue:
    """The output of a layer at one step, flattened to leaves.

    Attributes:
        step: Step at which it was computed.
        last_use: Last step that reuses it.
        leaves: Kept value of each leaf: a tensor, a difference, or a tensor in host memory.
        nbytes: Size of the tensors among the leaves in bytes.
        rebuild: Function that rebuilds an output from leaves.
        swapped: Whether a block returns its two streams in swapped order, as a tensor.
        dtypes: Data types of the returned leaves.
        form: Shapes and dtypes of the layer's input tensors.
        residual: Whether the leaves are the differences that a block adds to its inputs.
        sources: Index of the input that each leaf adds to; empty for blocks.
        into: Index of the input that was modified in place and returned as this leaf.
        is_plain: Whether the output is a single floating-point tensor on its device, to which
            nothing is added at reuse.
    """

    step: int
    last_use: int
    leaves: list[Any]
    nbytes: int
    rebuild: Callable[[list[Any]], Any]
    swapped: Tensor | None
    dtypes: list[torch.dtype | None]
    form: list[Any]
    residual: bool
    sources: tuple[int | None, ...]
    into: list[int | None]
    is_plain: bool

    def fetched(self) -> list[Any]:
        """Returns the leaves on their device."""
        return [leaf.fetch() if isinstance(leaf, Parked) else leaf for leaf in self.leaves]

    def output(self, values: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the output of a reuse.

        Args:
            values: Predicted values of the leaves.
            args: Positional inputs of this call; differences are added to them.
            kwargs: Keyword inputs of this call.
        """
        if self.residual or self.sources:
            inputs = float_tensors((args, kwargs))
            if self.residual:
                bases = bases_of(values, inputs, self.swapped)
            else:
                bases = bases_at(self.sources, inputs, values)
            values = [plus(*parts) for parts in zip(values, bases, self.dtypes, strict=True)]
        return self.rebuild(written_into(self.into, values, args, kwargs))

    def prefetch(self) -> None:
        """Starts copying the leaves to their device."""
        for leaf in self.leaves:
            if isinstance(leaf, Parked):
                leaf.prefetch()


class KeptValues:
    """The last values of each use of a layer in each branch, freed after their last reuse.

    Args:
        num_steps: Number of steps of a generation.
        order: Degree of the predictor's polynomial; ``order + 1`` values are kept per place.
        tally: Counters of the run.

    Attributes:
        of: Values by (branch, use), the oldest first.
    """

    def __init__(self, num_steps: int, order: int, tally: Tally) -> None:
        self.of: dict[Place, list[KeptValue]] = {}
        self._num_steps = num_steps
        self._order = order
        self._tally = tally
        self._expires_after = num_steps  # no value expires before this step

    def add(self, place: Place, value: KeptValue) -> None:
        """Adds a value and drops the value that it replaces."""
        history = self.of.setdefault(place, [])
        if history and history[-1].form != value.form:  # values of two shapes cannot be combined
            self._tally.hold(-sum(old.nbytes for old in history))
            history.clear()
        history.append(value)
        self._expires_after = min(self._expires_after, value.last_use)
        self._tally.hold(value.nbytes)
        if len(history) > self._order + 1:
            self._tally.hold(-history.pop(0).nbytes)

    def take(self, place: Place) -> KeptValue:
        """Removes the values of a place and returns the oldest."""
        history = self.of.pop(place)
        for kept in history:
            self._tally.held_bytes -= kept.nbytes
        if not self.of:
            self._expires_after = self._num_steps
        return history[0]

    def release_used(self, place: Place, step: int) -> None:
        """Drops the values of a place whose last use was at this step."""
        history = self.of[place]
        while history and history[0].last_use <= step:  # older values never expire later
            self._tally.held_bytes -= history.pop(0).nbytes
        if not history:
            del self.of[place]

    def expire(self, step: int) -> None:
        """Drops values that are unused from a step on."""
        if self.of and step > self._expires_after:
            self._drop(lambda place, kept: kept.last_use < step)
            left = [kept.last_use for history in self.of.values() for kept in history]
            self._expires_after = min(left, default=self._num_steps)

    def forget(self, branch: int | None = None) -> None:
        """Drops the values of one branch, or all values."""
        self._drop(lambda place, kept: branch is None or place[0] == branch)

    def _drop(self, is_unused: Callable[[Place, KeptValue], bool]) -> None:
        for place, history in list(self.of.items()):
            left = [kept for kept in history if not is_unused(place, kept)]
            if len(left) < len(history):
                kept_bytes = sum(kept.nbytes for kept in left)
                self._tally.hold(kept_bytes - sum(kept.nbytes for kept in history))
            if left:
                self.of[place] = left
            else:
                del self.of[place]
