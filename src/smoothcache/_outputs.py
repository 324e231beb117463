"""What layers are given and return, taken apart and put together; residuals of whole blocks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._content import version


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Shapes and types of the tensors that a layer is given."""
    form: list[Any] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            form.append((value.shape, value.dtype))
        elif isinstance(value, list | tuple | dict):
            leaves = pytree.tree_leaves(value)
            form += [(x.shape, x.dtype) for x in leaves if isinstance(x, Tensor)]
    return form


def has_form(form: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``form_of`` would give this form, told at once in most cases."""
    count, most = 0, len(form)
    for value in (*args, *kwargs.values()) if kwargs else args:
        if value is None:
            continue
        if isinstance(value, Tensor):
            if count == most or value.shape != form[count][0] or value.dtype != form[count][1]:
                return False
            count += 1
        elif isinstance(value, list | tuple | dict):
            return form_of(args, kwargs) == form
    return count == most


def writes_into(inputs: list[Tensor], versions: list[int | None], outputs: list[Any]) -> bool:
    """Whether a layer wrote into something that it was given and does not return."""
    returned = {id(output) for output in outputs}
    return any(
        x_version is not None and version(x) != x_version and id(x) not in returned
        for x, x_version in zip(inputs, versions, strict=True)
    )


def taken_apart(output: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of an output, dataclasses in it included, and how to put others in their place."""
    if isinstance(output, Tensor):
        return [output], _only
    leaves, spec = pytree.tree_flatten(output)
    parts = [_fields_apart(leaf) for leaf in leaves]
    wholes = [whole for _, whole in parts]  # without the tensors, which are not to be kept alive

    def rebuild(values: list[Any]) -> Any:
        rest = iter(values)
        return pytree.tree_unflatten([whole(rest) for whole in wholes], spec)

    return [leaf for own, _ in parts for leaf in own], rebuild


def _only(values: list[Any]) -> Any:
    return values[0]


def _fields_apart(leaf: Any) -> tuple[list[Any], Callable[[Iterator[Any]], Any]]:
    """What is in a leaf: itself, or the leaves of a dataclass; and how to refill it."""
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        return [leaf], next
    names = [item.name for item in dataclasses.fields(leaf)]
    leaves, refill = taken_apart({name: getattr(leaf, name) for name in names})
    like, count = copy.copy(leaf), len(leaves)
    for name in names:
        object.__setattr__(like, name, None)

    def whole(rest: Iterator[Any]) -> Any:
        filled = copy.copy(like)
        for name, value in refill([next(rest) for _ in range(count)]).items():
            object.__setattr__(filled, name, value)
        return filled

    return leaves, whole


def are_finite(values: list[Any]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values if isinstance(value, Tensor))


# ------------------------------------------------------------------- residuals of whole blocks


def tensors_in(arguments: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]


def float_tensors(arguments: Any) -> list[Tensor]:
    return [x for x in tensors_in(arguments) if x.is_floating_point()]


def are_swapped(outputs: list[Any], inputs: list[Tensor]) -> Tensor | None:
    """Whether two streams of one shape come out in the other order than they went in.

    Decided on the device by which order leaves the smaller residuals; None where shapes tell.
    """
    outs = [x for x in outputs if isinstance(x, Tensor)]
    if len(outs) != 2 or outs[0].shape != outs[1].shape:
        return None
    ins = [x for x in inputs if _alike(x, outs[0])][:2]
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
        fits = [i for i, x in enumerate(free) if isinstance(output, Tensor) and _alike(x, output)]
        fits.sort(key=lambda i: free[i].dtype != output.dtype)  # autocast may change it in a block
        index = next(iter(fits), None)
        bases.append(None if index is None else free.pop(index))
    if swapped is not None:
        first, second = (i for i, output in enumerate(outputs) if isinstance(output, Tensor))
        a, b = bases[first], bases[second]
        if a is not None and b is not None:
            bases[first], bases[second] = torch.where(swapped, b, a), torch.where(swapped, a, b)
    return bases


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and b.is_floating_point()


def kept_of(leaf: Any, base: Tensor | None) -> Any:
    """A value to keep: a copy of its own, that no later in-place operation can alter."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone() if base is None else leaf.detach() - base


def plus(value: Any, base: Tensor | None, dtype: torch.dtype | None) -> Any:
    return value if base is None else (value + base).to(dtype)
