"""One layer under a schedule: keeps what it computes while that is of use, and reuses it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._content import are_equal, digest, version
from ._eager import between_graphs, eagerly
from .errors import ScheduleMismatchError
from .predictors import PREDICTORS, extrapolation_weights, last_uses

Place = tuple[int | None, int]
"""Branch, and use in the call."""
OTHER_SHAPES = "the shape of the inputs had changed"
NOT_FINITE = "what had been computed was not finite"


@dataclass
class Tally:
    """What the layers of a run did, counted as they do it.

    Attributes:
        computed: Layer calls that ran the layer, as planned.
        reused: Layer calls answered from kept values.
        recomputed: Layer calls that were to reuse but had to compute, by the reason.
        held_bytes: Bytes of the values kept at this moment.
        peak_bytes: The most that ``held_bytes`` has been.
        reason: Why a value that is missing in the present call is missing.
    """

    computed: int = 0
    reused: int = 0
    recomputed: dict[str, int] = field(default_factory=dict)
    held_bytes: int = 0
    peak_bytes: int = 0
    reason: str = ""

    def hold(self, change: int) -> None:
        """Counts bytes that are kept from now on, or no longer (negative)."""
        self.held_bytes += change
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)


@dataclass
class _Kept:
    """The output of one call, flattened: what was computed at a step, of use until another."""

    step: int
    last_use: int
    leaves: list[Any]
    rebuild: Callable[[list[Any]], Any]
    swapped: Tensor | None
    dtypes: list[torch.dtype | None]
    form: list[Any]
    into: list[int | None]  # the input, by its number, that a leaf is and was written into

    @property
    def nbytes(self) -> int:
        # Not Tensor.nbytes, which fails while torch.compile traces with symbolic shapes.
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class ReusedLayer:
    """Handler of one layer: computes or reuses as its row of the schedule says.

    A layer may be called several times in one call of the denoiser, and the denoiser several
    times in one step: each (branch of the step, use in the call) has values of its own.

    Args:
        path: The layer's path, for messages.
        computed: Whether the layer is computed, for every step.
        predictor: Name of the predictor.
        tally: Where to count.
        positions: Where each step lies on the predictor's axis; None for its index.
        gains: How much of a predicted change is taken at every step; None for all of it.
        residual: Reuse what the module adds to its input instead of its output.
        check_finite: Keep no value that has a NaN or an infinity; costs a wait for each.
    """

    def __init__(
        self,
        path: str,
        computed: Sequence[bool],
        predictor: str,
        tally: Tally,
        *,
        positions: Sequence[float] | None = None,
        gains: Sequence[float] | None = None,
        residual: bool = False,
        check_finite: bool = False,
    ) -> None:
        self._path = path
        self._computed = computed
        self._order = PREDICTORS[predictor].order
        self._last_uses = last_uses(computed, self._order)
        steps = range(len(computed))
        self._due = [max((s for s in steps[: t + 1] if computed[s]), default=0) for t in steps]
        self._tally = tally
        self._positions = range(len(computed)) if positions is None else positions
        self._gains = (1.0,) * len(computed) if gains is None else gains
        self._residual = residual
        self._check_finite = check_finite
        self._writes = _Writes()
        self._kept: dict[Place, list[_Kept]] = {}
        self._not_finite: set[Place] = set()
        self._active = False
        self._step = self._use = 0
        self._branch: int | None = 0
        self.ran = self.ran_before = False  # in this generation; in an earlier one
        self.inner: list[ReusedLayer] = []  # those that do not run where this one is reused

    @property
    def ever_ran(self) -> bool:
        return self.ran or self.ran_before

    def expire(self, step: int) -> None:
        """Drops what is of no use from a step on."""
        if self._kept:
            self._drop(lambda place, kept: kept.last_use < step)

    def begin(self, step: int, branch: int | None) -> None:
        """Prepares for a call of the denoiser; one of no known branch neither keeps nor reuses."""
        self._step, self._branch, self._use = step, branch, 0
        self._active = True

    def lose_count(self) -> None:
        """Has the rest of this call of the denoiser compute: it is not known which uses these are.

        A block that is used twice may be reused in the first use alone; the layers in it then run
        for the first time in its second.
        """
        self._branch = None

    def end(self) -> None:
        """Lets the layer run as it is until the next call of the denoiser."""
        self._active = False

    def forget(self, branch: int | None = None) -> None:
        """Drops all kept values, or those of one call of the step."""
        self._not_finite = {place for place in self._not_finite if branch not in (None, place[0])}
        self._drop(lambda place, kept: branch is None or place[0] == branch)

    @between_graphs
    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._active:
            return forward(*args, **kwargs)
        self.ran = True
        place = (self._branch, self._use)
        self._use += 1
        if self._computed[self._step]:
            self._tally.computed += 1
        elif reason := self._obstacle(place, args, kwargs):
            self._tally.recomputed[reason] = self._tally.recomputed.get(reason, 0) + 1
        else:
            self._tally.reused += 1
            for layer in self.inner:
                layer.lose_count()
            return self._reuse(place, args, kwargs)
        if self._branch is None or self._last_uses[self._step] is None:
            return forward(*args, **kwargs)
        return self._compute(place, forward, args, kwargs)

    @eagerly
    def _obstacle(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why a planned reuse is not possible; nothing if it is."""
        history = self._kept.get(place)
        if not history or history[-1].step < self._due[self._step]:
            return NOT_FINITE if place in self._not_finite else self._tally.reason
        return "" if history[-1].form == _form_of(args, kwargs) else OTHER_SHAPES

    @between_graphs
    def _compute(
        self,
        place: Place,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        inputs: list[Tensor] = []
        if self._residual:  # copies, because the block may write into its input
            inputs = [x.detach().clone() for x in _float_tensors((args, kwargs))]
        form = _form_of(args, kwargs)
        given = _tensors((args, kwargs))
        marks = self._writes.before(given)
        output = forward(*args, **kwargs)
        written = self._writes.after(given, marks)
        self._refuse_side_effects(list(written.values()), output)
        return self._taken(place, output, inputs, form, written)

    @eagerly
    def _refuse_side_effects(self, written: list[Tensor], output: Any) -> None:
        leaves, _ = taken_apart(output)
        name = self._path or "the model"
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise ScheduleMismatchError(
                f"{name!r} returned no tensor but {type(output).__name__}, so skipping it would "
                "lose what it does to its input; leave it out of the schedule"
            )
        if hiding := next(filter(_hides_tensors, leaves), None):
            raise ScheduleMismatchError(
                f"{name!r} returned a {type(hiding).__name__} with tensors in it that could not be "
                "exchanged at reuse (as those in tuples, mappings and dataclasses are); leave it "
                "out of the schedule"
            )
        if {id(x) for x in written} - {id(leaf) for leaf in leaves}:
            raise ScheduleMismatchError(
                f"{name!r} writes into a tensor that it is given, which skipping it would "
                "lose; leave it out of the schedule"
            )

    @eagerly
    def _taken(
        self,
        place: Place,
        output: Any,
        inputs: list[Tensor],
        form: list[Any],
        written: dict[int, Tensor],
    ) -> Any:
        leaves, rebuild = taken_apart(output)
        swapped = _swapped(leaves, inputs)
        bases = _bases(leaves, inputs, swapped)
        values = [_minus(leaf, base) for leaf, base in zip(leaves, bases, strict=True)]
        if self._check_finite and not _are_finite(values):
            self._not_finite.add(place)
            return output
        self._not_finite.discard(place)
        last_use = self._last_uses[self._step]
        last_use = -1 if last_use is None else last_use
        dtypes = [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in leaves]
        into = [next((i for i, x in written.items() if x is leaf), None) for leaf in leaves]
        kept = _Kept(self._step, last_use, values, rebuild, swapped, dtypes, form, into)
        self._keep(place, kept)
        return output

    def _keep(self, place: Place, kept: _Kept) -> None:
        history = self._kept.setdefault(place, [])
        if history and history[-1].form != kept.form:  # no polynomial goes through both
            self._tally.hold(-sum(old.nbytes for old in history))
            history.clear()
        history.append(kept)
        self._tally.hold(kept.nbytes)
        if len(history) > self._order + 1:
            self._tally.hold(-history.pop(0).nbytes)

    @eagerly
    def _reuse(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        history = self._kept[place]
        newest = history[-1]
        known = [self._positions[kept.step] for kept in history]
        at, gain = self._positions[self._step], self._gains[self._step]
        weights = extrapolation_weights(known, at, gain)
        is_last = newest.last_use <= self._step
        values = [
            combined([kept.leaves[i] for kept in history], weights, consume=is_last)
            for i in range(len(newest.leaves))
        ]
        if self._residual:
            inputs = _float_tensors((args, kwargs))
            bases = _bases(values, inputs, newest.swapped)
            values = [
                _plus(value, base, dtype)
                for value, base, dtype in zip(values, bases, newest.dtypes, strict=True)
            ]
        if any(i is not None for i in newest.into):
            given = _tensors((args, kwargs))
            values = [
                value if i is None else given[i].copy_(value)
                for i, value in zip(newest.into, values, strict=True)
            ]
        self._drop(lambda at, kept: at == place and kept.last_use <= self._step)
        return newest.rebuild(values)

    def _drop(self, is_spent: Callable[[Place, _Kept], bool]) -> None:
        for place, history in list(self._kept.items()):
            spent = [kept for kept in history if is_spent(place, kept)]
            self._tally.hold(-sum(kept.nbytes for kept in spent))
            if len(spent) == len(history):
                del self._kept[place]
            elif spent:
                self._kept[place] = [kept for kept in history if not is_spent(place, kept)]


def combined(values: list[Any], weights: list[float], *, consume: bool) -> Any:
    """The weighted sum of a leaf's kept values; whoever gets it may write into it."""
    newest = values[-1]
    if not isinstance(newest, Tensor):
        return newest
    if len(values) == 1 or not newest.is_floating_point():
        is_foreign = newest.is_inference() and not torch.is_inference_mode_enabled()
        return newest.clone() if is_foreign or not consume else newest
    # The weights sum to 1, so only differences need them: equal values give that value exactly.
    total: Tensor = torch.lerp(newest, values[0], weights[0])
    for value, weight in zip(values[1:-1], weights[1:-1], strict=True):
        total.add_(value - newest, alpha=weight)
    return total


# --------------------------------------------------------------------------- inputs and outputs


def _form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Shapes and types of the tensors that a layer is given."""
    form: list[Any] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            form.append((value.shape, value.dtype))
        elif isinstance(value, list | tuple | dict):
            leaves = pytree.tree_leaves(value)
            form += [(x.shape, x.dtype) for x in leaves if isinstance(x, Tensor)]
    return form


class _Writes:
    """Notices which of the tensors that it is given a layer writes into.

    In inference mode nothing counts writes. There the contents are compared instead, in the first
    call; a layer does not change its habits.
    """

    def __init__(self) -> None:
        self._habits: set[int] | None = None

    @eagerly
    def before(self, given: list[Tensor]) -> list[Any]:
        """What ``after`` compares with."""
        is_known = self._habits is not None
        return [digest(x) if version(x) is None and not is_known else version(x) for x in given]

    @eagerly
    def after(self, given: list[Tensor], marks: list[Any]) -> dict[int, Tensor]:
        """The tensors that were written into, by their number."""
        pairs = list(enumerate(zip(given, marks, strict=True)))
        written = {i: x for i, (x, mark) in pairs if version(x) != mark and version(x) is not None}
        uncounted = {i: x for i, (x, _) in pairs if version(x) is None}
        if uncounted and self._habits is None:
            self._habits = {
                i
                for i, x in uncounted.items()
                if marks[i] is not None and not are_equal(marks[i], digest(x))
            }
        return written | {i: x for i, x in uncounted.items() if i in (self._habits or ())}


def taken_apart(output: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of an output, and how to put others in their place.

    Dataclasses and mappings in it are taken apart too; a tensor in two places is one leaf.
    """
    leaves, whole = _parts(output)
    first = {id(leaf): i for i, leaf in reversed(list(enumerate(leaves)))}
    places = [first[id(leaf)] if isinstance(leaf, Tensor) else i for i, leaf in enumerate(leaves)]
    own = [i for i, place in enumerate(places) if i == place]
    sources = [own.index(place) for place in places]
    return [leaves[i] for i in own], lambda values: whole(iter([values[i] for i in sources]))


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


def _hides_tensors(leaf: Any) -> bool:
    """Whether a leaf has tensors in it that nobody can exchange."""
    return not isinstance(leaf, Tensor | type) and bool(_tensors(dict(_vars(leaf))))


def _refilled(whole: Any, attributes: dict[str, Any], items: dict[Any, Any]) -> Any:
    for name, value in attributes.items():
        object.__setattr__(whole, name, value)
    for key, value in items.items():
        whole[key] = value
    return whole


def _are_finite(values: list[Any]) -> bool:
    tensors = [x for x in values if isinstance(x, Tensor) and x.device.type != "meta"]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


# ------------------------------------------------------------------- residuals of whole blocks


def _tensors(arguments: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]


def _float_tensors(arguments: Any) -> list[Tensor]:
    return [x for x in _tensors(arguments) if x.is_floating_point()]


def _swapped(outputs: list[Any], inputs: list[Tensor]) -> Tensor | None:
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


def _bases(outputs: list[Any], inputs: list[Tensor], swapped: Tensor | None) -> list[Tensor | None]:
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


def _minus(leaf: Any, base: Tensor | None) -> Any:
    """A value to keep: a copy of its own, that no later in-place operation can alter."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone() if base is None else leaf.detach() - base


def _plus(value: Any, base: Tensor | None, dtype: torch.dtype | None) -> Any:
    return value if base is None else (value + base).to(dtype)
