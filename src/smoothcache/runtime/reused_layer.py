"""One layer under a schedule: keeps what it computes while that is of use, and reuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from ..model.outputs import has_form
from ..tracking.branches import Place
from .call import Call
from .capture import Capture
from .combine import one_of
from .compiled_layer import CompiledLayer
from .kept import KeptValue, KeptValues
from .row_plan import RowPlan
from .summary import NOT_FINITE, OTHER_SHAPES, Tally


# Longer than most classes, because the way of a reuse stands in one method: calls cost time.
class ReusedLayer:
    """Handler of one layer: computes or reuses as its row of the schedule says.

    A layer may be called several times in one call of the denoiser, and the denoiser several
    times in one step: each (branch of the step, use in the call) has values of its own.

    Args:
        plan: What the schedule says of the layer.
        call: The call under way; a layer begins with it when it is first used in it.
        tally: Where to count.
        residual: Reuse what the module adds to its input instead of its output.
        follow: Find out in the first call whether the layer adds to its input, and do likewise.
        check_finite: Keep no value that has a NaN or an infinity; costs a wait for each.
        on_host: Keep values in host memory.

    Attributes:
        ran: Whether the layer ran in this generation.
        ran_before: Whether it ran in an earlier one.
        compiled: What runs in compiled code in place of this.
        following: The next layer of the denoiser.
    """

    def __init__(
        self,
        plan: RowPlan,
        call: Call,
        tally: Tally,
        *,
        residual: bool = False,
        follow: bool = False,
        check_finite: bool = False,
        on_host: bool = False,
    ) -> None:
        self._plan = plan
        self._call = call
        self._tally = tally
        self._on_host = on_host
        self._capture = Capture(
            plan.path,
            residual=residual,
            follow=follow,
            check_finite=check_finite,
            on_host=on_host,
        )
        self._kept = KeptValues(len(plan.computed), plan.order, tally)
        # What the way of a reuse reads, one look-up away.
        self._values = self._kept.of
        self._computed, self._reusable_from = plan.computed, plan.reusable_from
        self._is_fitted, self._never_reused = plan.is_fitted, plan.never_reused
        self._older_weight = cache(lambda older, newer, at: plan.weights((older, newer), at)[0])
        self._not_finite: set[Place] = set()
        self._number = -1  # of the call that the layer was last used in
        self._lost_in = -1  # the call in which uses can no longer be told
        self._use = 0
        self._passes = False  # lets the layer run as it is, and counts
        self._in_graphs = self._is_seen = False
        self.compiled = CompiledLayer(
            plan, call, tally, residual=residual, check_finite=check_finite
        )
        self.ran = self.ran_before = False
        self._inner: list[ReusedLayer] = []
        self.following: ReusedLayer | None = None

    @property
    def path(self) -> str:
        """The layer's path."""
        return self._plan.path

    @property
    def ever_ran(self) -> bool:
        """Whether the layer ran in this generation or an earlier one."""
        return self.ran or self.ran_before

    @property
    def inner(self) -> Sequence[ReusedLayer]:
        """Layers that do not run where this one is reused."""
        return self._inner

    @inner.setter
    def inner(self, layers: Sequence[ReusedLayer]) -> None:
        self._inner = list(layers)
        self.compiled.inner = [layer.compiled for layer in layers]

    # ----------------------------------------------------------------------------------- calls

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Answers a call of the layer; the way of a reuse is short, because Python is slow."""
        if self._in_graphs or is_dynamo_compiling():
            if not self._in_graphs:
                self._call.was_traced = True
            return self.compiled(forward, args, kwargs)
        call = self._call
        use = self._use
        if self._number != call.number:
            if not call.number:
                if call.on_outside is not None:
                    call.on_outside(self._plan.path)
                return forward(*args, **kwargs)
            self._number, use, self.ran = call.number, 0, True
            self._passes = self._never_reused or call.branch is None or self._lost_in == call.number
        self._use = use + 1
        if self._passes:
            self._count_as_computed()
            return forward(*args, **kwargs)
        step, place = call.step, (call.branch, use)
        history = self._values.get(place)
        if history is not None:
            newest = history[-1]
            if newest.step >= self._reusable_from[step] and has_form(newest.form, args, kwargs):
                self._tally.reused += 1
                if self._inner:
                    for layer in self._inner:
                        layer.lose_count()
                oldest = history[0]
                if newest.is_plain:
                    if self._is_fitted:
                        return self._reuse(place, history, args, kwargs)
                    if oldest is newest:
                        if newest.last_use > step:
                            return newest.leaves[0].clone()
                        return one_of(self._kept.take(place).leaves[0], consume=True)
                    if oldest.last_use > step and len(history) == 2:
                        weight = self._older_weight(oldest.step, newest.step, step)
                        return torch.lerp(newest.leaves[0], oldest.leaves[0], weight)
                return self._reuse(place, history, args, kwargs)
        return self._run(place, history, forward, args, kwargs)

    def lose_count(self) -> None:
        """Has the rest of this call of the denoiser compute: it is not known which uses these are.

        A block that is used twice may be reused in the first use alone; the layers in it then run
        for the first time in its second.
        """
        self._lost_in = self._call.number
        self._passes = True

    def _run(
        self,
        place: Place,
        history: list[KeptValue] | None,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        step = self._call.step
        if self._computed[step]:
            self._tally.computed += 1
        else:
            self._tally.recompute(self._obstacle(place, history))
        last_use = self._plan.last_uses[step]
        if last_use is None and not self._is_seen:
            return forward(*args, **kwargs)
        output, value = self._capture.run(forward, args, kwargs, step, last_use)
        if value is not None:
            self._not_finite.discard(place)
            self._kept.add(place, value)
        elif self._capture.found_not_finite:
            self._not_finite.add(place)
        return output

    def _obstacle(self, place: Place, history: list[KeptValue] | None) -> str:
        """Why a planned reuse is not possible."""
        if history is not None and history[-1].step >= self._plan.due[self._call.step]:
            return OTHER_SHAPES
        return NOT_FINITE if place in self._not_finite else self._call.reason

    def _count_as_computed(self) -> None:
        if self._computed[self._call.step]:
            self._tally.computed += 1
        else:
            self._tally.recompute(self._call.reason)

    def _reuse(
        self,
        place: Place,
        history: list[KeptValue],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        newest, call = history[-1], self._call
        is_last = newest.last_use <= call.step
        steps = tuple([kept.step for kept in history])

        def combined(values: Sequence[Any], *, consume: bool) -> Any:
            return self._plan.combined(values, steps, call.branch, call.step, consume=consume)

        if newest.is_plain:
            output = combined([kept.leaves[0] for kept in history], consume=is_last)
        else:
            if self._on_host and self.following is not None:
                self.following.prefetch()
            leaves = zip(*[kept.fetched() for kept in history], strict=True)
            consume = is_last or self._on_host
            values = [combined(leaf, consume=consume) for leaf in leaves]
            output = newest.output(values, args, kwargs)
        self._kept.release_used(place, call.step)
        return output

    # ----------------------------------------------------------------------- between the calls

    def expire(self, step: int) -> None:
        """Drops what is of no use from a step on."""
        self._kept.expire(step)

    def prefetch(self) -> None:
        """Begins to bring to the device what this layer, or the next after it, will reuse first."""
        layer: ReusedLayer | None = self
        place, step = (self._call.branch, 0), self._call.step
        while layer is not None:
            history = layer._values.get(place)
            if history is not None and history[-1].step >= layer._reusable_from[step]:
                for kept in history:
                    kept.prefetch()
                return
            layer = layer.following

    def forget(self, branch: int | None = None) -> None:
        """Drops all kept values, or those of one branch. Slots stay, without values."""
        self._not_finite = {place for place in self._not_finite if branch not in (None, place[0])}
        self._kept.forget(branch)
        self.compiled.forget(branch)

    def release(self, branch: int | None = None) -> None:
        """Gives up slots, all or those of one branch, and what is in them."""
        self.compiled.release(branch)

    def begin_in_graphs(self, *, is_seen: bool) -> None:
        """Prepares for a call of a denoiser of which parts are compiled: values lie in slots.

        Args:
            is_seen: Whether the call runs uncompiled, and slots are made for what it keeps.
        """
        self._is_seen, self._in_graphs = is_seen, not is_seen
        if is_seen:
            self.compiled.rest()
        else:
            self.compiled.begin()

    def end_in_graphs(self) -> None:
        """Counts what a call did, or makes slots for what it has kept."""
        if self._is_seen:
            self._is_seen, self._in_graphs = False, True
            for place in sorted(place for place in self._values if place[0] == self._call.branch):
                self.compiled.adopt(self._values[place])
                self._kept.take(place)
        self.ran |= self.compiled.end()
