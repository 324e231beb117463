"""The only code that alters a module: it swaps the module's class for one that asks first.

``intercept(module, handler)`` makes every forward of the module, whoever calls it, go through
``handler(forward, args, kwargs)``. The class of the module becomes a generated subclass of the
same name; nothing else changes, so state-dict keys, ``isinstance``, hooks and an instance-level
``forward`` stay what they were, and ``release`` has nothing to repair. Copies and pickles of an
intercepted module are plain modules of the original class.
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import nn

_SLOT = "_smoothcache_slot"
_generated: WeakKeyDictionary[type, type] = WeakKeyDictionary()
_generating = threading.Lock()


class Handler(Protocol):
    """Decides what a call of an intercepted module returns."""

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


class _Slot:
    """What an intercepted module carries: its handler and the forward that it had."""

    def __init__(self, module: nn.Module, base: type, handler: Handler) -> None:
        self.base = base
        self.handler: Handler | None = handler
        self.context: str | None = None
        # What an earlier interception left behind, because a later hook still leads to it.
        self.below: _Slot | None = module.__dict__.get(_SLOT)
        self._class_forward: Callable[..., Any] = (
            MethodType(base.forward, module)  # type: ignore[attr-defined]
            if self.below is None
            else self.below.forward
        )
        # Some constructors, and most hooks, put a forward on the instance; it outranks the class.
        self.instance_forward = module.__dict__.pop("forward", None)
        self._inside_instance_forward = False

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module's forward returns."""
        if self._inside_instance_forward:  # a hook that came later than an earlier interception
            return self._class_forward(*args, **kwargs)
        if self.handler is None:
            return self.forward(*args, **kwargs)
        return self.handler(self.forward, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the module had."""
        if self.instance_forward is None:
            return self._class_forward(*args, **kwargs)
        self._inside_instance_forward = True
        try:
            return self.instance_forward(*args, **kwargs)
        finally:
            self._inside_instance_forward = False


def intercept(module: nn.Module, handler: Handler) -> None:
    """Sends every forward of ``module`` through ``handler`` until ``release``."""
    base = type(module)
    module.__class__ = _subclass(base)  # first, because it alone can fail
    object.__setattr__(module, _SLOT, _Slot(module, base, handler))


def is_intercepted(module: nn.Module) -> bool:
    """Whether a handler stands before the module's forward."""
    slot: _Slot | None = module.__dict__.get(_SLOT)
    return slot is not None and slot.handler is not None


def context_name(module: nn.Module) -> str | None:
    """What the ``cache_context`` around an intercepted module's call names it; None outside one."""
    slot: _Slot = module.__dict__[_SLOT]
    return slot.context


def release(module: nn.Module) -> None:
    """Takes the handler away and leaves the module as ``intercept`` found it."""
    slot: _Slot = module.__dict__[_SLOT]
    if type(module) is _generated.get(slot.base):
        module.__class__ = slot.base
    if slot.instance_forward is not None and "forward" in module.__dict__:
        slot.handler = None  # A hook that came later calls through to the forward kept here.
        return
    if slot.below is None:
        del module.__dict__[_SLOT]
    else:
        module.__dict__[_SLOT] = slot.below
    if slot.instance_forward is not None:
        module.__dict__["forward"] = slot.instance_forward


def _subclass(base: type) -> type:
    """The generated subclass of a module class, one for all modules of that class."""
    with _generating:
        if base not in _generated:
            _generated[base] = _generate(base)
        return _generated[base]


def _generate(base: type) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        slot = self.__dict__.get(_SLOT)
        if slot is None:
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        return slot(args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != _SLOT}
        slot = self.__dict__.get(_SLOT)
        if slot is not None and slot.instance_forward is not None:
            state.setdefault("forward", slot.instance_forward)
        # Not __newobj__, with which pickle insists on the class that the module has now.
        return copyreg._reconstructor, (base, object, None), state  # type: ignore[attr-defined]

    @contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with base.cache_context(self, name, *args, **kwargs) as context:  # type: ignore[attr-defined]
            slot = self.__dict__.get(_SLOT)
            if slot is None:
                yield context
                return
            outer, slot.context = slot.context, name
            try:
                yield context
            finally:
                slot.context = outer

    forward.__wrapped__ = base.forward  # type: ignore[attr-defined]  # keeps inspect.signature
    names: dict[str, Any] = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if hasattr(base, "cache_context"):  # by which diffusers names the calls of a step
        names["cache_context"] = cache_context
    return type(base.__name__, (base,), names)
