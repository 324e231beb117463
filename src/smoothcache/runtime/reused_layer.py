"""One layer under a schedule: keeps computed values until their last use, and reuses them."""

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


# A long class, because the reuse path is inlined in one method to save function calls.
class ReusedLayer:
    """Handler of one layer: computes or reuses according to its row of the schedule.

    A layer may be called several times in one call of the denoiser, and the denoiser several
    times in one step. Each (branch of the step, use in the call) has separate values.

    Args:
        plan: The layer's row of the schedule.
        call: The current call of the denoiser.
        tally: Counters of the run.
        residual: Reuse the difference between the module's output and its input.
        follow: Detect in the first call whether the layer adds to its input, and if so reuse the
            difference.
        check_finite: Keep no value with a NaN or infinity; costs a host sync per value.
        on_host: Keep values in host memory.

    Attributes:
        ran: Whether the layer ran in this generation.
        ran_before: Whether it ran in an earlier generation.
        compiled: Handler that replaces this one in compiled code.
        following: Next layer of the denoiser.
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
        # Attributes that the reuse path reads, stored here to save look-ups.
        self._values = self._kept.of
        self._computed, self._reusable_from = plan.computed, plan.reusable_from
        self._is_fitted, self._never_reused = plan.is_fitted, plan.never_reused
        self._older_weight = cache(lambda older, newer, at: plan.weights((older, newer), at)[0])
        self._not_finite: set[Place] = set()
        self._number = -1  # number of the call in which the layer was last used
        self._lost_in = -1  # number of the call in which uses can no longer be numbered
        self._use = 0
        self._bypassed = False  # run the layer unchanged and count the call
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
        """Layers nested in this one, which do not run when it is reused."""
        return self._inner

    @inner.setter
    def inner(self, layers: Sequence[ReusedLayer]) -> None:
        self._inner = list(layers)
        self.compiled.inner = [layer.compiled for layer in layers]

    # ----------------------------------------------------------------------------------- calls

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Computes or reuses; the reuse path is kept short for speed."""
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
            self._bypassed = (
                self._never_reused or call.branch is None or self._lost_in == call.number
            )
        self._use = use + 1
        if self._bypassed:
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
        """Computes all later uses in this denoiser call, because they can no longer be numbered.

        If a block is used twice and only its first use is reused, the layers in it first run in
        its second use.
        """
        self._lost_in = self._call.number
        self._bypassed = True

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
            self._tally.recompute(self._recompute_reason(place, history))
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

    def _recompute_reason(self, place: Place, history: list[KeptValue] | None) -> str:
        """Returns why a planned reuse is not possible."""
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
        """Drops values that are unused from a step on."""
        self._kept.expire(step)

    def prefetch(self) -> None:
        """Starts copying the values of the next reused layer to the device, from this one on."""
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
        """Drops the kept values of one branch, or all of them; the slots remain allocated."""
        self._not_finite = {place for place in self._not_finite if branch not in (None, place[0])}
        self._kept.forget(branch)
        self.compiled.forget(branch)

    def release(self, branch: int | None = None) -> None:
        """Frees the slots of one branch, or all slots."""
        self.compiled.release(branch)

    def begin_in_graphs(self, *, is_seen: bool) -> None:
        """Prepares for a call of a denoiser with compiled parts, whose values are in slots.

        Args:
            is_seen: Whether the call runs uncompiled to create slots for the values that it keeps.
        """
        self._is_seen, self._in_graphs = is_seen, not is_seen
        if is_seen:
            self.compiled.rest()
        else:
            self.compiled.begin()

    def end_in_graphs(self) -> None:
        """Counts the calls in compiled code, or creates slots for values of an uncompiled call."""
        if self._is_seen:
            self._is_seen, self._in_graphs = False, True
            for place in sorted(place for place in self._values if place[0] == self._call.branch):
                self.compiled.adopt(self._values[place])
                self._kept.take(place)
        self.ran |= self.compiled.end()
