"""Attaches handlers to a model's layers and a clock to its denoisers, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

from torch import nn

from ..errors import AlreadyCachedError, ScheduleMismatchError
from ..model.arguments import Signature
from ..model.target import Target
from ..steps.noise_scheduler import announced_timesteps, solver_position, solver_stages
from . import intercept
from .branches import Branches
from .clock import Clock
from .dynamo import between_graphs, eagerly, has_compiled_parts, refuse_export, traced, uncompiled
from .intercept import Handler
from .listener import CallListener, CallMode, DenoiserCall
from .timesteps import timestep_value
from .turns import Turn, TwoThreadsError, two_threads_error


class Attachment:
    """Handlers on the layers of a model and a listener for the calls of its denoisers.

    Args:
        model: Pipeline or module.
        modules: The layers' modules, by path.
        handlers: The handler that each module's forward goes through, by path.
        listener: Called before and after every call of a denoiser, and after a failed call.
        expected: Timesteps of the schedule's calibration, if known.
        planned: Number of steps of a generation, if known.
        altered: Called when a denoiser's own method changes its weights or adapters.

    Raises:
        AlreadyCachedError: If a part of the model is intercepted already; nothing is altered.
    """

    def __init__(
        self,
        model: Any,
        modules: Mapping[str, nn.Module],
        handlers: Mapping[str, Handler],
        listener: CallListener,
        expected: Sequence[float] | None = None,
        planned: int | None = None,
        altered: Callable[[], None] | None = None,
    ) -> None:
        target = Target.of(model)
        denoisers = target.denoisers
        _refuse_if_taken({**denoisers, **modules})
        self.denoisers = denoisers
        self.clock = Clock(
            lambda: announced_timesteps(target.noise_scheduler),
            expected,
            lambda: solver_position(target.noise_scheduler),
            planned,
            lambda: solver_stages(target.noise_scheduler),
        )
        self.listener = listener
        self.planned = planned
        self.branches = {name: Branches() for name in denoisers}
        self.turn = Turn()
        self.is_compiled = False  # until a compiled part is found
        self._intercepted: list[nn.Module] = []
        try:
            for name, denoiser in denoisers.items():
                handler = _DenoiserHandler(self, name, denoiser, handlers.get(name))
                self._intercept(denoiser, handler.call, outside=True)
                if altered is not None:
                    intercept.notice_changes(denoiser, altered)
            for path, module in modules.items():
                if path not in denoisers:
                    self._intercept(module, handlers[path])
        except BaseException:
            self.remove()
            raise

    def _intercept(self, module: nn.Module, handler: Handler, *, outside: bool = False) -> None:
        intercept.intercept(module, handler, outside=outside)
        self._intercepted.append(module)

    def remove(self) -> None:
        """Restores every module to its original state."""
        while self._intercepted:
            intercept.release(self._intercepted.pop())


class _DenoiserHandler:
    """Handler of a denoiser: finds the step and branch of each call and notifies the listener."""

    def __init__(
        self, attachment: Attachment, name: str, denoiser: nn.Module, handler: Handler | None
    ) -> None:
        self._attachment = attachment
        self._name = name
        self._denoiser = denoiser
        self._handler = handler
        self._signature = Signature(denoiser)
        # Wrapped here rather than at definition, which would load the compiler at import.
        self.call = MethodType(between_graphs(_DenoiserHandler._call), self)
        self._begin, self._end = eagerly(self._begin_call), eagerly(self._end_call)
        self._uncompiled = eagerly(uncompiled)

    def _call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        refuse_export()
        attachment = self._attachment
        attachment.is_compiled = attachment.is_compiled or traced()[1]
        call, mode = self._begin(args, kwargs)
        try:
            handler = None if call is None else self._handler
            if mode is CallMode.UNCOMPILED:
                traced()
                output = self._uncompiled(handler or _run, forward, args, kwargs)
            elif handler is not None:
                output = handler(forward, args, kwargs)
            else:  # called directly, so that the graph begins at the model's own code
                output = forward(*args, **kwargs)
        except BaseException:
            self._end(call, failed=True)
            raise
        self._end(call)
        return output

    def _begin_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[DenoiserCall | None, CallMode]:
        """Returns the call, or None outside any generation, and the mode in which it runs."""
        attachment = self._attachment
        attachment.turn.enter()
        try:
            return self._place(args, kwargs)
        except BaseException as error:
            if not isinstance(error, TwoThreadsError):
                self._abort_generation()
            attachment.turn.leave()
            raise

    def _end_call(self, call: DenoiserCall | None, *, failed: bool = False) -> None:
        try:
            if failed:
                self._abort_generation()
            elif call is not None:
                self._attachment.listener.after(call)
        except BaseException:
            self._abort_generation()
            raise
        finally:
            self._attachment.turn.leave()

    def _abort_generation(self) -> None:
        self._attachment.clock.forget()
        self._attachment.listener.failed()

    def _place(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[DenoiserCall | None, CallMode]:
        inputs = self._signature.sort(args, kwargs)
        if inputs.timestep is None:
            raise ScheduleMismatchError(
                f"{type(self._denoiser).__name__} was called without a timestep, so the solver "
                "step is unknown; make such calls before enable() or after disable()"
            )
        attachment = self._attachment
        turn, clock = attachment.turn, attachment.clock
        before = clock.snapshot() if turn.is_of_another_thread else None
        tick = clock.tick(inputs.timestep, inputs.latents)
        if not tick.inside:
            attachment.listener.outside()
            return None, CallMode.AS_IT_IS
        if before is not None:
            value = timestep_value(inputs.timestep)
            if not tick.starts and turn.is_of_another(value, inputs.latents, before.sketch):
                clock.restore(before)
                clock.forget()
                tick = clock.tick(inputs.timestep, inputs.latents)
            is_announced = clock.announced_list is not before.announced_list
            if turn.refuses(value, inputs.latents, starts=tick.starts, is_announced=is_announced):
                clock.restore(before)
                raise two_threads_error()
        turn.take(clock, is_last=tick.step + 1 == attachment.planned)
        if tick.starts:
            for branches in attachment.branches.values():
                branches.forget()
        context = intercept.context_name(self._denoiser)
        branch = attachment.branches[self._name].number(
            tick.step,
            inputs.conditioning,
            context,
            inputs.latents,
            stages=attachment.clock.stages(tick.step),
            position=attachment.clock.position,
            same_generation=tick.same_generation,
        )
        if tick.starts and not attachment.is_compiled:
            attachment.is_compiled = has_compiled_parts(self._denoiser)
        call = DenoiserCall(self._name, tick, branch, args, kwargs)
        mode = attachment.listener.before(call)
        return call, mode if attachment.is_compiled else CallMode.AS_IT_IS


def _run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _refuse_if_taken(modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        name = f"{path!r} ({type(module).__name__})" if path else type(module).__name__
        if intercept.is_intercepted(module):
            raise AlreadyCachedError(
                f"{name} already runs under smoothcache; disable that first, or leave its block"
            )
        if getattr(module, "is_cache_enabled", False):
            raise AlreadyCachedError(
                f"{name} already runs under a cache of diffusers; call its disable_cache() first"
            )
