"""One layer under a schedule: keeps what it computes while that is of use, and reuses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..errors import ScheduleMismatchError
from ..model import residual_stream
from ..model.outputs import (
    Writes,
    are_finite,
    float_tensors,
    form_of,
    has_form,
    hides_tensors,
    is_plain,
    taken_apart,
    tensors_given,
    written_into,
)
from ..model.residuals import are_swapped, bases_at, bases_of, copies_of, kept_of, plus
from ..steps.predictors import PREDICTORS, extrapolation_weights, last_uses, planned_sources
from ..tracking.branches import Place
from .buffers import Slots, refuse_indivisible
from .host_memory import Parked
from .summary import NOT_FINITE, OTHER_SHAPES, Tally

_ROUNDING = 1e-9  # within which weights sum to 1


@dataclass
class Call:
    """The call of a denoiser that is under way, the same for all layers.

    Attributes:
        number: Another one for every call; 0 between calls, when layers run as they are.
        step: Index of the solver step.
        branch: Number of the call's branch; None if it is not known, and nothing kept nor reused.
        reason: Why a value that is missing is missing.
        was_traced: Whether ``torch.compile`` has met a layer whose values are in no slots.
        stray: Told the path of a layer that runs between calls.
    """

    number: int = 0
    step: int = 0
    branch: int | None = 0
    reason: str = ""
    was_traced: bool = False
    stray: Callable[[str], None] | None = None
    _numbers: Iterator[int] = field(default_factory=partial(count, 1))

    def begin(self, step: int, branch: int | None, reason: str = "") -> None:
        """Begins with another call."""
        self.number, self.step, self.branch = next(self._numbers), step, branch
        self.reason = reason


@dataclass(slots=True)
class _Kept:
    """The output of one call, flattened: what was computed at a step, of use until another."""

    step: int
    last_use: int
    leaves: list[Any]
    nbytes: int
    rebuild: Callable[[list[Any]], Any]
    swapped: Tensor | None
    dtypes: list[torch.dtype | None]
    form: list[Any]
    sources: tuple[int | None, ...]  # the inputs that the leaves add to; of a block not known
    into: list[int | None]  # the input, by its number, that a leaf is and was written into
    is_plain: bool  # one tensor of floats on its device, to be returned as it is predicted

    def fetched(self) -> list[Any]:
        """The leaves, on their device."""
        return [leaf.fetch() if isinstance(leaf, Parked) else leaf for leaf in self.leaves]


class ReusedLayer:
    """Handler of one layer: computes or reuses as its row of the schedule says.

    A layer may be called several times in one call of the denoiser, and the denoiser several
    times in one step: each (branch of the step, use in the call) has values of its own.

    Args:
        path: The layer's path, for messages.
        computed: Whether the layer is computed, for every step.
        predictor: Name of the predictor.
        call: The call under way; a layer begins with it when it is first used in it.
        tally: Where to count.
        positions: Where each step lies on the predictor's axis; None for its index.
        gains: How much of a predicted change is taken at every step; None for all of it.
        weights: Of the last computed values at every step, the newest first, in place of a
            polynomial's; one table for all branches of guidance, or one for each.
        batch_parts: In how many parts the batch of a call holds branches that have their own.
        residual: Reuse what the module adds to its input instead of its output.
        follow: Find out in the first call whether the layer adds to its input, and do likewise.
        check_finite: Keep no value that has a NaN or an infinity; costs a wait for each.
        on_host: Keep values in host memory.
    """

    # More attributes than Python finds quickly in a dict.
    __slots__ = (
        *("_call", "_check_finite", "_computed", "_due", "_last_uses", "_never_reused", "_order"),
        *("_older_weight", "_path", "_positions", "_gains", "_residual", "_reusable_from"),
        *("_fitted", "_fitted_weights", "_parts"),
        *("_follow", "_sources"),
        *("_on_host", "_tally", "_weights", "following", "inner"),
        *("_kept", "_lost_in", "_not_finite", "_number", "_passes", "_spent_after", "_use"),
        *("_writes", "ran", "ran_before"),
        *("_active", "_here", "_in_graphs", "_is_seen", "_known_uses", "_missed", "_slots"),
    )

    def __init__(
        self,
        path: str,
        computed: Sequence[bool],
        predictor: str,
        call: Call,
        tally: Tally,
        *,
        positions: Sequence[float] | None = None,
        gains: Sequence[float] | None = None,
        weights: Sequence[Sequence[Sequence[float]]] = (),
        batch_parts: int = 1,
        residual: bool = False,
        follow: bool = False,
        check_finite: bool = False,
        on_host: bool = False,
    ) -> None:
        self._path = path
        self._computed = computed
        self._fitted = weights
        self._parts = batch_parts
        self._order = _order_of(weights[0]) if weights else PREDICTORS[predictor].order
        self._last_uses = last_uses(computed, self._order)
        steps = range(len(computed))
        self._due = [max((s for s in steps[: t + 1] if computed[s]), default=0) for t in steps]
        self._reusable_from = [len(computed) if computed[t] else self._due[t] for t in steps]
        self._call = call
        self._tally = tally
        self._positions = range(len(computed)) if positions is None else positions
        self._gains = (1.0,) * len(computed) if gains is None else gains
        self._weights = cache(self._weights_of)
        self._older_weight = cache(lambda older, newer, at: self._weights_of((older, newer), at)[0])
        self._fitted_weights = cache(self._fitted_weights_of)
        self._residual = residual
        self._follow = follow
        self._sources: dict[int, tuple[int | None, ...]] = {}  # by the number of inputs
        self._check_finite = check_finite
        self._on_host = on_host
        self._writes = Writes()
        self._kept: dict[Place, list[_Kept]] = {}
        self._spent_after = len(computed)  # no kept value is before this step
        self._not_finite: set[Place] = set()
        self._slots: dict[int | None, tuple[Slots, ...]] = {}
        self._here: tuple[Slots, ...] = ()  # those of the present call
        self._never_reused = all(last is None for last in self._last_uses)
        self._number = -1  # of the call that the layer was last used in
        self._lost_in = -1  # the call in which uses can no longer be told
        self._use = 0
        self._passes = False  # lets the layer run as it is, and counts
        self._in_graphs = self._is_seen = self._active = self._missed = False
        self._known_uses: int | None = None  # of which it is known which they are; None for all
        self.ran = self.ran_before = False  # in this generation; in an earlier one
        self.inner: list[ReusedLayer] = []  # those that do not run where this one is reused
        self.following: ReusedLayer | None = None  # the next one of the model

    @property
    def ever_ran(self) -> bool:
        return self.ran or self.ran_before

    def expire(self, step: int) -> None:
        """Drops what is of no use from a step on."""
        if self._kept and step > self._spent_after:
            self._drop(lambda place, kept: kept.last_use < step)
            left = [kept.last_use for history in self._kept.values() for kept in history]
            self._spent_after = min(left, default=len(self._computed))

    def prefetch(self) -> None:
        """Begins to bring to the device what this layer, or the next after it, will reuse first."""
        layer: ReusedLayer | None = self
        place, step = (self._call.branch, 0), self._call.step
        while layer is not None:
            history = layer._kept.get(place)
            if history is not None and history[-1].step >= layer._reusable_from[step]:
                for leaf in (leaf for kept in history for leaf in kept.leaves):
                    if isinstance(leaf, Parked):
                        leaf.prefetch()
                return
            layer = layer.following

    def lose_count(self) -> None:
        """Has the rest of this call of the denoiser compute: it is not known which uses these are.

        A block that is used twice may be reused in the first use alone; the layers in it then run
        for the first time in its second.
        """
        if not self._in_graphs:
            self._lost_in = self._call.number
        elif not self._passes:  # graphs must not read a number that is another at every call
            self._known_uses = self._use
        self._passes = True

    def forget(self, branch: int | None = None) -> None:
        """Drops all kept values, or those of one call of the step. Slots stay, without values."""
        self._not_finite = {place for place in self._not_finite if branch not in (None, place[0])}
        self._drop(lambda place, kept: branch is None or place[0] == branch)
        for number, uses in self._slots.items():
            if branch in (None, number):
                for slots in uses:
                    slots.forget()

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Answers a call of the layer; the way of a reuse is short, because Python is slow."""
        if self._in_graphs or is_dynamo_compiling():
            return self._call_in_graph(forward, args, kwargs)
        call = self._call
        use = self._use
        if self._number != call.number:
            if not call.number:
                if call.stray is not None:
                    call.stray(self._path)
                return forward(*args, **kwargs)
            self._number, use, self.ran = call.number, 0, True
            self._passes = self._never_reused or call.branch is None or self._lost_in == call.number
        self._use = use + 1
        if self._passes:
            self._count_as_computed(1)
            return forward(*args, **kwargs)
        step, place = call.step, (call.branch, use)
        history = self._kept.get(place)
        if history is not None:
            newest = history[-1]
            if newest.step >= self._reusable_from[step] and has_form(newest.form, args, kwargs):
                self._tally.reused += 1
                if self.inner:
                    self._pass_over_inner()
                oldest = history[0]
                if newest.is_plain:
                    if self._fitted:
                        return self._reuse(place, history, args, kwargs)
                    if oldest is newest:
                        if newest.last_use > step:
                            return newest.leaves[0].clone()
                        return self._handed_out(place, newest)
                    if oldest.last_use > step and len(history) == 2:
                        weight = self._older_weight(oldest.step, newest.step, step)
                        return torch.lerp(newest.leaves[0], oldest.leaves[0], weight)
                return self._reuse(place, history, args, kwargs)
        return self._run(place, history, forward, args, kwargs)

    def _pass_over_inner(self) -> None:
        for layer in self.inner:
            layer.lose_count()

    def _run(
        self,
        place: Place,
        history: list[_Kept] | None,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        step = self._call.step
        if self._computed[step]:
            self._tally.computed += 1
        else:
            self._tally.recompute(self._obstacle(place, history))
        if self._last_uses[step] is None and not self._is_seen:
            return forward(*args, **kwargs)
        return self._compute(place, forward, args, kwargs)

    def _obstacle(self, place: Place, history: list[_Kept] | None) -> str:
        """Why a planned reuse is not possible."""
        if history is not None and history[-1].step >= self._due[self._call.step]:
            return OTHER_SHAPES
        return NOT_FINITE if place in self._not_finite else self._call.reason

    def _count_as_computed(self, calls: int, reason: str = "") -> None:
        if self._computed[self._call.step]:
            self._tally.computed += calls
        elif calls:
            self._tally.recompute(reason or self._call.reason, calls)

    # -------------------------------------------------------------------------------- in graphs

    def begin_in_graphs(self, *, is_seen: bool) -> None:
        """Prepares for a call of a denoiser of which parts are compiled: values lie in slots.

        Args:
            is_seen: Whether the call runs uncompiled, and slots are made for what it keeps.
        """
        self._is_seen = is_seen
        self._in_graphs = self._active = not is_seen
        self._missed, self._here = False, ()
        if is_seen:
            return
        self._use = 0
        self._passes = self._never_reused or self._call.branch is None
        self._known_uses = 0 if self._passes else None
        self._here = self._slots.get(self._call.branch, ())
        for slots in self._here:
            due = self._reusable_from[self._call.step]
            slots.prepare(self._call.step, reuses=slots.newest >= due)

    def _call_in_graph(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What ``torch.compile`` traces, so that it reads nothing that counts calls."""
        if not self._in_graphs:
            self._call.was_traced = True
        if not self._active:
            return forward(*args, **kwargs)
        use = self._use
        self._use = use + 1
        if self._passes:
            return forward(*args, **kwargs)
        if use >= len(self._here):
            self._missed = True
            return forward(*args, **kwargs)
        if self._here[use].reuses:
            self._pass_over_inner()
        return self._here[use](forward, args, kwargs)

    @property
    def must_be_seen(self) -> bool:
        """Whether the last call had outputs that no slots fit, so that one must run uncompiled."""
        return self._missed or any(slots.is_misfit for slots in self._here)

    def end_in_graphs(self) -> None:
        """Counts what a call did, which graphs cannot, or makes slots for what it has kept."""
        was_called = self._active and self._use
        self._active = False
        if self._is_seen:
            self._is_seen, self._in_graphs = False, True
            self._move_into_slots()
        if not was_called:
            return
        self.ran = True
        known = self._use if self._known_uses is None else self._known_uses
        self._count_as_computed(self._use - known)
        for use, slots in enumerate(self._here[:known]):
            self._settle((self._call.branch, use), slots)
        self._count_as_computed(max(0, known - len(self._here)))

    def release(self, branch: int | None = None) -> None:
        """Gives up slots, all or those of one call of the step, and what is in them."""
        for number in list(self._slots):
            if branch in (None, number):
                self._tally.hold(-sum(slots.nbytes for slots in self._slots.pop(number)))

    def _settle(self, place: Place, slots: Slots) -> None:
        """Counts what a call did with its slots, and notes what is in them now."""
        if slots.is_misfit:
            slots.forget()
            self._count_as_computed(1, OTHER_SHAPES)
        elif slots.reuses:
            self._tally.reused += 1
        else:
            self._count_as_computed(1, NOT_FINITE if place in self._not_finite else "")
            slots.wrote(self._call.step)
            self._not_finite.discard(place)
            if self._check_finite and not slots.are_finite():
                self._not_finite.add(place)
                slots.forget()

    def _move_into_slots(self) -> None:
        """Makes slots like the values that an uncompiled call kept."""
        branch = self._call.branch
        found = sorted((place, h) for place, h in self._kept.items() if place[0] == branch)
        for place, history in found:
            newest = history[-1]
            shapes = [shape for shape, _ in newest.form]
            slots = Slots(
                newest,
                shapes,
                self._order,
                partial(self._fitted_weights, branch) if self._fitted else self._weights,
                residual=self._residual,
                parts=self._parts if self._fitted else None,
            )
            slots.fill([(kept.step, kept.leaves) for kept in history])
            self._slots[branch] = (*self._slots.get(branch, ()), slots)
            self._tally.hold(slots.nbytes)
            self._drop(partial(_is_at, place))

    # ---------------------------------------------------------------------------------- history

    def _compute(
        self,
        place: Place,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        given = tensors_given(args, kwargs)
        form = form_of(given)
        marks = self._writes.before(given)
        inputs = [x for x in given if x.is_floating_point()]
        sources = self._sources.get(len(inputs), ())
        unknown = self._follow and len(inputs) not in self._sources
        # Copies, because the layer may write into its input.
        copied = range(len(inputs)) if self._residual or unknown else sources
        inputs = copies_of(inputs, copied)
        if unknown:
            output, sources = self._followed(forward, args, kwargs)
        else:
            output = forward(*args, **kwargs)
        written = self._writes.after(given, marks)
        leaves, rebuild = taken_apart(output)
        if written or not isinstance(output, Tensor):
            self._refuse_side_effects(list(written.values()), output, leaves)
        if len(sources) not in (0, len(leaves)):  # returns something else than before
            self._sources.clear()
            return output
        if unknown:
            self._sources[len(inputs)] = sources
        swapped: Tensor | None = None
        if self._residual:
            swapped = are_swapped(leaves, inputs)
            bases = bases_of(leaves, inputs, swapped)
        else:
            bases = bases_at(sources, inputs, leaves)
        values = [kept_of(leaf, base) for leaf, base in zip(leaves, bases, strict=True)]
        if self._check_finite and not are_finite(values):
            self._not_finite.add(place)
            return output
        self._not_finite.discard(place)
        step = self._call.step
        last_use = self._last_uses[step]
        kept = _Kept(
            step,
            last_use=-1 if last_use is None else last_use,
            leaves=values,
            nbytes=sum([x.nbytes for x in values if isinstance(x, Tensor)]),
            rebuild=rebuild,
            swapped=swapped,
            dtypes=[x.dtype if isinstance(x, Tensor) else None for x in leaves],
            form=form,
            sources=sources,
            into=[next((i for i, x in written.items() if x is leaf), None) for leaf in leaves],
            is_plain=is_plain(output)
            and not (written or self._residual or sources or self._on_host),
        )
        if self._on_host:
            kept.leaves = [Parked(x) if isinstance(x, Tensor) else x for x in values]
        self._keep(place, kept)
        return output

    def _followed(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[int | None, ...]]:
        """Runs the layer, and says which inputs its leaves add to.

        Raises:
            ScheduleMismatchError: If it carries one on in a way that no difference keeps.
        """
        output, carried = residual_stream.followed(forward, args, kwargs)
        if carried.is_mixed:
            raise ScheduleMismatchError(residual_stream.sentence(self._path))
        return output, carried.sources

    def _refuse_side_effects(self, written: list[Tensor], output: Any, leaves: list[Any]) -> None:
        name = self._path or "the model"
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise ScheduleMismatchError(
                f"{name!r} returned no tensor but {type(output).__name__}, so skipping it would "
                "lose what it does to its input; leave it out of the schedule"
            )
        if hiding := next(filter(hides_tensors, leaves), None):
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

    def _keep(self, place: Place, kept: _Kept) -> None:
        history = self._kept.setdefault(place, [])
        if history and history[-1].form != kept.form:  # no polynomial goes through both
            self._tally.hold(-sum(old.nbytes for old in history))
            history.clear()
        history.append(kept)
        if kept.last_use < self._spent_after:
            self._spent_after = kept.last_use
        self._tally.hold(kept.nbytes)
        if len(history) > self._order + 1:
            self._tally.hold(-history.pop(0).nbytes)

    def _reuse(
        self,
        place: Place,
        history: list[_Kept],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        newest, step = history[-1], self._call.step
        is_last = newest.last_use <= step
        if newest.is_plain:
            output = self._combined([kept.leaves[0] for kept in history], history, consume=is_last)
        else:
            values = self._predicted(history, consume=is_last)
            if self._residual or newest.sources:
                inputs = float_tensors((args, kwargs))
                bases = (
                    bases_of(values, inputs, newest.swapped)
                    if self._residual
                    else bases_at(newest.sources, inputs, values)
                )
                values = [
                    plus(value, base, dtype)
                    for value, base, dtype in zip(values, bases, newest.dtypes, strict=True)
                ]
            output = newest.rebuild(written_into(newest.into, values, args, kwargs))
        if is_last:
            del self._kept[place]
        while history and history[0].last_use <= step:  # an older one is never of use longer
            self._tally.held_bytes -= history.pop(0).nbytes
        return output

    def _handed_out(self, place: Place, kept: _Kept) -> Any:
        """The only value, at its last use, without a copy."""
        del self._kept[place]
        if not self._kept:
            self._spent_after = len(self._computed)
        self._tally.held_bytes -= kept.nbytes
        return one_of(kept.leaves[0], consume=True)

    def _predicted(self, history: list[_Kept], *, consume: bool) -> list[Any]:
        if self._on_host and self.following is not None:
            self.following.prefetch()
        leaves = zip(*[kept.fetched() for kept in history], strict=True)
        consume = consume or self._on_host
        return [self._combined(values, history, consume=consume) for values in leaves]

    def _combined(self, values: Sequence[Any], history: list[_Kept], *, consume: bool) -> Any:
        if self._fitted:
            steps = tuple([kept.step for kept in history])
            tables = self._fitted_weights(self._call.branch, steps, self._call.step)
            return combined_by_part(values, tables, consume=consume)
        if len(values) == 1:
            return one_of(values[0], consume=consume)
        weights = self._weights(tuple([kept.step for kept in history]), self._call.step)
        return combined(values, weights, consume=consume)

    def _weights_of(self, steps: tuple[int, ...], at: int) -> list[float]:
        """Weights of what was computed at some steps, the newest last, in a reuse at another."""
        known = [self._positions[step] for step in steps]
        return extrapolation_weights(known, self._positions[at], self._gains[at])

    def _fitted_weights_of(
        self, branch: int | None, steps: tuple[int, ...], at: int
    ) -> list[list[float]]:
        """The same by fitted weights, for each part of the batch."""
        tables = self._fitted
        if len(tables) == 1:
            chosen = tables
        else:
            first = (branch or 0) * self._parts
            chosen = tables[first : first + self._parts]
        if len(chosen) < self._parts and len(tables) > 1:
            raise ScheduleMismatchError(
                f"the weights of {self._path or 'the model'!r} were fitted to {len(tables)} "
                f"branches of guidance, {self._parts} in each call, and this is a call of another "
                "one; sample with the guidance that they were fitted to, or fit them anew"
            )
        sources = planned_sources(self._computed, at, len(chosen[0][at]))
        if not sources or not set(sources) <= set(steps):
            return [self._weights_of(steps, at)] * len(chosen)
        weight_of = [dict(zip(sources, reversed(table[at]), strict=True)) for table in chosen]
        return [[weights.get(step, 0.0) for step in steps] for weights in weight_of]

    def _drop(self, is_spent: Callable[[Place, _Kept], bool]) -> None:
        for place, history in list(self._kept.items()):
            spent = [kept for kept in history if is_spent(place, kept)]
            self._tally.hold(-sum(kept.nbytes for kept in spent))
            if len(spent) == len(history):
                del self._kept[place]
            elif spent:
                self._kept[place] = [kept for kept in history if not is_spent(place, kept)]


def _order_of(weights: Sequence[Sequence[float]]) -> int:
    """Of a polynomial that combines as many values; at least 1, so that a lone one is weighed."""
    return max(2, *map(len, weights)) - 1


def _is_at(place: Place, at: Place, _: _Kept) -> bool:
    return at == place


def combined(values: Sequence[Any], weights: list[float], *, consume: bool) -> Any:
    """The weighted sum of a leaf's kept values; whoever gets it may write into it."""
    newest = values[-1]
    if not isinstance(newest, Tensor) or not newest.is_floating_point():
        return one_of(newest, consume=consume)
    if len(values) == 1:
        return one_of(newest, consume=consume) if weights[0] == 1 else newest * weights[0]
    # Where weights sum to 1, only differences need them: equal values give that value exactly.
    total: Tensor = torch.lerp(newest, values[0], weights[0])
    for value, weight in zip(values[1:-1], weights[1:-1], strict=True):
        total.add_(value - newest, alpha=weight)
    excess = sum(weights) - 1
    return total.add_(newest, alpha=excess) if abs(excess) > _ROUNDING else total


def combined_by_part(
    values: Sequence[Any], weights: Sequence[list[float]], *, consume: bool
) -> Any:
    """The same with weights of its own for each of equal parts of the batch."""
    newest = values[-1]
    is_whole = not isinstance(newest, Tensor) or not newest.is_floating_point() or not newest.ndim
    if len(weights) == 1 or is_whole:
        return combined(values, weights[0], consume=consume)
    refuse_indivisible(len(newest), len(weights))
    parts = zip(*[value.chunk(len(weights)) for value in values], strict=True)
    pairs = zip(parts, weights, strict=True)
    return torch.cat([combined(part, given, consume=False) for part, given in pairs])


def one_of(value: Any, *, consume: bool) -> Any:
    """A kept leaf for whoever may write into it: a copy, unless it is of no use any more."""
    if not isinstance(value, Tensor):
        return value
    if consume and (not value.is_inference() or torch.is_inference_mode_enabled()):
        return value
    return value.clone()
