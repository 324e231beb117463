"""What a layer adds to its input: taken apart when kept, put together at reuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def are_swapped(outputs: list[Any], inputs: list[Tensor]) -> Tensor | None:
    """Whether two streams of one shape come out in the other order than they went in.

    Decided on the device by which order leaves the smaller residuals; None where shapes tell.
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
    """The input that each output leaf continues: the first unused one of its shape."""
    free = list(inputs)
    bases: list[Tensor | None] = []
    for output in outputs:
        fits = [i for i, x in enumerate(free) if isinstance(output, Tensor) and is_like(x, output)]
        fits.sort(key=lambda i: free[i].dtype != output.dtype)  # autocast may change it in a block
        index = next(iter(fits), None)
        bases.append(None if index is None else free.pop(index))
    if swapped is not None:
        first, second = (i for i, output in enumerate(outputs) if isinstance(output, Tensor))
        a, b = bases[first], bases[second]
        if a is not None and b is not None:
            bases[first], bases[second] = torch.where(swapped, b, a), torch.where(swapped, a, b)
    return bases


def is_like(a: Tensor, b: Tensor) -> bool:
    """Whether the second, of floats, has the shape and the device of the first."""
    return a.shape == b.shape and a.device == b.device and b.is_floating_point()


def copies_of(inputs: list[Tensor], sources: Sequence[int | None]) -> list[Tensor]:
    """Inputs before a forward that may write into them: copies of those that outputs continue."""
    return [x.detach().clone() if i in sources else x for i, x in enumerate(inputs)]


def bases_at(
    sources: Sequence[int | None], inputs: list[Tensor], leaves: Sequence[Any]
) -> list[Tensor | None]:
    """The input that each leaf continues, as it is known; none if no leaf continues one."""
    if not sources:
        return [None] * len(leaves)
    return [None if i is None else inputs[i] for i in sources]


def kept_of(leaf: Any, base: Tensor | None) -> Any:
    """A value to keep, that no later in-place operation can alter: a copy of the leaf.

    What a leaf adds to its base, which is a copy already, is made in the place of that.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    if base is None:
        return leaf.detach().clone()
    is_same = base.dtype == leaf.dtype
    return torch.sub(leaf.detach(), base, out=base) if is_same else minus(leaf, base)


def minus(leaf: Tensor, base: Tensor) -> Tensor:
    """What was added to a base, in the dtype of the sum (autocast may have changed it)."""
    return (leaf.detach() - base).to(leaf.dtype)


def plus(value: Any, base: Tensor | None, dtype: torch.dtype | None) -> Any:
    return value if base is None else (value + base).to(dtype)
