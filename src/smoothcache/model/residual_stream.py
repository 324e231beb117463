"""Detects which inputs bypass a layer's weights, by tracing the operators of one forward.

Most layers return a branch: their whole output has passed through their weights, and the model adds
it to the residual stream. Some layers add the stream themselves. Reusing their output would restore
the old stream and discard what earlier layers have computed. Therefore the operators of one forward
are observed, and every tensor is marked with the inputs that reach it without a product with
weights. No values are read, and the layer does not run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from .operators import OperatorMode
from .outputs import hides_tensors, taken_apart
from .residuals import is_like

_PRODUCTS = ("mm", "mv", "dot", "matmul", "linear", "conv", "attention", "attn", "lstm")
_ADD_A_PRODUCT = {"addmm", "baddbmm", "addbmm", "addmv"}
_KEPT = {  # operators that leave the elements of their operands as they are, or add them up
    *("add", "clone", "_to_copy", "to", "type_as", "contiguous", "alias", "detach", "lift_fresh"),
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "where", "masked_fill"),
    *("reshape", "_reshape_copy", "_unsafe_view", "flatten", "unflatten", "split", "chunk"),
    *("unbind", "repeat", "repeat_interleave", "roll", "flip", "pad", "constant_pad_nd", "index"),
    *("index_select", "gather", "take_along_dim", "slice_scatter", "select_scatter", "scatter"),
    *("index_put", "index_add", "index_copy", "masked_scatter", "dropout", "native_dropout"),
    *("view_copy", "permute_copy", "transpose_copy", "expand_copy", "slice_copy", "select_copy"),
}
# A matrix with at most this many rows mixes streams rather than the channels of one stream.
_FEW = 4
_NONE: frozenset[int] = frozenset()


class Carried(NamedTuple):
    """The inputs that bypass a layer's weights.

    Attributes:
        sources: For each leaf of the output, the index of the floating-point input that is added to
            it; None if the whole leaf has passed through the weights. Empty if that holds for all.
        is_mixed: Whether a leaf contains an input other than as a term of a sum (behind a norm,
            mixed with other streams, inside a closure), so that a difference cannot capture it.
    """

    sources: tuple[int | None, ...] = ()
    is_mixed: bool = False


class _Mark(NamedTuple):
    """The inputs that reach a tensor without a product with weights."""

    added: frozenset[int] = _NONE  # as terms of a sum
    mixed: frozenset[int] = _NONE  # in other ways

    @property
    def all(self) -> frozenset[int]:
        return self.added | self.mixed


def followed(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Carried]:
    """Runs a layer; returns its output and the inputs that bypass its weights.

    If its operators cannot be observed (flex attention, code that is always compiled), the layer
    runs again unobserved, and no input is assumed to bypass its weights.
    """
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    inputs = [x for x in given if x.is_floating_point()]
    versions = [None if x.is_inference() else x._version for x in given]
    following = _Following(given, inputs)
    try:
        with following:
            output = forward(*args, **kwargs)
    except RuntimeError as error:
        unchanged = versions == [None if x.is_inference() else x._version for x in given]
        if "dispatch mode" not in str(error) or not unchanged:
            raise
        return forward(*args, **kwargs), Carried()
    leaves, _ = taken_apart(output)
    return output, following.carried(leaves)


def sentence(path: str) -> str:
    """Returns the message why a layer's output cannot be reused."""
    return (
        f"the input of {path!r} bypasses its weights, but not as a term of a sum (the layer norms "
        "after adding, mixes several streams, or returns a closure over them), so reusing its "
        "output would discard what earlier layers compute; reuse its whole block: "
        'granularity="block"'
    )


