"""Static buffers for the kept values of a layer under ``torch.compile``.

Compiled code must not read Python values that differ between steps, which would trigger
recompilation. A graph therefore sees one flag per layer, compute or reuse, and tensors. A computed
value is written into a row of a buffer, and a reuse is a weighted sum over all rows; the row index
and the weights are tensors too. Everything else happens between the calls of the denoiser. Buffers
keep their addresses as long as shapes do, so CUDA graphs neither copy nor overwrite them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ScheduleMismatchError
from ..model.outputs import are_finite, float_tensors, taken_apart, tensors_in, written_into
from ..model.residuals import are_swapped, bases_at, bases_of, copies_of, minus, plus


class Output(Protocol):
    """A computed output in the form in which it is kept."""

    leaves: list[Any]
    swapped: Tensor | None
    dtypes: list[torch.dtype | None]
    sources: tuple[int | None, ...]
    into: list[int | None]

    @property
    def rebuild(self) -> Callable[[list[Any]], Any]:
        """Function that rebuilds the output from other leaves."""


class Slots:
    """Keeps the outputs of one use of a layer in one branch.

    Args:
        example: An output, whose structure and shapes the slots take.
        shapes: Shapes of the input tensors of that output.
        order: Degree of the predictor's polynomial; ``order + 1`` values are kept.
        weights: ``weights(steps, at)`` returns the weights of the values computed at ``steps``,
            the newest last, for a reuse at step ``at``.
        residual: Whether to keep the difference between the layer's output and its input.
        parts: Number of parts of the batch with separate weights, which need not sum to 1;
            ``weights`` then returns one list per part. None for weights that sum to 1.

    Attributes:
        reuses: Whether the next call reuses.
        is_misfit: Whether the last call had tensors of other shapes, so that nothing was kept.
    """

    def __init__(
        self,
        example: Output,
        shapes: Sequence[torch.Size],
        order: int,
        weights: Callable[[tuple[int, ...], int], Any],
        *,
        residual: bool,
        parts: int | None = None,
    ) -> None:
        _refuse_other_parts(example.leaves, parts)
        self._leaves = [_buffer_for(leaf, order + 1) for leaf in example.leaves]
        self._swapped = _buffer_for(example.swapped, 1)
        self._rebuild = example.rebuild
        self._dtypes = example.dtypes
        self._into = example.into
        self._weights_of = weights
        self._rows: list[int | None] = [None] * (order + 1)  # the step of each row's value
        self._row = 0  # the next row to write
        self._residual = residual
        self._parts = parts
        self._sources = example.sources
        self._same_shape = _first_of_same_shape(shapes, example.leaves)
        self._index: Tensor | None = None
        self._weights: Tensor | None = None
        self._tensors: dict[tuple[Any, ...], Tensor] = {}
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
        if self._residual or self._sources:  # copies: the layer may write into its input in place
            inputs = float_tensors((args, kwargs))
            inputs = copies_of(inputs, range(len(inputs)) if self._residual else self._sources)
        output = forward(*args, **kwargs)
        self._keep(output, inputs)
        return output

    def _has_shapes_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the inputs have the shapes of the kept value.

        Shapes are compared with each other, not with numbers, so that graphs with a dynamic batch
        size remain possible.
        """
        if self._same_shape is None:
            return True
        given, leaf = self._same_shape
        tensors = tensors_in((args, kwargs))
        return given < len(tensors) and tensors[given].shape == self._leaves[leaf].shape[1:]

    def _keep(self, output: Any, inputs: list[Tensor]) -> None:
        leaves, _ = taken_apart(output)
        if len(leaves) != len(self._leaves):
            self.is_misfit = True
            return
        swapped = are_swapped(leaves, inputs) if self._residual else None
        bases = self._bases(leaves, inputs, swapped)
        for buffer, leaf, base in zip(self._leaves, leaves, bases, strict=True):
            if isinstance(leaf, Tensor):
                value = leaf.detach() if base is None else minus(leaf, base)
                if not _fits(buffer, value):
                    self.is_misfit = True
                    return
                _write(buffer, self._index, value)
        if swapped is not None:
            _write(self._swapped, None, swapped)

    def _predicted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = [_combined(buffer, self._weights, self._parts) for buffer in self._leaves]
        if self._residual or self._sources:
            swapped = None if self._swapped is None else self._swapped[0]
            bases = self._bases(values, float_tensors((args, kwargs)), swapped)
            values = [
                plus(value, base, dtype)
                for value, base, dtype in zip(values, bases, self._dtypes, strict=True)
            ]
        return self._rebuild(written_into(self._into, values, args, kwargs))

    def _bases(
        self, leaves: Sequence[Any], inputs: list[Tensor], swapped: Tensor | None
    ) -> list[Tensor | None]:
        if self._residual:
            return bases_of(list(leaves), inputs, swapped)
        return bases_at(self._sources, inputs, leaves)

    # ----------------------------------------------------------------------- between the calls

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers())

    @property
    def newest(self) -> int:
        """Step of the newest value; -1 if there is none."""
        return max((step for step in self._rows if step is not None), default=-1)

    def forget(self) -> None:
        """Invalidates all values."""
        self._rows = [None] * len(self._rows)

    def prepare(self, step: int, *, reuses: bool) -> None:
        """Sets what the next call does: compute and keep, or reuse."""
        self.reuses, self.is_misfit = reuses, False
        if len(self._rows) == 1:
            return
        if reuses:
            self._weights = self._tensor(self._weights_at(step))
        else:
            oldest = min(-1 if step is None else step for step in self._rows)
            self._row = self._rows.index(None if oldest < 0 else oldest)
            self._index = self._tensor([self._row], torch.int64)

    def wrote(self, step: int) -> None:
        """Records that the last call wrote the value of this step."""
        is_first = self.newest < 0
        self._rows[self._row] = step
        if is_first:  # the other rows have zero weight, but may hold NaN
            self._fill()

    def fill(self, values: Sequence[tuple[int, Sequence[Any]]]) -> None:
        """Copies the leaves of values that were computed before the slots existed."""
        with torch.inference_mode(mode=False), torch.no_grad():
            for row, (step, leaves) in enumerate(values):
                self._rows[row] = step
                for buffer, leaf in zip(self._leaves, leaves, strict=True):
                    if isinstance(buffer, Tensor) and row < len(buffer):
                        buffer[row] = leaf

    def are_finite(self) -> bool:
        """Whether the last value has neither NaN nor infinity; costs a host sync."""
        return are_finite([buffer[min(self._row, len(buffer) - 1)] for buffer in self._buffers()])

    def _fill(self) -> None:
        with torch.no_grad():
            for buffer in self._buffers():
                if len(buffer) > 1:
                    buffer.copy_(buffer[self._row].clone().expand_as(buffer))

    def _weights_at(self, step: int) -> list[float]:
        """Returns the weights of all rows but the first, and the excess of their sum over 1.

        The weight of the first row is the remainder to 1. The excess is returned only with separate
        weights per part of the batch. All parts of a row come before the next row.
        """
        known = sorted(known for known in self._rows if known is not None)
        given = self._weights_of(tuple(known), step)
        tables = [given] if self._parts is None else given
        written: list[list[float]] = []
        for table in tables:
            weights = dict(zip(known, table, strict=True))
            others = [0.0 if known is None else weights[known] for known in self._rows[1:]]
            excess = [] if self._parts is None else [sum(table) - 1]
            written.append([*others, *excess])
        return [x for row in zip(*written, strict=True) for x in row]

    def _tensor(self, numbers: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        """Returns numbers as a tensor on the buffers' device, cached by value."""
        key = (dtype, *numbers)
        if key not in self._tensors:
            like = next((x for x in self._buffers() if x.is_floating_point()), self._buffers()[0])
            dtype = dtype or (like.dtype if like.dtype == torch.float64 else torch.float32)
            with torch.inference_mode(mode=False):
                self._tensors[key] = torch.tensor(numbers, dtype=dtype, device=like.device)
        return self._tensors[key]

    def _buffers(self) -> list[Tensor]:
        return [buffer for buffer in (*self._leaves, self._swapped) if isinstance(buffer, Tensor)]


def _refuse_other_parts(leaves: Sequence[Any], parts: int | None) -> None:
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim:
            refuse_indivisible(len(leaf), parts or 1)


def refuse_indivisible(batch: int, parts: int) -> None:
    """Refuses a batch that cannot be divided into the parts that weights were fitted for."""
    if batch % parts:
        raise ScheduleMismatchError(
            f"the weights were fitted to {parts} guidance branches per batch, but the batch size "
            f"{batch} is not a multiple of {parts}; sample with the guidance used for fitting, or "
            "fit again"
        )


def _buffer_for(value: Any, rows: int) -> Any:
    """Returns a buffer with copies of a tensor as rows; other values are returned unchanged.

    A tensor that is not floating-point gets a single row.
    """
    if not isinstance(value, Tensor):
        return value
    rows = rows if value.is_floating_point() else 1
    with torch.inference_mode(mode=False), torch.no_grad():
        buffer = torch.stack([value.detach()] * rows)
    torch._dynamo.mark_static_address(buffer)
    return buffer


def _first_of_same_shape(
    shapes: Sequence[torch.Size], leaves: Sequence[Any]
) -> tuple[int, int] | None:
    """Returns the indices of an input and a leaf of the same shape; None if there are none."""
    pairs = (
        (i, j)
        for j, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
        for i, shape in enumerate(shapes)
        if shape == leaf.shape
    )
    return next(pairs, None)


def _fits(buffer: Any, value: Tensor) -> bool:
    if not isinstance(buffer, Tensor):
        return False
    return buffer.shape[1:] == value.shape and buffer.dtype == value.dtype


def _write(buffer: Tensor, row: Tensor | None, value: Tensor) -> None:
    if len(buffer) == 1 or row is None:
        buffer.copy_(value[None])
    else:
        buffer.index_copy_(0, row, value[None])


def _combined(buffer: Any, weights: Tensor | None, parts: int | None) -> Any:
    """Returns the weighted sum of a leaf's values, a new tensor."""
    if not isinstance(buffer, Tensor):
        return buffer
    if len(buffer) == 1 or weights is None:
        return buffer[0].clone()
    # Differences are weighted, so that equal values with weights summing to 1 give them exactly.
    if parts is not None:
        return _by_part(buffer, weights, parts)
    total = buffer[0]
    for i in range(1, len(buffer)):
        total = total + weights[i - 1] * (buffer[i] - buffer[0])
    return total


def _by_part(buffer: Tensor, weights: Tensor, parts: int) -> Tensor:
    """Returns the sum with weights of shape [rows, parts]; the last row is the excess over 1."""
    shape = buffer.shape[1:]
    rows = buffer.reshape(len(buffer), parts, -1)
    factors = weights.reshape(len(buffer), parts, 1)
    total = rows[0] + factors[len(buffer) - 1] * rows[0]
    for i in range(1, len(buffer)):
        total = total + factors[i - 1] * (rows[i] - rows[0])
    return total.reshape(shape).to(buffer.dtype)
