"""Runs a model under a schedule: ``cached`` for a block of code, ``enable`` until disabled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import (
    InvalidArgumentError,
    ScheduleMismatchError,
    SmoothCacheError,
    SmoothCacheWarning,
)
from ..layers.find import find_layers
from ..layers.modules import identify
from ..model.denoisers import warn_of_randomness
from ..model.target import Target
from ..schedule.schedule import Schedule
from ..tracking.attachment import Attachment
from ..tracking.listener import CallListener, CallMode, DenoiserCall
from . import refusals
from .reused_layers import ReusedLayers
from .summary import OTHER_SHAPES, Summary, Tally
from .without_effect import WithoutEffect

Store = Literal["device", "cpu"]
"""Where kept values are stored: on the layer's device, or in host memory."""
NEVER_SEEN = "no value had been computed for this call"
_OTHER_GENERATION = "it could have been another generation's value"
_UNKNOWN_BRANCH = "the calls of a step could not be told apart"


@contextmanager
def cached(
    model: Any, schedule: Schedule, *, check_finite: bool = False, store: Store = "device"
) -> Iterator[Run]:
    """Runs a model under a schedule inside a ``with`` block.

    Args:
        model: A diffusers pipeline (all of its denoisers) or any module.
        schedule: What to compute and what to reuse at every step.
        check_finite: Recompute and count a layer whose kept value has a NaN or infinity, instead
            of reusing it. Costs a host sync per kept value.
        store: Where kept values are stored: on the layer's device ("device"), or in host memory
            ("cpu"), from which they are copied for each reuse. On CUDA, host memory is pinned and
            values are prefetched.

    Yields:
        The run, whose ``summary()`` is available during the block and after it.

    Raises:
        ScheduleMismatchError: If the schedule does not fit the model, which is then unchanged, or
            if the number of steps of a generation differs from the schedule's.
        AlreadyCachedError: If the model already runs under a schedule.
        InvalidArgumentError: If ``store`` is neither "device" nor "cpu".
        SmoothCacheError: If ``store`` is "cpu" and the model is compiled.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> with cached(model, Schedule.uniform(model, num_steps=4, interval=2)) as run:
        ...     pass  # run the sampler here
        >>> run.summary().finished
        0
    """
    run = _enabled(model, schedule, check_finite, store, stacklevel=5)
    try:
        yield run
        message = run._end_message()
    finally:
        run._detach()
    run._refuse_too_few_steps()
    if message:
        warnings.warn(message, SmoothCacheWarning, stacklevel=3)


def enable(
    model: Any, schedule: Schedule, *, check_finite: bool = False, store: Store = "device"
) -> Run:
    """Runs a model under a schedule until the returned handle is disabled.

    Arguments and errors are those of ``cached``.

    Args:
        model: A diffusers pipeline (all of its denoisers) or any module.
        schedule: What to compute and what to reuse at every step.
        check_finite: Recompute a layer whose kept value has a NaN or infinity.
        store: Where kept values are stored: on the layer's device ("device"), or in host memory
            ("cpu").

    Returns:
        The run; ``disable()`` ends it.

    Raises:
        ScheduleMismatchError: If the schedule does not fit the model, which is then unchanged.
        AlreadyCachedError: If the model already runs under a schedule.
        InvalidArgumentError: If ``schedule`` is not a ``Schedule``, or ``store`` is neither
            "device" nor "cpu".
        SmoothCacheError: If ``store`` is "cpu" and the model is compiled.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> handle = enable(model, Schedule.uniform(model, num_steps=4, interval=2))
        >>> handle.disable()
    """
    return _enabled(model, schedule, check_finite, store, stacklevel=4)


def _enabled(
    model: Any, schedule: Schedule, check_finite: bool, store: Store, stacklevel: int
) -> Run:
    if not isinstance(schedule, Schedule):
        raise InvalidArgumentError(
            f"expected a Schedule, got {type(schedule).__name__}; plan one, or Schedule.load a file"
        )
    if store not in get_args(Store):
        raise InvalidArgumentError(f"store must be 'device' or 'cpu', got {store!r}.")
    target = Target.of(model)
    warn_of_randomness(target.denoisers, stacklevel)
    target = _planned_part(target, schedule)
    return Run(target, bound_schedule(target, schedule), check_finite, store)


def bound_schedule(model: Any, schedule: Schedule) -> Schedule:
    """Returns the schedule bound to this model's layers.

    Raises:
        ScheduleMismatchError: If it does not fit the model.
    """
    target = _planned_part(Target.of(model), schedule)
    layers = find_layers(target) if schedule.layers is None else schedule.layers
    return schedule.bind(layers, identify(target))


def _planned_part(target: Target, schedule: Schedule) -> Target:
    """Returns the pipeline, or only the denoiser that the schedule was planned for."""
    denoisers = target.denoisers
    if schedule.model is None or len(denoisers) == 1 or identify(target) == schedule.model:
        return target
    fitting = [name for name, part in denoisers.items() if identify(part) == schedule.model]
    return target.only(fitting[0]) if len(fitting) == 1 else target


