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
    """The output of a layer at one step, taken apart.

    Attributes:
        step: At which it was computed.
        last_use: The last step that reuses it.
        leaves: What is kept of each leaf: a tensor, a difference, or a tensor in host memory.
        nbytes: Bytes of the tensors among them.
        rebuild: Puts leaves together to an output.
        swapped: Of a block, in what order it returns its streams.
        dtypes: Of the leaves that were returned.
        form: Shapes and dtypes of the tensors that the layer was given.
        residual: Whether the leaves are what a block adds to its inputs.
        sources: The inputs that the leaves add to; of a block not known.
        into: The input, by its number, that a leaf is and was written into.
        is_plain: Whether it is one tensor of floats on its device, returned as it is predicted.
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
        """The leaves, on their device."""
        return [leaf.fetch() if isinstance(leaf, Parked) else leaf for leaf in self.leaves]

    def output(self, values: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a reuse returns.

        Args:
            values: In place of the leaves, predicted.
            args: What the layer is given now; differences are added to it.
            kwargs: The same, by keyword.
        """
        if self.residual or self.sources:
            inputs = float_tensors((args, kwargs))
            if self.residual:
                bases = bases_of(values, inputs, self.swapped)
            else:
                bases = bases_at(self.sources, inputs, values)
            values = [plus(*given) for given in zip(values, bases, self.dtypes, strict=True)]
        return self.rebuild(written_into(self.into, values, args, kwargs))

    def prefetch(self) -> None:
        """Begins to bring the leaves to their device."""
        for leaf in self.leaves:
            if isinstance(leaf, Parked):
                leaf.prefetch()


class KeptValues:
    """The last values of each use of a layer in each branch, for as long as they are of use.

    Args:
        num_steps: Steps of a generation.
        order: One value more than this is kept for each place.
        tally: Counts the bytes.

    Attributes:
        of: Branch and use -> values, the oldest first.
    """

    def __init__(self, num_steps: int, order: int, tally: Tally) -> None:
        self.of: dict[Place, list[KeptValue]] = {}
        self._num_steps = num_steps
        self._order = order
        self._tally = tally
        self._spent_after = num_steps  # every value is of use up to this step

    def add(self, place: Place, value: KeptValue) -> None:
        """Keeps a value, and drops what it replaces."""
        history = self.of.setdefault(place, [])
        if history and history[-1].form != value.form:  # no polynomial goes through both
            self._tally.hold(-sum(old.nbytes for old in history))
            history.clear()
        history.append(value)
        self._spent_after = min(self._spent_after, value.last_use)
        self._tally.hold(value.nbytes)
        if len(history) > self._order + 1:
            self._tally.hold(-history.pop(0).nbytes)

    def take(self, place: Place) -> KeptValue:
        """Removes the values of a place and returns the oldest."""
        history = self.of.pop(place)
        for kept in history:
            self._tally.held_bytes -= kept.nbytes
        if not self.of:
            self._spent_after = self._num_steps
        return history[0]

    def release_used(self, place: Place, step: int) -> None:
        """Drops the values of a place whose last use is at a step, after it."""
        history = self.of[place]
        while history and history[0].last_use <= step:  # an older one is never of use longer
            self._tally.held_bytes -= history.pop(0).nbytes
        if not history:
            del self.of[place]

    def expire(self, step: int) -> None:
        """Drops what is of no use from a step on."""
        if self.of and step > self._spent_after:
            self._drop(lambda place, kept: kept.last_use < step)
            left = [kept.last_use for history in self.of.values() for kept in history]
            self._spent_after = min(left, default=self._num_steps)

    def forget(self, branch: int | None = None) -> None:
        """Drops all values, or those of one branch."""
        self._drop(lambda place, kept: branch is None or place[0] == branch)

    def _drop(self, is_spent: Callable[[Place, KeptValue], bool]) -> None:
        for place, history in list(self.of.items()):
            left = [kept for kept in history if not is_spent(place, kept)]
            if len(left) < len(history):
                kept_bytes = sum(kept.nbytes for kept in left)
                self._tally.hold(kept_bytes - sum(kept.nbytes for kept in history))
            if left:
                self.of[place] = left
            else:
                del self.of[place]
