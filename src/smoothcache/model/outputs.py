"""What layers are given and return, taken apart and put together; residuals of whole blocks."""

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
    """The tensors that a layer is given, told at once in most cases."""
    tensors: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            tensors.append(value)
        elif type(value) not in _NO_TENSORS:
            tensors += tensors_in(value)
    return tensors


def form_of(given: list[Tensor]) -> list[Any]:
    """Shapes and types of tensors."""
    return [(x.shape, x.dtype) for x in given]


def has_form(form: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``form_of`` the given tensors is this one, told at once in most cases."""
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
    """Whether an output is one tensor of floats."""
    return isinstance(output, Tensor) and output.is_floating_point()


class Writes:
    """Notices which of the tensors that it is given a layer writes into.

    In inference mode nothing counts writes. There the contents are compared instead, in the first
    call; a layer does not change its habits.
    """

    def __init__(self) -> None:
        self._habits: set[int] | None = None

    def before(self, given: list[Tensor]) -> list[Any]:
        """What ``after`` compares with."""
        is_known = self._habits is not None
        return [version(x) if is_known or not x.is_inference() else digest(x) for x in given]

    def after(self, given: list[Tensor], marks: list[Any]) -> dict[int, Tensor]:
        """The tensors that were written into, by their number."""
        habits = self._habits
        written: dict[int, Tensor] = {}
        for i, (x, mark) in enumerate(zip(given, marks, strict=True)):
            if not x.is_inference():
                is_written = x._version != mark
            elif habits is None:
                is_written = mark is not None and not are_equal(mark, digest(x))
            else:
                is_written = i in habits
            if is_written:
                written[i] = x
        if habits is None and any(x.is_inference() for x in given):
            self._habits = {i for i, x in written.items() if x.is_inference()}
        return written


def taken_apart(output: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of an output, and how to put others in their place.

    Dataclasses and mappings in it are taken apart too; a tensor in two places is one leaf.
    """
    if isinstance(output, Tensor):
        return [output], _only
    leaves, whole = _parts(output)
    places = [next(i for i, x in enumerate(leaves) if x is leaf) for leaf in leaves]
    own = sorted(set(places))
    sources = [own.index(place) for place in places]
    return [leaves[i] for i in own], lambda values: whole(iter([values[i] for i in sources]))


def _only(values: list[Any]) -> Any:
    return values[0]


def _parts(output: Any) -> tuple[list[Any], Callable[[Iterator[Any]], Any]]:
    """All that is in an output, in order, and how to refill it from such a sequence."""
    leaves, spec = pytree.tree_flatten(output)
    parts = [_inside(leaf) for leaf in leaves]
    wholes = [whole for _, whole in parts]  # without the tensors, which are not to be kept alive

    def refill(values: Iterator[Any]) -> Any:
        return pytree.tree_unflatten([whole(values) for whole in wholes], spec)

    return [leaf for own, _ in parts for leaf in own], refill


def _inside(leaf: Any) -> tuple[list[Any], Callable[[Iterator[Any]], Any]]:
    """What is in a leaf of a pytree: itself, or all that a dataclass or a mapping holds."""
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
    """Whether a leaf has tensors in it, or is a function of some, that nobody can exchange."""
    if isinstance(leaf, Tensor | type):
        return False
    if tensors_in(dict(_vars(leaf))):
        return True
    return callable(leaf) and _is_function_of_tensors(leaf)


def _is_function_of_tensors(function: Any) -> bool:
    """Whether a function, or one that it calls, was made with tensors in it."""
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
        if not isinstance(x, Parameter | Module)  # a model's own weights stay what they are
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
    """Bytes of all tensors in an output; a tensor in two places counts once."""
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
    """Leaves in the place of a layer's own, where it returns an input that it writes into."""
    if all(i is None for i in into):
        return values
    given = tensors_in((args, kwargs))
    return [
        value if i is None else given[i].copy_(value) for i, value in zip(into, values, strict=True)
    ]
