"""Keeps layer outputs of earlier steps and measures the error of reusing them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..model.costs import MacCounter
from ..model.outputs import bytes_of, float_tensors, taken_apart
from ..model.residual_stream import followed
from ..model.residuals import bases_at, copies_of, minus
from .distance import l1_distance, l1_norm


class ObserverMemory:
    """Current and peak bytes of kept outputs, and scratch tensors shared by all layers."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self._scratch: dict[Any, Tensor] = {}

    def scratch(self, like: Tensor) -> Tensor:
        """Returns a tensor of the same shape, dtype and device, to be overwritten."""
        form = (like.shape, like.dtype, like.device)
        if form not in self._scratch:
            self._scratch[form] = torch.empty_like(like)
        return self._scratch[form]

    def hold(self, change: int) -> None:
        self.held += change
        self.peak = max(self.peak, self.held)


class LayerObserver:
    """Handler of one layer that compares each output with earlier ones, without changing it.

    For a layer that adds to its input, the differences to the input are compared, because these
    are reused.
    """

    def __init__(
        self, path: str, max_gap: int, tokens: int | None, memory: ObserverMemory, *, follow: bool
    ) -> None:
        self._path = path
        self._follow = follow
        self._sources: dict[int, tuple[int | None, ...]] = {}  # by the number of inputs
        self.is_mixed = False
        self._max_gap = max_gap
        self._tokens = tokens
        self._memory = memory
        self._kept: dict[tuple[int, int], deque[tuple[int, list[Tensor]]]] = {}
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counter: MacCounter | None = None
        self._active = False
        self._step = self._branch = self._use = 0
        self.macs = self.nbytes = 0
        self.steps_seen: set[int] = set()

    def begin(self, step: int, branch: int, counter: MacCounter | None) -> None:
        self._step, self._branch, self._use = step, branch, 0
        self._counter = counter
        self._active = True

    def end(self) -> None:
        self._active = False
        self._counter = None

    def forget(self) -> None:
        """Drops the outputs and errors of the last sample."""
        for history in self._kept.values():
            self._memory.hold(-sum(_nbytes(outputs) for _, outputs in history))
        self._kept.clear()
        self._sums.clear()

    def sums(self, num_steps: int) -> Tensor:
        """Returns L1 norms (row 0) and L1 distances for gaps 1..max_gap; [1 + max_gap, steps]."""
        zero = next(iter(self._sums.values())).new_zeros(()) if self._sums else torch.zeros(())
        rows = range(self._max_gap + 1)
        cells = [self._sums.get((row, step), zero) for row in rows for step in range(num_steps)]
        return torch.stack(cells).reshape(self._max_gap + 1, num_steps)

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._active:
            return forward(*args, **kwargs)
        before = self._counter.total if self._counter else 0
        output, values = self._run(forward, args, kwargs)
        if self._counter:
            self.macs += self._counter.total - before
            self.nbytes += bytes_of(output)
        self._compare(self._tensors(output, values))
        self.steps_seen.add(self._step)
        self._use += 1
        return output

    def _run(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Any]]:
        """Runs the layer; returns its output and the leaves that would be kept."""
        inputs = float_tensors((args, kwargs))
        count = len(inputs)
        if self._follow and count not in self._sources:
            inputs = copies_of(inputs, range(count))  # the layer may modify them in place
            output, carried = followed(forward, args, kwargs)
            self._sources[count] = carried.sources
            self.is_mixed = self.is_mixed or carried.is_mixed
        else:
            inputs = copies_of(inputs, self._sources.get(count, ()))
            output = forward(*args, **kwargs)
        leaves, _ = taken_apart(output)
        sources = self._sources.get(count, ())
        if len(sources) not in (0, len(leaves)):
            return output, leaves
        bases = bases_at(sources, inputs, leaves)
        return output, [
            leaf if base is None else minus(leaf, base)
            for leaf, base in zip(leaves, bases, strict=True)
        ]

    def _compare(self, outputs: list[Tensor]) -> None:
        history = self._kept.setdefault((self._branch, self._use), deque())
        for value in outputs:
            self._add(0, l1_norm(value))
        for step, earlier in history:
            gap = self._step - step
            if gap <= self._max_gap and _same_shapes(outputs, earlier):
                for value, kept in zip(outputs, earlier, strict=True):
                    self._add(gap, l1_distance(value, kept, self._memory.scratch(value)))
        unused: list[Tensor] = []
        if len(history) == self._max_gap:
            unused = history.popleft()[1]
            self._memory.hold(-_nbytes(unused))
        # Copies, because the model may modify its outputs in place.
        history.append((self._step, _copied(outputs, unused)))
        self._memory.hold(_nbytes(outputs))

    def _add(self, row: int, value: Tensor) -> None:
        at = (row, self._step)
        self._sums[at] = self._sums[at] + value if at in self._sums else value

    def _tensors(self, output: Any, values: list[Any]) -> list[Tensor]:
        """Returns the tensors that would be kept, restricted to the compared tokens."""
        tensors = [x.detach() for x in values if isinstance(x, Tensor)]
        if not tensors:
            raise CalibrationError(
                f"{self._path!r} returned no tensor but {type(output).__name__}, so nothing of it "
                "can be reused; leave it out with find_layers(model, select=...)"
            )
        return [self._subsampled(x) for x in tensors]

    def _subsampled(self, value: Tensor) -> Tensor:
        if self._tokens is None or value.ndim < 3:
            return value
        return value[..., :: max(1, value.shape[-2] // self._tokens), :]


def _copied(tensors: list[Tensor], into: list[Tensor]) -> list[Tensor]:
    """Returns copies, written into unused tensors if shapes and dtypes match."""
    if [(x.shape, x.dtype) for x in tensors] != [(x.shape, x.dtype) for x in into]:
        return [tensor.clone() for tensor in tensors]
    return [old.copy_(new) for old, new in zip(into, tensors, strict=True)]


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _same_shapes(a: list[Tensor], b: list[Tensor]) -> bool:
    return [x.shape for x in a] == [x.shape for x in b]
