"""What one call of a layer keeps where ``torch.compile`` traces it: tensors at fixed places.

Compiled code must not read what differs at every step, or it would be compiled anew at each. So
all that a graph sees of a layer is one flag, compute or reuse, and tensors: it copies what it
computes into the *slots*, newest first, and a reuse is a sum over all of them, with weights that
are tensors too. Everything else happens between the calls of the denoiser. The slots stay where
they are as long as shapes do, so CUDA graphs neither copy them nor overwrite them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ._outputs import (
    are_finite,
    are_swapped,
    bases_of,
    float_tensors,
    plus,
    taken_apart,
    tensors_in,
)
from .predictors import extrapolation_weights


class Output(Protocol):
    """An output that was computed, as it is kept."""

    leaves: list[Any]
    swapped: Tensor | None
    dtypes: list[torch.dtype | None]

    @property
    def rebuild(self) -> Callable[[list[Any]], Any]:
        """Puts leaves in the place of its own."""


class Slots:
    """Keeps the outputs of one use of a layer in one branch.

    Args:
        example: An output, for its form.
        shapes: Those of the tensors that the layer was given for it.
        order: Degree of the predictor's polynomial; one value more is kept.
        residual: Whether what is kept is what the layer adds to its inputs.

    Attributes:
        steps: The steps at which the values were computed, newest first; none if none is of use.
        reuses: Whether the next call reuses.
        is_misfit: Whether a call had tensors of other shapes, and kept nothing.
    """

    def __init__(
        self, example: Output, shapes: Sequence[torch.Size], order: int, *, residual: bool
    ) -> None:
        self._leaves = [_slots_for(leaf, order) for leaf in example.leaves]
        self._swapped = None if example.swapped is None else _slots_for(example.swapped, 0)
        self._rebuild = example.rebuild
        self._dtypes = example.dtypes
        self._order = order
        self._residual = residual
        self._like = _first_alike(shapes, example.leaves)
        self._weights: Tensor | None = None
        self._table: dict[tuple[int, ...], Tensor] = {}
        self.steps: list[int] = []
        self.reuses = self.is_misfit = False

    # ------------------------------------------------------------------------ inside of graphs

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._has_shapes_of(args, kwargs):
            self.is_misfit = True
            return forward(*args, **kwargs)
        if self.reuses:
            return self._predicted(args, kwargs)
        inputs: list[Tensor] = []
        if self._residual:  # copies, because the block may write into its input
            inputs = [x.detach().clone() for x in float_tensors((args, kwargs))]
        output = forward(*args, **kwargs)
        self._keep(output, inputs)
        return output

    def _has_shapes_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether what a layer is given is of the size of what was kept.

        Compares tensors and no numbers, so that graphs for any batch size stay possible.
        """
        if self._like is None:
            return True
        given, leaf = self._like
        tensors = tensors_in((args, kwargs))
        return given < len(tensors) and tensors[given].shape == self._leaves[leaf][0].shape

    def _keep(self, output: Any, inputs: list[Tensor]) -> None:
        leaves, _ = taken_apart(output)
        if len(leaves) != len(self._leaves):
            self.is_misfit = True
            return
        swapped = are_swapped(leaves, inputs)
        bases = bases_of(leaves, inputs, swapped)
        for slots, leaf, base in zip(self._leaves, leaves, bases, strict=True):
            if isinstance(leaf, Tensor):
                value = leaf.detach() if base is None else leaf.detach() - base
                if not isinstance(slots, tuple) or not _fits(slots[0], value):
                    self.is_misfit = True
                    return
                _push(slots, value)
        if swapped is not None and self._swapped is not None:
            _push(self._swapped, swapped)

    def _predicted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = [_combined(slots, self._weights) for slots in self._leaves]
        if self._residual:
            swapped = None if self._swapped is None else self._swapped[0]
            bases = bases_of(values, float_tensors((args, kwargs)), swapped)
            values = [
                plus(value, base, dtype)
                for value, base, dtype in zip(values, bases, self._dtypes, strict=True)
            ]
        return self._rebuild(values)

    # ----------------------------------------------------------------------- between the calls

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.nbytes for slot in self._all())

    def prepare(self, step: int, *, reuses: bool) -> None:
        """Says what the next call does."""
        self.reuses, self.is_misfit = reuses, False
        if reuses and self._order:
            self._weights = self._weights_at(step)

    def wrote(self, step: int) -> None:
        """Notes that the newest slots are of this step."""
        self.steps = [step, *self.steps][: self._order + 1]
        if len(self.steps) == 1:  # the others weigh nothing, but may hold no number at all
            self._fill()

    def fill(self, values: Sequence[Sequence[Any]]) -> None:
        """Copies the leaves of values into the slots, newest first."""
        with torch.inference_mode(mode=False), torch.no_grad():
            for index, slots in enumerate(self._leaves):
                if isinstance(slots, tuple):
                    for slot, leaves in zip(slots, values, strict=False):
                        slot.copy_(leaves[index])

    def are_finite(self) -> bool:
        """Whether the newest values have neither NaN nor infinity; costs a wait for them."""
        return are_finite([slots[0] for slots in self._leaves if isinstance(slots, tuple)])

    def _fill(self) -> None:
        with torch.no_grad():
            for slots in self._leaves:
                if isinstance(slots, tuple):
                    for older in slots[1:]:
                        older.copy_(slots[0])

    def _weights_at(self, step: int) -> Tensor:
        """Weights of all slots but the newest, which has the rest to 1."""
        key = (step, *self.steps)
        if key not in self._table:
            weights = extrapolation_weights(self.steps, step)
            weights += [0.0] * (self._order + 1 - len(weights))
            like = next(slot for slot in self._all() if slot.is_floating_point())
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            with torch.inference_mode(mode=False):
                self._table[key] = torch.tensor(weights[1:], dtype=dtype, device=like.device)
        return self._table[key]

    def _all(self) -> list[Tensor]:
        groups = [*self._leaves, self._swapped]
        return [slot for slots in groups if isinstance(slots, tuple) for slot in slots]


def _slots_for(value: Any, order: int) -> Any:
    """Copies of a tensor, one for every value that is kept of it; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    count = order + 1 if value.is_floating_point() else 1
    with torch.inference_mode(mode=False), torch.no_grad():
        slots = tuple(value.detach().clone() for _ in range(count))
    for slot in slots:
        torch._dynamo.mark_static_address(slot, guard=False)
    return slots


def _first_alike(shapes: Sequence[torch.Size], leaves: Sequence[Any]) -> tuple[int, int] | None:
    """An input and a leaf of the same shape, by their indices."""
    pairs = (
        (i, j)
        for j, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
        for i, shape in enumerate(shapes)
        if shape == leaf.shape
    )
    return next(pairs, None)


def _fits(slot: Tensor, value: Tensor) -> bool:
    return slot.shape == value.shape and slot.dtype == value.dtype


def _push(slots: tuple[Tensor, ...], value: Tensor) -> None:
    for older, newer in zip(reversed(slots[1:]), reversed(slots[:-1]), strict=True):
        older.copy_(newer)
    slots[0].copy_(value)


def _combined(slots: Any, weights: Tensor | None) -> Any:
    """The weighted sum of a leaf's values; whoever gets it may write into it."""
    if not isinstance(slots, tuple):
        return slots
    newest = slots[0]
    if len(slots) == 1 or weights is None:
        return newest.clone()
    # The weights sum to 1, so only differences need them: equal values give that value exactly.
    total = newest
    for i, value in enumerate(slots[1:]):
        total = total + weights[i] * (value - newest)
    return total
