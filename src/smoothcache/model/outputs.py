"""Flattens and rebuilds the inputs and outputs of layers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils import _pytree as pytree

from .digests import are_equal, digest, version

_NO_TENSORS = frozenset({type(None), bool, int, float, str})


def tensors_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the input tensors of a layer, with a fast path for flat arguments."""
    tensors: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            tensors.append(value)
        elif type(value) not in _NO_TENSORS:
            tensors += tensors_in(value)
    return tensors


def form_of(given: list[Tensor]) -> list[Any]:
    """Returns the shapes and dtypes of tensors."""
    return [(x.shape, x.dtype) for x in given]


def has_form(form: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the input tensors have this form, with a fast path for flat arguments."""
    count = 0
    for value in (*args, *kwargs.values()) if kwargs else args:
        if value is None:
            continue
        if isinstance(value, Tensor):
            if count == len(form):
                return False
            shape, dtype = form[count]
            if value.shape != shape or value.dtype != dtype:
                return False
            count += 1
        elif type(value) not in _NO_TENSORS:
            return form_of(tensors_given(args, kwargs)) == form
    return count == len(form)


def is_plain(output: Any) -> bool:
    """Whether an output is a single floating-point tensor."""
    return isinstance(output, Tensor) and output.is_floating_point()


class Writes:
    """Detects in-place writes of a layer into its input tensors.

    Inference mode has no version counters. The contents are compared instead, in the first call
    only; later calls are assumed to write into the same inputs.
    """

    def __init__(self) -> None:
        self._known: set[int] | None = None

    def before(self, given: list[Tensor]) -> list[Any]:
        """Returns versions or digests for ``after`` to compare with."""
        is_known = self._known is not None
        return [version(x) if is_known or not x.is_inference() else digest(x) for x in given]

    def after(self, given: list[Tensor], marks: list[Any]) -> dict[int, Tensor]:
        """Returns the tensors that were written into, by their index."""
        known = self._known
        written: dict[int, Tensor] = {}
        for i, (x, mark) in enumerate(zip(given, marks, strict=True)):
            if not x.is_inference():
                is_written = x._version != mark
            elif known is None:
                is_written = mark is not None and not are_equal(mark, digest(x))
            else:
                is_written = i in known
            if is_written:
                written[i] = x
        if known is None and any(x.is_inference() for x in given):
            self._known = {i for i, x in written.items() if x.is_inference()}
        return written


def taken_apart(output: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Returns the leaves of an output, and a function that rebuilds it from other leaves.

    Nested dataclasses and mappings are flattened too. A tensor that occurs twice is one leaf.
    """
    if isinstance(output, Tensor):
        return [output], _only
    leaves, whole = _parts(output)
    places = [next(i for i, x in enumerate(leaves) if x is leaf) for leaf in leaves]
    unique = sorted(set(places))
    sources = [unique.index(place) for place in places]
    return [leaves[i] for i in unique], lambda values: whole(iter([values[i] for i in sources]))


def _only(values: list[Any]) -> Any:
    return values[0]


def _parts(output: Any) -> tuple[list[Any], Callable[[Iterator[Any]], Any]]:
    """Returns all leaves of an output in order, and a function that refills it from a sequence."""
    leaves, spec = pytree.tree_flatten(output)
    parts = [_inside(leaf) for leaf in leaves]
    wholes = [whole for _, whole in parts]  # without the tensors, which must not be kept alive

    def refill(values: Iterator[Any]) -> Any:
        return pytree.tree_unflatten([whole(values) for whole in wholes], spec)

    return [leaf for inner, _ in parts for leaf in inner], refill


def _inside(leaf: Any) -> tuple[list[Any], Callable[[Iterator[Any]], Any]]:
    """Returns the contents of a pytree leaf: itself, or the fields of a dataclass or mapping."""
    is_record = dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
    if not is_record and not isinstance(leaf, MutableMapping):
        return [leaf], next
    fields = [field.name for field in dataclasses.fields(leaf)] if is_record else []
    attributes = {name: getattr(leaf, name) for name in {**dict.fromkeys(fields), **_vars(leaf)}}
    items = dict(leaf) if isinstance(leaf, MutableMapping) else {}
    leaves, refill = _parts([attributes, items])
    like = _refilled(copy.copy(leaf), dict.fromkeys(attributes), dict.fromkeys(items))
    return leaves, lambda values: _refilled(copy.copy(like), *refill(values))


def _vars(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})


def hides_tensors(leaf: Any) -> bool:
    """Whether a leaf contains tensors that cannot be replaced, or is a closure over tensors."""
    if isinstance(leaf, Tensor | type):
        return False
    if tensors_in(dict(_vars(leaf))):
        return True
    return callable(leaf) and _is_function_of_tensors(leaf)


def _is_function_of_tensors(function: Any) -> bool:
    """Whether a function, or a function bound in it, holds tensors."""
    if isinstance(function, partial):
        held: list[Any] = [function.func, function.args, function.keywords]
    elif isinstance(function, MethodType):
        held = [function.__func__, function.__self__]
    else:
        cells = getattr(function, "__closure__", None) or ()
        held = [_content(cell) for cell in cells]
        held += [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)]
    leaves = [x for value in held for x in pytree.tree_leaves(value) if value is not function]
    return any(
        isinstance(x, Tensor) or (callable(x) and x is not function and hides_tensors(x))
        for x in leaves
        if not isinstance(x, Parameter | Module)  # weights do not change between steps
    )


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _refilled(whole: Any, attributes: dict[str, Any], items: dict[Any, Any]) -> Any:
    for name, value in attributes.items():
        object.__setattr__(whole, name, value)
    for key, value in items.items():
        whole[key] = value
    return whole


def bytes_of(output: Any) -> int:
    """Returns the bytes of all tensors in an output; a tensor that occurs twice counts once."""
    return sum(leaf.nbytes for leaf in taken_apart(output)[0] if isinstance(leaf, Tensor))


def are_finite(values: list[Any]) -> bool:
    tensors = [x for x in values if isinstance(x, Tensor) and x.device.type != "meta"]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


# ------------------------------------------------------------------- residuals of whole blocks
def tensors_in(arguments: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]


def float_tensors(arguments: Any) -> list[Tensor]:
    return [x for x in tensors_in(arguments) if x.is_floating_point()]


def written_into(
    into: list[int | None], values: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    """Returns the leaves, copied into inputs that the layer writes in place and returns."""
    if all(i is None for i in into):
        return values
    given = tensors_in((args, kwargs))
    return [
        value if i is None else given[i].copy_(value) for i, value in zip(into, values, strict=True)
    ]
