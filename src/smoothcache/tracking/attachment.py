"""Puts handlers before a model's layers and a clock before its denoisers, all or none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, Protocol

from torch import nn

from ..errors import AlreadyCachedError, ScheduleMismatchError
from ..model.arguments import Signature
from ..model.denoisers import find_denoisers
from ..steps.noise_scheduler import (
    announced_timesteps,
    noise_scheduler,
    solver_position,
    solver_stages,
)
from . import intercept
from .branches import Branches
from .clock import Clock, Tick
from .dynamo import between_graphs, eagerly, has_compiled_parts, refuse_export, traced, uncompiled
from .intercept import Handler
from .timesteps import timestep_value
from .turns import Turn, TwoThreadsError, two_threads_error


class Listener(Protocol):
    """Is told of every call of a denoiser."""

    def before(
        self, denoiser: str, tick: Tick, branch: int | None, args: tuple[Any, ...], kwargs: Any
    ) -> bool:
        """Says whether a compiled model is to run uncompiled, to see what its layers return."""

    def outside(self) -> None: ...

    def after(self, denoiser: str, tick: Tick) -> None: ...

    def failed(self) -> None: ...


class Attachment:
    """Handlers on the layers of a model, and a listener to the calls of its denoisers.

    Args:
        model: Pipeline or module.
        modules: The layers' modules, by path.
        handlers: What each of them asks first, by path.
        listener: Told before and after every call of a denoiser, and of a call that failed.
        expected: The timesteps that the schedule was measured at, if known.
        planned: Steps that a generation should have, if known.
        altered: Told when weights or adapters of a denoiser change by a method of its own.

    Raises:
        AlreadyCachedError: If a part of the model is intercepted already; nothing is altered.
    """

    def __init__(
        self,
        model: Any,
        modules: Mapping[str, nn.Module],
        handlers: Mapping[str, Handler],
        listener: Listener,
        expected: Sequence[float] | None = None,
        planned: int | None = None,
        altered: Callable[[], None] | None = None,
    ) -> None:
        denoisers = find_denoisers(model)
        _refuse_if_taken({**denoisers, **modules})
        self.denoisers = denoisers
        self.clock = Clock(
            lambda: announced_timesteps(noise_scheduler(model)),
            expected,
            lambda: solver_position(noise_scheduler(model)),
            planned,
            lambda: solver_stages(noise_scheduler(model)),
        )
        self.listener = listener
        self.planned = planned
        self.branches = {name: Branches() for name in denoisers}
        self.turn = Turn()
        self.is_compiled = False  # as far as is known
        self._intercepted: list[nn.Module] = []
        try:
            for name, denoiser in denoisers.items():
                placed = _Placed(self, name, denoiser, handlers.get(name))
                self._intercept(denoiser, placed.call, outside=True)
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
        """Leaves every module as it was found."""
        while self._intercepted:
            intercept.release(self._intercepted.pop())


class _Placed:
    """A denoiser's handler: places each call in its generation and tells the listener."""

    def __init__(
        self, attachment: Attachment, name: str, denoiser: nn.Module, handler: Handler | None
    ) -> None:
        self._attachment = attachment
        self._name = name
        self._denoiser = denoiser
        self._handler = handler
        self._signature = Signature(denoiser)
        # Here, and not where they are defined, because that would load the compiler at import.
        self.call = MethodType(between_graphs(_Placed._call), self)
        self._begin, self._end = eagerly(self._begun), eagerly(self._ended)
        self._uncompiled = eagerly(uncompiled)

    def _call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        refuse_export()
        attachment = self._attachment
        attachment.is_compiled = attachment.is_compiled or traced()[1]
        tick, as_it_is = self._begin(args, kwargs)
        try:
            handler = self._handler if tick.inside else None
            if as_it_is:
                traced()
                output = self._uncompiled(handler or _run, forward, args, kwargs)
            elif handler is not None:
                output = handler(forward, args, kwargs)
            else:  # not by way of _run, so that the model's own code is where the graph begins
                output = forward(*args, **kwargs)
        except BaseException:
            self._end(tick, failed=True)
            raise
        self._end(tick)
        return output

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tick, bool]:
        """Places a call and prepares for it; says whether it is to run uncompiled."""
        attachment = self._attachment
        attachment.turn.enter()
        try:
            return self._place(args, kwargs)
        except BaseException as error:
            if not isinstance(error, TwoThreadsError):
                self._broken_off()
            attachment.turn.leave()
            raise

    def _ended(self, tick: Tick, *, failed: bool = False) -> None:
        try:
            if failed:
                self._broken_off()
            elif tick.inside:
                self._attachment.listener.after(self._name, tick)
        except BaseException:
            self._broken_off()
            raise
        finally:
            self._attachment.turn.leave()

    def _broken_off(self) -> None:
        self._attachment.clock.forget()
        self._attachment.listener.failed()

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tick, bool]:
        call = self._signature.sort(args, kwargs)
        if call.timestep is None:
            raise ScheduleMismatchError(
                f"{type(self._denoiser).__name__} was called without a timestep, so the step "
                "cannot be told; keep such calls apart from sampling"
            )
        attachment = self._attachment
        before = attachment.clock.snapshot()
        tick = attachment.clock.tick(call.timestep, call.latents)
        if not tick.inside:
            attachment.listener.outside()
            return tick, False
        turn, clock = attachment.turn, attachment.clock
        if turn.is_of_another_thread:
            value = timestep_value(call.timestep)
            was_under_way = before["_sketch"]
            if not tick.starts and turn.is_of_another(value, call.latents, was_under_way):
                clock.restore(before)
                clock.forget()
                tick = clock.tick(call.timestep, call.latents)
            is_announced = clock.announced_list is not before["_list"]
            if turn.refuses(value, call.latents, starts=tick.starts, is_announced=is_announced):
                clock.restore(before)
                raise two_threads_error()
        turn.take(clock, is_last=tick.step + 1 == attachment.planned)
        if tick.starts:
            for branches in attachment.branches.values():
                branches.forget()
        context = intercept.context_name(self._denoiser)
        branch = attachment.branches[self._name].number(
            tick.step,
            call.conditioning,
            context,
            call.latents,
            stages=attachment.clock.stages(tick.step),
            position=attachment.clock.position,
            vouched=tick.vouched,
        )
        if tick.starts and not attachment.is_compiled:
            attachment.is_compiled = has_compiled_parts(self._denoiser)
        as_it_is = attachment.listener.before(self._name, tick, branch, args, kwargs)
        return tick, as_it_is and attachment.is_compiled


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
