"""Costs of a forward: multiply-accumulates (MACs) of the operators that run, and bytes.

MACs are counted at the dispatcher level of PyTorch, below `nn.Module` and `autograd`, one operator
at a time, with the formulas of `torch.utils.flop_counter`. This works for any model. A forward on
the meta device, which computes nothing, has the same count as one on a CPU or a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from .mac_formulas import LateBiases, Macs, macs_of
from .operators import OperatorMode

_UNITS = ("MACs", "KMACs", "MMACs", "GMACs", "TMACs", "PMACs")


class MacCounter:
    """Counts the multiply-accumulates of everything that runs inside its ``with`` block.

    The counts can be read at any time, inside the block and after it, so the cost of a layer is the
    difference of two readings. Results inside the block are bit-identical to results outside, with
    and without gradients and in inference mode.

    Products with weights and attention products are distinguished as follows:

    - ``aten.linear``, ``mm``, ``addmm``, convolutions and quantised products are products with
      weights. `torch.nn.Linear` dispatches to these for any input shape.
    - Attention kernels, ``bmm`` and ``baddbmm`` (to which batched ``matmul`` and ``einsum``
      dispatch) are attention products. A ``bmm`` with a `torch.nn.Parameter` or a view of one is a
      product with weights (``einsum`` turns ``"bnd,ed->bne"`` into ``bmm``).

    Hand-written attention without a batch or head dimension therefore counts as weights, and
    ``einsum`` with weights cast by autocast counts as attention. The total is right in both cases.
    Causal and masked attention counts in full. A kernel that pads its heads counts the padded size
    (on CUDA, heads whose size is not a multiple of 8).

    Operators without a formula count nothing: element-wise arithmetic, norms, softmax, and custom
    kernels without a formula registered by `torch.utils.flop_counter.register_flop_formula`.

    Unsupported are models under ``torch.compile(fullgraph=True)`` (count before compiling) and
    uncompiled flex attention, which PyTorch refuses to run under a dispatch mode, and nested
    tensors with the jagged layout.

    Counting is per thread. Counters can be nested, and each counts what runs inside it. Entering an
    active counter again has no effect; entering a closed counter again starts from zero.

    Attributes:
        weights: MACs of linear and convolution layers, without biases.
        attention: MACs of the two attention products, queries with keys and weights with values.
        biases: Bias additions in linear and convolution layers, one per output element. Not part
            of ``total``.

    Example:
        >>> import torch
        >>> from smoothcache.model.costs import MacCounter
        >>> layer = torch.nn.Linear(8, 16)
        >>> with torch.no_grad(), MacCounter() as counter:
        ...     _ = layer(torch.zeros(2, 5, 8))
        >>> counter.total, counter.weights, counter.attention, counter.biases
        (1280, 1280, 0, 160)
    """

    def __init__(self) -> None:
        self.weights = 0
        self.attention = 0
        self.biases = 0
        self._depth = 0
        self._active = ExitStack()

    @property
    def total(self) -> int:
        """MACs so far, ``weights + attention``; 1 MAC is 2 floating-point operations."""
        return self.weights + self.attention

    def __enter__(self) -> MacCounter:
        if self._depth == 0:
            self.weights = self.attention = self.biases = 0
            self._active.enter_context(_CountingMode(self))
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._active.close()

    def __repr__(self) -> str:
        return f"MacCounter({human_macs(self.total)})"


def human_macs(macs: float) -> str:
    """Formats a number of MACs with a suitable unit, to two decimals.

    Args:
        macs: Multiply-accumulates, not negative.

    Example:
        >>> from smoothcache.model.costs import human_macs
        >>> human_macs(366_060_000_000_000), human_macs(999), human_macs(999_999)
        ('366.06 TMACs', '999 MACs', '1.00 MMACs')
    """
    if macs < 1000:
        return f"{macs:.0f} {_UNITS[0]}"
    value, power = float(macs), 0
    while round(value, 2) >= 1000 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.2f} {_UNITS[power]}"


def nbytes(tree: Any) -> int:
    """Returns the bytes of all tensors in a layer's output.

    Args:
        tree: A tensor, or nested tuples, lists and mappings of tensors. Other values, including
            `None`, have no bytes. A tensor that occurs twice counts once.

    Example:
        >>> import torch
        >>> from smoothcache.model.costs import nbytes
        >>> nbytes((None, {"sample": torch.zeros(2, 3)}))
        24
    """
    return sum({id(tensor): tensor.nbytes for tensor in _tensors(tree)}.values())


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, Sequence) and not isinstance(tree, (str, bytes)):
        for value in tree:
            yield from _tensors(value)


class _CountingMode(OperatorMode):  # type: ignore[no-untyped-call]
    """Adds up the costs of all operators."""

    def __init__(self, counter: MacCounter) -> None:
        super().__init__()
        self._counter = counter
        self._late_biases = LateBiases()

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self._add(macs_of(func, args, kwargs, out))
        self._add(self._late_biases.of(func, args, out))

    def _add(self, macs: Macs) -> None:
        self._counter.weights += macs.weights
        self._counter.attention += macs.attention
        self._counter.biases += macs.biases
