"""Puts handlers before a model's layers and a clock before its denoisers, all or none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from . import _intercept
from ._intercept import Handler
from .clock import Clock, Tick, timestep_value
from .denoisers import (
    TimestepArgument,
    find_denoisers,
    latents_among,
    noise_scheduler,
    solver_position,
)
from .errors import AlreadyCachedError, ScheduleMismatchError


class Listener(Protocol):
    """Is told of every call of a denoiser."""

    def before(self, denoiser: str, tick: Tick, args: tuple[Any, ...], kwargs: Any) -> None: ...

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
    ) -> None:
        denoisers = find_denoisers(model)
        _refuse_if_taken({**denoisers, **modules})
        self.denoisers = list(denoisers)
        self.clock = Clock(
            lambda: getattr(noise_scheduler(model), "timesteps", None),
            expected,
            lambda: solver_position(noise_scheduler(model)),
        )
        wanted: list[tuple[nn.Module, Handler]] = [
            (module, _placed(name, module, self.clock, listener))
            for name, module in denoisers.items()
        ]
        wanted += [(module, handlers[path]) for path, module in modules.items()]
        self._intercepted: list[nn.Module] = []
        try:
            for module, handler in wanted:
                _intercept.intercept(module, handler)
                self._intercepted.append(module)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leaves every module as it was found."""
        while self._intercepted:
            _intercept.release(self._intercepted.pop())


def _placed(name: str, denoiser: nn.Module, clock: Clock, listener: Listener) -> Handler:
    """A denoiser's handler: places each call in its generation and tells the listener."""
    argument = TimestepArgument(denoiser)

    def handler(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        timestep = argument.among(args, kwargs)
        if timestep is None:
            raise ScheduleMismatchError(
                f"{type(denoiser).__name__} was called without a timestep, so the step cannot be "
                "told; run it outside of the cached block"
            )
        tick = clock.tick(timestep_value(timestep), latents_among(args, kwargs))
        try:
            listener.before(name, tick, args, kwargs)
            output = forward(*args, **kwargs)
            listener.after(name, tick)
        except BaseException:
            clock.forget()
            listener.failed()
            raise
        return output

    return handler


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