class _Following(OperatorMode):
    """Propagates marks of inputs from tensor to tensor, operator by operator."""

    def __init__(self, given: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._inputs = inputs
        self._weighted: set[int] = set()  # inputs of a product with weights
        # By storage, so that views need no rule. The reference prevents reuse of an address.
        self._marks: dict[int, tuple[StorageWeakRef, _Mark]] = {}
        for x in given:
            number = next((i for i, known in enumerate(inputs) if known is x), None)
            known = self._mark(x) or _Mark()
            added = known.added if number is None else known.added | {number}
            self._put(x, _Mark(added))

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Marks the outputs of an operator."""
        operands = _tensors((args, kwargs))
        marks = [self._mark(x) for x in operands]
        if any(mark is not None for mark in marks):
            self._note(func, args, operands, marks, _tensors(out))

    def carried(self, leaves: Sequence[Any]) -> Carried:
        """Returns the inputs that bypass the weights, for the leaves of the layer's output."""
        sources: list[int | None] = []
        is_mixed = False
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                sources.append(None)
                is_mixed = is_mixed or (callable(leaf) and hides_tensors(leaf))
                continue
            mark = self._mark(leaf) or _Mark()
            fits = [i for i in mark.added if is_like(self._inputs[i], leaf)]
            fits.sort(key=lambda i: (i in sources, i not in self._weighted, i))
            sources.append(next(iter(fits), None))
            streams = (
                i
                for i in mark.all & self._weighted
                if self._inputs[i].numel() * _FEW >= leaf.numel()
            )
            is_mixed = is_mixed or (not fits and any(True for _ in streams))
        if all(source is None for source in sources):
            sources = []
        return Carried(tuple(sources), is_mixed)

    # ---------------------------------------------------------------------------------- marks

    def _mark(self, x: Tensor) -> _Mark | None:
        """Returns the mark of a tensor; None if it depends on no input."""
        storage = _storage(x)
        if storage is None:
            return None
        known = self._marks.get(storage._cdata)
        return None if known is None else known[1]

    def _put(self, x: Tensor, mark: _Mark) -> None:
        storage = _storage(x)
        if storage is not None:
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._marks[storage._cdata] = (reference, mark)

    def _note(
        self,
        func: Any,
        args: tuple[Any, ...],
        operands: list[Tensor],
        marks: list[_Mark | None],
        outputs: list[Tensor],
    ) -> None:
        """Marks the outputs of an operator that has marked operands."""
        schema = getattr(func, "_schema", None)
        name = str(getattr(func, "_opname", func)).rstrip("_")
        writes = schema is not None and schema.is_mutable
        if name.endswith("_like") or name.startswith(("new_", "empty")):
            return
        result = self._product(name, args, operands, marks) if _is_product(func, name) else None
        mark = result or _combined(name, operands, marks)
        before = {_key(x) for x in operands}
        for x in outputs:
            new = mark if x.is_floating_point() else _Mark()
            if _key(x) in before:
                if not writes:
                    continue  # a view
                old = self._mark(x)
                if old is not None and not _whole(x):  # the rest of the storage is unchanged
                    new = _Mark(new.added | old.added, new.mixed | old.mixed)
            self._put(x, new)

    def _product(
        self,
        name: str,
        args: tuple[Any, ...],
        operands: list[Tensor],
        marks: list[_Mark | None],
    ) -> _Mark:
        """Returns the mark of a product with weights, including the mark of an addend."""
        added = _Mark()
        if name in _ADD_A_PRODUCT:
            added, operands, marks = marks[0] or _Mark(), operands[1:], marks[1:]
        inputs = frozenset().union(*[mark.all for mark in marks if mark is not None])
        widths = [self._inputs[i].shape[-1] for i in inputs if self._inputs[i].ndim]
        if 2 * (size := _summed(name, args, operands)) <= max(widths, default=0) and size <= _FEW:
            return _Mark(added.added, added.mixed | inputs)
        self._weighted |= inputs
        return added


def _combined(name: str, operands: list[Tensor], marks: list[_Mark | None]) -> _Mark:
    """Returns the mark of the output of an operator other than a product with weights."""
    known = [mark for mark in marks if mark is not None]
    every = frozenset().union(*[mark.all for mark in known])
    added = frozenset().union(*[mark.added for mark in known])
    if name == "copy":
        return marks[1] or _Mark()
    if name in _KEPT:
        return _Mark(added, every - added)
    if name in ("mul", "div") and (scaled := _scaled(operands, marks)) is not None:
        return _Mark(scaled.added, every - scaled.added)
    if name == "lerp" and marks[-1] is None:
        return _Mark(added, every - added)
    if name in ("sub", "addcmul", "addcdiv"):
        first = (marks[0] or _Mark()).added
        return _Mark(first, every - first)
    return _Mark(mixed=every)


def _scaled(operands: list[Tensor], marks: list[_Mark | None]) -> _Mark | None:
    """Returns the mark of the single full-size factor that constants, gates or masks scale."""
    factors = [(x.numel(), mark) for x, mark in zip(operands, marks, strict=True) if mark]
    most = max(size for size, _ in factors)
    full = [mark for size, mark in factors if size == most]
    return full[0] if len(full) == 1 else None


def _is_product(func: Any, name: str) -> bool:
    """Whether an operator contracts its operands; assumed for operators outside ``aten``."""
    if getattr(func, "namespace", "") != "aten":
        return True
    return any(part in name for part in _PRODUCTS) and "upsample" not in name


def _summed(name: str, args: tuple[Any, ...], factors: list[Tensor]) -> int:
    """Returns the number of channels or streams over which a product sums."""
    if "attention" in name or "attn" in name or "lstm" in name or not factors:
        return _FEW + 1
    if "conv" in name:
        is_transposed = "transpose" in name or (name == "convolution" and args[6] is True)
        return factors[0].shape[1] if is_transposed else factors[1].shape[1]
    return factors[0].shape[-1] if factors[0].ndim else 1


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _storage(x: Tensor) -> torch.UntypedStorage | None:
    try:
        return x.untyped_storage()
    except (NotImplementedError, RuntimeError):  # for example, sparse tensors
        return None


def _key(x: Tensor) -> int:
    storage = _storage(x)
    return id(x) if storage is None else storage._cdata


def _whole(x: Tensor) -> bool:
    """Whether a tensor covers its whole storage."""
    storage = _storage(x)
    return storage is not None and x.numel() * x.element_size() >= storage.nbytes()
