"""Residuals of layers: subtracts the input when a value is kept, adds it at reuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def are_swapped(outputs: list[Any], inputs: list[Tensor]) -> Tensor | None:
    """Whether a block returns two streams of equal shape in swapped order, as a tensor.

    The order with the smaller residuals is chosen, without a host sync. None if shapes differ.
    """
    outs = [x for x in outputs if isinstance(x, Tensor)]
    if len(outs) != 2 or outs[0].shape != outs[1].shape:
        return None
    ins = [x for x in inputs if is_like(x, outs[0])][:2]
    if len(ins) != 2:
        return None
    straight = (outs[0] - ins[0]).abs().sum() + (outs[1] - ins[1]).abs().sum()
    crossed = (outs[0] - ins[1]).abs().sum() + (outs[1] - ins[0]).abs().sum()
    return crossed < straight


def bases_of(
    outputs: list[Any], inputs: list[Tensor], swapped: Tensor | None
) -> list[Tensor | None]:
    """Returns the base of each output leaf: the first unused input of its shape."""
    free = list(inputs)
    bases: list[Tensor | None] = []
    for output in outputs:
        fits = [i for i, x in enumerate(free) if isinstance(output, Tensor) and is_like(x, output)]
        fits.sort(key=lambda i: free[i].dtype != output.dtype)  # autocast may change the dtype
        index = next(iter(fits), None)
        bases.append(None if index is None else free.pop(index))
    if swapped is not None:
        first, second = (i for i, output in enumerate(outputs) if isinstance(output, Tensor))
        a, b = bases[first], bases[second]
        if a is not None and b is not None:
            bases[first], bases[second] = torch.where(swapped, b, a), torch.where(swapped, a, b)
    return bases


def is_like(a: Tensor, b: Tensor) -> bool:
    """Whether b is floating-point and has the shape and device of a."""
    return a.shape == b.shape and a.device == b.device and b.is_floating_point()


def copies_of(inputs: list[Tensor], sources: Sequence[int | None]) -> list[Tensor]:
    """Returns inputs, with copies of those that outputs add to, which may be modified in place."""
    return [x.detach().clone() if i in sources else x for i, x in enumerate(inputs)]


def bases_at(
    sources: Sequence[int | None], inputs: list[Tensor], leaves: Sequence[Any]
) -> list[Tensor | None]:
    """Returns the base of each leaf from known sources; None for leaves without a base."""
    if not sources:
        return [None] * len(leaves)
    return [None if i is None else inputs[i] for i in sources]


def kept_of(leaf: Any, base: Tensor | None) -> Any:
    """Returns the value to keep, independent of later in-place operations.

    A difference to a base is written into the base, which is already a copy.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    if base is None:
        return leaf.detach().clone()
    is_same = base.dtype == leaf.dtype
    return torch.sub(leaf.detach(), base, out=base) if is_same else minus(leaf, base)


def minus(leaf: Tensor, base: Tensor) -> Tensor:
    """Returns the difference to a base in the dtype of the leaf (autocast may have changed it)."""
    return (leaf.detach() - base).to(leaf.dtype)


def plus(value: Any, base: Tensor | None, dtype: torch.dtype | None) -> Any:
    return value if base is None else (value + base).to(dtype)
