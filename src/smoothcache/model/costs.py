"""What a forward costs: multiply-accumulates (MACs) counted from what really runs, and bytes held.

The count is taken under the Python level of PyTorch, where every model looks alike: below
`nn.Module`, below `autograd`, one operator at a time, with the formulas of
`torch.utils.flop_counter`. Nothing needs to be known about the model, and a forward on the meta
device, which computes nothing, costs the same as one on a CPU or a GPU.
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

    The counts can be read at any moment, inside the block as well as after it, so an observer
    finds the cost of a layer as the difference of two readings. Results inside the block are bit
    for bit what they are outside, with and without gradients and in inference mode.

    How a product with weights is told from an attention product:

    - ``aten.linear``, ``mm``, ``addmm``, convolutions and quantised products are products with
      weights. `torch.nn.Linear` ends there whatever the shape of its input.
    - Attention kernels, and ``bmm`` and ``baddbmm``, where hand-written attention ends (``matmul``
      of batches, ``einsum``), are attention products, except that a ``bmm`` with a
      `torch.nn.Parameter` or a view of one is a product with weights (``einsum`` turns
      ``"bnd,ed->bne"`` into ``bmm``).

    So hand-written attention without any batch or head dimension counts as weights, and
    ``einsum`` with weights that autocast has copied to another type counts as attention. The
    total is right in both cases. Causal and masked attention counts in full. A kernel that pads
    its heads counts what it was given (on CUDA, heads whose size is no multiple of 8).

    Operators without a formula count nothing: element-wise arithmetic, norms, softmax, and custom
    kernels until `torch.utils.flop_counter.register_flop_formula` has given them one.

    What cannot be counted: a model under ``torch.compile(fullgraph=True)``, which PyTorch refuses
    to run while anything watches its operators (count before compiling), uncompiled flex
    attention, for the same reason, and nested tensors of the jagged layout.

    Counting is per thread. Counters can be nested, each counts what runs inside it; entering one
    that is already active changes nothing, and entering one again later starts from zero.

    Attributes:
        weights: MACs of linear and convolution layers, biases not included.
        attention: MACs of the two attention products, queries with keys and weights with values.
        biases: Additions of biases in linear and convolution layers, one for each element of the
            output. Not part of ``total``.

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
        """MACs so far, 1 MAC being 2 floating-point operations: ``weights + attention``."""
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
    """Gives a number of MACs with a unit that fits, to two decimals.

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
    """Gives the bytes of all tensors in what a layer returned.

    Args:
        tree: A tensor, or tuples, lists and mappings of tensors in any nesting. Anything else in
            it, `None` included, has no bytes. A tensor that occurs twice counts once.

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
    """Adds up what every operator costs."""

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
