"""One layer under a schedule in compiled code, with kept values in slots.

Compiled code must not read Python values that differ between steps, so nothing is counted inside a
graph. A graph sees flags and tensors; its layer calls are counted after the call of the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..tracking.branches import Place
from .buffers import Slots
from .call import Call
from .kept import KeptValue
from .row_plan import RowPlan
from .summary import NOT_FINITE, OTHER_SHAPES, Tally


class CompiledLayer:
    """Handler of one layer in compiled code.

    Args:
        plan: The layer's row of the schedule.
        call: The current call of the denoiser.
        tally: Counters of the run.
        residual: Whether to keep the difference between the layer's output and its input.
        check_finite: Reuse no value with a NaN or infinity; costs a host sync per value.

    Attributes:
        inner: Layers nested in this one, which do not run when it is reused.
    """

    def __init__(
        self, plan: RowPlan, call: Call, tally: Tally, *, residual: bool, check_finite: bool
    ) -> None:
        self._plan = plan
        self._call = call
        self._tally = tally
        self._residual = residual
        self._check_finite = check_finite
        self._slots: dict[int | None, tuple[Slots, ...]] = {}  # branch -> slots of each use
        self._current: tuple[Slots, ...] = ()  # slots of the current call
        self._not_finite: set[Place] = set()
        self._use = 0
        self._known_uses: int | None = None  # number of uses that can be numbered; None for all
        self._active = self._bypassed = self._missed = False
        self.inner: list[CompiledLayer] = []

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Computes or reuses; this is the code that ``torch.compile`` traces."""
        if not self._active:
            return forward(*args, **kwargs)
        use = self._use
        self._use = use + 1
        if self._bypassed:
            return forward(*args, **kwargs)
        if use >= len(self._current):
            self._missed = True
            return forward(*args, **kwargs)
        if self._current[use].reuses:
            for layer in self.inner:
                layer.lose_count()
        return self._current[use](forward, args, kwargs)

    def lose_count(self) -> None:
        """Computes all later uses in this call, because they can no longer be numbered."""
        if not self._bypassed:
            self._known_uses = self._use
        self._bypassed = True

    # ----------------------------------------------------------------------- between the calls

    def begin(self) -> None:
        """Prepares for a call of a denoiser."""
        call, plan = self._call, self._plan
        self._active, self._missed = True, False
        self._use = 0
        self._bypassed = plan.never_reused or call.branch is None
        self._known_uses = 0 if self._bypassed else None
        self._current = self._slots.get(call.branch, ())
        for slots in self._current:
            slots.prepare(call.step, reuses=slots.newest >= plan.reusable_from[call.step])

    def rest(self) -> None:
        """Prepares for a call that runs uncompiled and bypasses this handler."""
        self._active = self._missed = False
        self._current = ()

    @property
    def must_be_seen(self) -> bool:
        """Whether the last call had outputs without fitting slots, so one must run uncompiled."""
        return self._missed or any(slots.is_misfit for slots in self._current)

    def end(self) -> bool:
        """Counts the layer calls of a denoiser call and returns whether there were any."""
        was_called = self._active and self._use > 0
        self._active = False
        if not was_called:
            return False
        known = self._use if self._known_uses is None else self._known_uses
        self._count_as_computed(self._use - known)
        for use, slots in enumerate(self._current[:known]):
            self._settle((self._call.branch, use), slots)
        self._count_as_computed(max(0, known - len(self._current)))
        return True

    def adopt(self, history: list[KeptValue]) -> None:
        """Creates slots for the next use of this branch and fills them with values.

        Args:
            history: Values kept by an uncompiled call, the oldest first.
        """
        branch, plan = self._call.branch, self._plan

        def weights(steps: tuple[int, ...], at: int) -> Any:
            if plan.is_fitted:
                return plan.fitted_weights(branch, steps, at)
            return plan.weights(steps, at)

        newest = history[-1]
        slots = Slots(
            newest,
            [shape for shape, _ in newest.form],
            plan.order,
            weights,
            residual=self._residual,
            parts=plan.batch_parts if plan.is_fitted else None,
        )
        slots.fill([(value.step, value.leaves) for value in history])
        self._slots[branch] = (*self._slots.get(branch, ()), slots)
        self._tally.hold(slots.nbytes)

    def forget(self, branch: int | None = None) -> None:
        """Drops the values of one branch, or all values; the slots remain allocated."""
        self._not_finite = {place for place in self._not_finite if branch not in (None, place[0])}
        for number, uses in self._slots.items():
            if branch in (None, number):
                for slots in uses:
                    slots.forget()

    def release(self, branch: int | None = None) -> None:
        """Frees the slots of one branch, or all slots."""
        for number in list(self._slots):
            if branch in (None, number):
                self._tally.hold(-sum(slots.nbytes for slots in self._slots.pop(number)))

    def _settle(self, place: Place, slots: Slots) -> None:
        """Counts what a call did with its slots and updates their state."""
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

    def _count_as_computed(self, calls: int, reason: str = "") -> None:
        if self._plan.computed[self._call.step]:
            self._tally.computed += calls
        elif calls:
            self._tally.recompute(reason or self._call.reason, calls)
