"""Puts handlers before a model's layers and a clock before its denoisers, all or none of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from . import _intercept
from ._branches import Branches
from ._content import are_unrelated, sketch
from ._eager import (
    between_graphs,
    eagerly,
    has_compiled_parts,
    refuse_export,
    traced,
    uncompiled,
)
from ._intercept import Handler
from .clock import Clock, Tick, timestep_value
from .denoisers import (
    Signature,
    announced_timesteps,
    find_denoisers,
    noise_scheduler,
    solver_position,
    solver_stages,
)
from .errors import AlreadyCachedError, ScheduleMismatchError, SmoothCacheError


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
        self.turn = _Turn()
        self.is_compiled = False  # as far as is known
        self._intercepted: list[nn.Module] = []
        try:
            for name, denoiser in denoisers.items():
                placed = _Placed(self, name, denoiser, handlers.get(name))
                self._intercept(denoiser, placed.call, outside=True)
                if altered is not None:
                    _intercept.notice_changes(denoiser, altered)
            for path, module in modules.items():
                if path not in denoisers:
                    self._intercept(module, handlers[path])
        except BaseException:
            self.remove()
            raise

    def _intercept(self, module: nn.Module, handler: Handler, *, outside: bool = False) -> None:
        _intercept.intercept(module, handler, outside=outside)
        self._intercepted.append(module)

    def remove(self) -> None:
        """Leaves every module as it was found."""
        while self._intercepted:
            _intercept.release(self._intercepted.pop())


class _Progress:
    """How far a thread's generation had come at its last call; unread timesteps stay unread."""

    def __init__(self, clock: Clock) -> None:
        self._first, self._last = clock.first_timestep, clock.last_given
        self._sketch = clock.sketch

    def could_go_on(self, timestep: float, sketch: Tensor | None) -> bool:
        """Whether a call may be the next of this generation, and not the first of another."""
        if timestep == self._first or are_unrelated(self._sketch, sketch):
            return False
        last = timestep_value(self._last, batch=0)
        moved, moves = last - self._first, timestep - last
        return moves != 0 and moved * moves >= 0


class _Turn:
    """Whose generation is under way: a model serves one thread at a time."""

    def __init__(self) -> None:
        self._in_call = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Lets any thread begin."""
        self._thread: weakref.ref[threading.Thread] | None = None
        self._under_way: WeakKeyDictionary[threading.Thread, _Progress] = WeakKeyDictionary()

    def enter(self) -> None:
        """Begins a call of a denoiser."""
        if not self._in_call.acquire(blocking=False):
            raise _two_threads()

    def leave(self) -> None:
        """Ends it."""
        self._in_call.release()

    def refuses(
        self, timestep: float, latents: Tensor | None, *, starts: bool, is_announced: bool
    ) -> bool:
        """Whether this call goes on with a generation that another thread overtook.

        A thread may always begin another generation: one that was cancelled is over, but nobody
        says so. What it was refused it does not go on with.

        Args:
            timestep: Of this call.
            latents: Of this call.
            starts: Whether the clock takes it for the first call of a generation.
            is_announced: Whether a noise scheduler has just announced a generation.
        """
        thread = threading.current_thread()
        progress = self._under_way.get(thread)
        seen = None if latents is None else sketch(latents)
        refused = not starts or (
            progress is not None and not is_announced and progress.could_go_on(timestep, seen)
        )
        if refused:
            self._under_way.pop(thread, None)
        return refused

    @property
    def is_of_another_thread(self) -> bool:
        """Whether the last call was another thread's."""
        return self._thread is not None and self._thread() is not threading.current_thread()

    def take(self, clock: Clock, *, is_last: bool) -> None:
        """Gives this thread the turn, until another begins a generation."""
        thread = threading.current_thread()
        self._thread = weakref.ref(thread)
        self._under_way[thread] = _Progress(clock)
        if is_last:
            del self._under_way[thread]

    def is_of_another(self, timestep: float, latents: Tensor | None, last: Tensor | None) -> bool:
        """Whether this thread certainly begins a generation where another's was cancelled."""
        if latents is None:
            return False
        seen, progress = sketch(latents), self._under_way.get(threading.current_thread())
        goes_on = progress is not None and progress.could_go_on(timestep, seen)
        return not goes_on and are_unrelated(last, seen)


class _TwoThreadsError(SmoothCacheError):
    """Refuses a call and leaves the generation of the other thread alone."""


def _two_threads() -> SmoothCacheError:
    return _TwoThreadsError(
        "two threads generate with one model at once, and their steps cannot be told apart; "
        "let them take turns (a lock around each generation), or give each its own copy"
    )


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
            if not isinstance(error, _TwoThreadsError):
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
                raise _two_threads()
        turn.take(clock, is_last=tick.step + 1 == attachment.planned)
        if tick.starts:
            for branches in attachment.branches.values():
                branches.forget()
        context = _intercept.context_name(self._denoiser)
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
        if _intercept.is_intercepted(module):
            raise AlreadyCachedError(
                f"{name} already runs under smoothcache; disable that first, or leave its block"
            )
        if getattr(module, "is_cache_enabled", False):
            raise AlreadyCachedError(
                f"{name} already runs under a cache of diffusers; call its disable_cache() first"
            )