# A long class: it is both the user's handle and the listener for every call.
class Run(CallListener):
    """A model running under a schedule.

    Attributes:
        schedule: The schedule, bound to the model's layers.
        report: What ``accelerate`` measured; None under ``enable`` and ``cached``.
    """

    report: Any = None

    def __init__(
        self, model: Any, schedule: Schedule, check_finite: bool = False, store: Store = "device"
    ) -> None:
        target = Target.of(model)
        self.schedule = schedule
        self._denoisers = target.denoisers
        self._on_host = store == "cpu"
        self._tally = Tally()
        self._layers = ReusedLayers(
            target,
            schedule,
            self._tally,
            check_finite=check_finite,
            on_host=self._on_host,
            on_outside=self._layer_ran_outside,
        )
        self._without_effect = WithoutEffect(target, schedule, self._tally)
        self._shapes: dict[tuple[str, int | None], Any] = {}  # input shapes in this generation
        self._seen: dict[tuple[str, int | None], Any] = {}  # input shapes that have slots
        self._finished = self._broken_off = self._outside = 0
        self._steps_seen = 0
        self._calls = self._calls_before = 0  # in this step, and in the one before
        self._reused_before_call = 0
        self._reusing: set[tuple[str, int | None]] = set()  # denoisers and branches, in this step
        self._open = self._was_called = False
        self._is_outside = False
        self._attachment: Attachment | None = None
        # Bound methods, which Python calls faster than objects with ``__call__``.
        handlers = {path: layer.__call__ for path, layer in self._layers.by_path.items()}
        self._attachment = attachment = Attachment(
            target,
            self._layers.modules,
            handlers,
            self,
            schedule.timesteps,
            schedule.num_steps,
            self._forget,
        )
        self._clock = attachment.clock

    # ------------------------------------------------------------------------------ public API

    def disable(self) -> None:
        """Restores the model and frees all kept values.

        Raises:
            SmoothCacheError: If the run is already disabled.
        """
        if self._attachment is None:
            raise SmoothCacheError("this run has been disabled already")
        message = self._end_message()
        self._detach()
        for text in filter(None, (message, self._about_too_few_steps())):
            warnings.warn(text, SmoothCacheWarning, stacklevel=2)

    def reset(self) -> None:
        """Ends the current generation; the next call of the model starts a new one."""
        self._clock.forget()
        if self._attachment is not None:
            self._attachment.turn.forget()
        self._forget()
        self._close_generation()

    def summary(self) -> Summary:
        """Reports what was computed and reused so far.

        Returns:
            Counts of generations, steps, layer calls and bytes up to now.
        """
        is_complete = self._open and self._steps_seen >= self.schedule.num_steps
        return Summary(
            schedule=self.schedule,
            finished=self._finished + is_complete,
            broken_off=self._broken_off,
            steps_under_way=self._steps_seen if self._open and not is_complete else 0,
            computed=self._tally.computed,
            reused=self._tally.reused,
            outside=self._outside,
            recomputed=dict(self._tally.recomputed),
            peak_bytes=self._tally.peak_bytes,
            held_bytes=self._tally.held_bytes,
            never_ran=self._layers.never_ran(),
        )

    # ---------------------------------------------------------------------------------- calls

    def before(self, call: DenoiserCall) -> CallMode:
        """Prepares the layers for a call of a denoiser.

        In a compiled model, the first call with each set of input shapes runs uncompiled.
        """
        denoiser, tick, branch = call.denoiser, call.tick, call.branch
        self._is_outside = False
        refusals.refuse_checkpointing(self._denoisers[denoiser])
        if tick.starts:
            self._begin_generation()
        refusals.refuse_too_many_steps(tick.step, self.schedule.num_steps)
        self._steps_seen = tick.step + 1
        if tick.call == 0:
            self._calls, self._calls_before = 0, self._calls
            self._reusing.clear()
            for layer in self._layers:
                layer.expire(tick.step) if tick.same_generation else layer.forget()
        self._calls += 1
        self._reused_before_call = self._tally.reused
        self._refuse_confused_branches(denoiser, tick.step)
        reason = self._refresh(call)
        if self._on_host and self._is_compiled:
            refusals.refuse_host_memory_when_compiled()
        must_be_seen = self._is_compiled and self._must_be_seen(denoiser, branch)
        self._layers.call_of[denoiser].begin(tick.step, branch, reason)
        layers = self._layers.by_denoiser[denoiser]
        if self._is_compiled:
            for layer in layers:
                layer.begin_in_graphs(is_seen=must_be_seen)
        if self._on_host and layers:
            layers[0].prefetch()
        return CallMode.UNCOMPILED if must_be_seen else CallMode.AS_IT_IS

    def after(self, call: DenoiserCall) -> None:
        """Lets the layers run as they are until the next call."""
        place = call.denoiser, call.branch
        self._end_call(call.denoiser)
        self._was_called = True
        layers = self._layers.by_denoiser[call.denoiser]
        if self._seen and any(layer.compiled.must_be_seen for layer in layers):
            self._seen.pop(place, None)
        if self._tally.reused > self._reused_before_call:
            self._reusing.add(place)
        if call.tick.step == self.schedule.num_steps - 1:
            self._drop_unused(call)
            self._without_effect.end_generation(self._layers)

    def outside(self) -> None:
        """Counts a call outside any generation; it is computed in full."""
        self._outside += 1
        self._is_outside = True

    def failed(self) -> None:
        """Forgets a generation that an exception has interrupted."""
        for denoiser in self._denoisers:
            self._end_call(denoiser)
        self._forget()
        self._broken_off += self._open
        self._open = False

    @property
    def _is_compiled(self) -> bool:
        """Whether a compiled part of the model has been found."""
        return self._attachment is not None and self._attachment.is_compiled

    def _end_call(self, denoiser: str) -> None:
        call = self._layers.call_of[denoiser]
        call.end()
        if self._is_compiled:
            for layer in self._layers.by_denoiser[denoiser]:
                layer.end_in_graphs()
        elif call.was_traced and self._attachment is not None:
            self._attachment.is_compiled = True

    def _layer_ran_outside(self, path: str) -> None:
        self._without_effect.layer_ran_outside(path, is_expected=self._is_outside)

    # ---------------------------------------------------------------------------- generations

    def _begin_generation(self) -> None:
        self._close_generation()
        self._shapes.clear()
        self._layers.begin_generation()
        refusals.refuse_other_step_count(self._clock.num_steps, self.schedule.num_steps)
        self._without_effect.begin_generation()
        self._open = True

    def _refresh(self, call: DenoiserCall) -> str:
        """Drops values that this call must not reuse; returns why values may be missing."""
        if call.branch is None:
            return _UNKNOWN_BRANCH
        place, shapes = (call.denoiser, call.branch), _shapes((call.args, call.kwargs))
        known = self._shapes.get(place, shapes)
        self._shapes[place] = shapes
        if call.tick.same_generation and known == shapes:
            return NEVER_SEEN
        for layer in self._layers.by_denoiser[call.denoiser]:
            layer.forget(call.branch)
        return OTHER_SHAPES if known != shapes else _OTHER_GENERATION

    def _must_be_seen(self, denoiser: str, branch: int | None) -> bool:
        """Whether the call must run uncompiled, because its outputs may have no fitting slots."""
        shapes = self._shapes.get((denoiser, branch))
        if branch is None or self._seen.get((denoiser, branch)) == shapes:
            return False
        self._seen[denoiser, branch] = shapes
        for layer in self._layers.by_denoiser[denoiser]:
            layer.release(branch)
        return True

    def _refuse_confused_branches(self, denoiser: str, step: int) -> None:
        attachment = self._attachment
        confused = None if attachment is None else attachment.branches[denoiser].confused
        if confused is not None and (denoiser, confused) in self._reusing:
            refusals.refuse_confused_branches(step)

    def _drop_unused(self, call: DenoiserCall) -> None:
        """Drops a branch's values after its call in the last step, and all after the last call.

        The last step is expected to have as many calls as the step before. A branch that is absent
        from the step before and returns in the last step is computed.
        """
        if call.branch is not None:
            for layer in self._layers.by_denoiser[call.denoiser]:
                layer.forget(call.branch)
        last = self.schedule.num_steps - 1
        stages = (self._clock.stages(last) or 1) / (self._clock.stages(last - 1) or 1)
        if self._calls >= self._calls_before * stages:
            self._layers.forget()

    def _forget(self) -> None:
        self._shapes.clear()
        self._layers.forget()

    def _close_generation(self) -> None:
        if self._open:
            is_complete = self._steps_seen >= self.schedule.num_steps
            self._finished += is_complete
            self._broken_off += not is_complete
        self._open = False

    # ------------------------------------------------------------------------------------ end

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
            self._forget()
            for layer in self._layers:
                layer.release()

    def _end_message(self) -> str:
        """Returns the warning about layers that ran outside the denoisers, or an empty string."""
        was_called = self._was_called or self._broken_off > 0
        return self._without_effect.message(was_called=was_called)

    def _about_too_few_steps(self) -> str:
        """Returns the message for a last generation that ended early, or an empty string.

        With an announced list of timesteps, the generation was interrupted, so there is none.
        """
        planned = self.schedule.num_steps
        if not self._open or self._clock.num_steps is not None or self._steps_seen >= planned:
            return ""
        return refusals.about_too_few_steps(self._steps_seen, planned)

    def _refuse_too_few_steps(self) -> None:
        if message := self._about_too_few_steps():
            raise ScheduleMismatchError(message)


def _shapes(arguments: Any) -> list[Any]:
    leaves = pytree.tree_leaves(arguments)
    return [(x.shape, x.dtype, x.device) for x in leaves if isinstance(x, Tensor)]
