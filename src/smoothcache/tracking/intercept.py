"""The only code that modifies modules: it replaces a module's class by a generated subclass.

``intercept(module, handler)`` routes every forward of the module through
``handler(forward, args, kwargs)``. The generated subclass has the same name; for a parametrized
module, it sits below the class that torch adds. State-dict keys, ``isinstance`` and hooks are
unchanged. The handler always comes first: a forward set on the instance, earlier or later, runs
inside it, and removing such a forward in any order never bypasses the handler. Copies and pickles
of an intercepted module are plain modules of the original class.
"""

from __future__ import annotations

import copyreg
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import AlreadyCachedError, SmoothCacheError
from .dynamo import EXPORT_REFUSED, between_graphs

_SLOT = "_smoothcache_slot"
_ALTERING = (
    *("load_adapter", "load_lora_adapter", "add_adapter", "set_adapter", "set_adapters"),
    *("enable_adapters", "disable_adapters", "enable_lora", "disable_lora", "unload_lora"),
    *("fuse_lora", "unfuse_lora", "delete_adapters", "delete_adapter", "load_state_dict"),
)
"""Methods that change what a denoiser computes."""

_generated: WeakKeyDictionary[type, type] = WeakKeyDictionary()
_generating = threading.Lock()
_intercepted: WeakSet[nn.Module] = WeakSet()


class Handler(Protocol):
    """Decides what a call of an intercepted module returns."""

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


class _Slot:
    """State stored on an intercepted module: its handler and the original forward."""

    def __init__(self, module: nn.Module, base: type, handler: Handler, *, outside: bool) -> None:
        self.module = weakref.ref(module)
        self.base = base
        self.handler: Handler | None = handler
        self.context: str | None = None
        self.altered: Callable[[], None] | None = None
        self.inside: int | None = None  # the thread that runs the original forward
        self.kind = _forward_between_graphs() if outside else _Forward
        self.of_class = self.kind(self, MethodType(_class_forward(base), module))
        own = module.__dict__.pop("forward", None)
        self.forward = self.of_class if own is None else self.kind(self, own)

    @property
    def instance_forward(self) -> Any:
        """The forward set on the instance, without the interception; None if there is none."""
        return None if self.forward is self.of_class else self.forward.plain

    def put(self, value: Any) -> None:
        is_ours = isinstance(value, _Forward) and value.slot is self
        self.forward = value if is_ours else self.kind(self, value)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a module is not intercepted


class _NoCodeError(SmoothCacheError, AttributeError):
    """A missing attribute, so that ``hasattr`` returns False."""


class _Forward:
    """The ``forward`` attribute of an intercepted module; other code may wrap and keep it."""

    def __init__(self, slot: _Slot, plain: Callable[..., Any]) -> None:
        self.slot = slot
        self.plain = plain
        self.__wrapped__ = plain  # for inspect.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slot = self.slot
        handler = slot.handler
        # Released, or called by an outer forward that has already gone through the handler.
        if handler is None or (slot.inside is not None and slot.inside == _this_thread()):
            return self.plain(*args, **kwargs)
        if self is slot.of_class:
            return handler(self.plain, args, kwargs)
        return handler(self._behind, args, kwargs)

    def _behind(self, *args: Any, **kwargs: Any) -> Any:
        slot = self.slot
        outer, slot.inside = slot.inside, _this_thread()
        try:
            return self.plain(*args, **kwargs)
        finally:
            slot.inside = outer

    @property
    def _torchdynamo_orig_callable(self) -> Callable[..., Any]:
        """Mimics a compiled function, so ``torch.compile`` compiles the original forward."""
        return self.plain

    @property
    def _torchdynamo_wrapper_id(self) -> int:
        return id(self)

    @property
    def __code__(self) -> Any:
        """Missing on purpose: ``torch.export`` reads it before its first call and is refused."""
        raise _NoCodeError(EXPORT_REFUSED)

    @property
    def __func__(self) -> Callable[..., Any]:
        """Mimics a bound method, for code that wraps the function and binds it again."""

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is self.slot.module():
                return self(*args, **kwargs)
            return _class_forward(self.slot.base)(module, *args, **kwargs)

        forward.__wrapped__ = getattr(self.plain, "__func__", self.plain)  # type: ignore[attr-defined]
        return forward

    def __reduce__(self) -> Any:
        return _identity, (self.plain,)


@cache  # not before it is needed, because it loads the compiler
def _forward_between_graphs() -> type[_Forward]:
    """Returns a forward that ``torch.compile`` skips; model code that it calls is traced."""

    class Forward(_Forward):
        __call__ = between_graphs(_Forward.__call__)

    return Forward


def _this_thread() -> int:
    """Returns the id of the current thread; 0 while ``torch.compile`` is tracing."""
    return 0 if torch.compiler.is_dynamo_compiling() else threading.get_ident()


def _identity(value: Any) -> Any:
    return value


class _ForwardOfInstance:
    """Data descriptor of a generated class; accessed on the class, it returns the function."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self.function
        slot = module.__dict__.get(_SLOT)
        if slot is None:
            own = module.__dict__.get("forward")
            return MethodType(self.function, module) if own is None else own
        return slot.forward

    def __set__(self, module: Any, value: Any) -> None:
        slot = module.__dict__.get(_SLOT)
        if slot is None:
            module.__dict__["forward"] = value
        else:
            slot.put(value)

    def __delete__(self, module: Any) -> None:
        slot = module.__dict__.get(_SLOT)
        if slot is None and "forward" in module.__dict__:
            del module.__dict__["forward"]
        elif slot is not None and slot.forward is not slot.of_class:
            slot.forward = slot.of_class
        else:
            raise AttributeError("forward")


def _altering(base: type, name: str) -> Callable[..., Any]:
    """Returns a method that reports changes of the module's weights or adapters."""
    plain = getattr(base, name)

    @wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(_generated[base], self), name)(*args, **kwargs)
        finally:
            slot = self.__dict__.get(_SLOT)
            if slot is not None and slot.altered is not None:
                slot.altered()

    return method


def notice_changes(module: nn.Module, altered: Callable[[], None]) -> None:
    """Calls ``altered`` whenever weights or adapters of an intercepted module have changed."""
    module.__dict__[_SLOT].altered = altered


def intercept(module: nn.Module, handler: Handler, *, outside: bool = False) -> None:
    """Routes every forward of ``module`` through ``handler`` until ``release``.

    Args:
        module: The module to intercept.
        handler: Called in place of the module's forward.
        outside: Whether ``torch.compile`` skips the handler, so that compiled code begins inside
            it, rather than tracing it.
    """
    base = _below_parametrization(module)
    if _is_generated(base):  # made by the class of an intercepted module
        base = base.__bases__[0]
    _exchange(module, base, _subclass(base))  # first, because it alone can fail
    object.__setattr__(module, _SLOT, _Slot(module, base, handler, outside=outside))
    _intercepted.add(module)


def is_intercepted(module: nn.Module) -> bool:
    """Whether the module's forward goes through a handler."""
    return module.__dict__.get(_SLOT) is not None


def context_name(module: nn.Module) -> str | None:
    """Returns the current ``cache_context`` name of an intercepted module; None outside one."""
    slot: _Slot = module.__dict__[_SLOT]
    return slot.context


def release(module: nn.Module) -> None:
    """Removes the handler and restores the module to its original state."""
    slot: _Slot = module.__dict__.pop(_SLOT)
    slot.handler = None
    _intercepted.discard(module)
    if not (_is_parametrized(module) and any(type(x) is type(module) for x in _intercepted)):
        _exchange(module, _generated[slot.base], slot.base)
    if slot.instance_forward is not None:
        module.__dict__["forward"] = slot.instance_forward


def _is_parametrized(module: nn.Module) -> bool:
    """Whether ``torch.nn.utils.parametrize`` has replaced the module's class."""
    return parametrize.is_parametrized(module) and type(module).__name__.startswith("Parametrized")


def _below_parametrization(module: nn.Module) -> type:
    return type(module).__bases__[0] if _is_parametrized(module) else type(module)


def _exchange(module: nn.Module, old: type, new: type) -> None:
    """Replaces a module's class.

    The class of a parametrized module stays on top, because torch looks for its properties there.
    Copies of the module share that class.
    """
    if type(module) is old:
        module.__class__ = new
    elif _is_parametrized(module) and type(module).__bases__ == (old,):
        type(module).__bases__ = (new,)


def _is_generated(cls: type) -> bool:
    return isinstance(cls.__dict__.get("forward"), _ForwardOfInstance)


def _class_forward(base: type) -> Any:
    """Returns the forward that a class defines, ignoring interception."""
    for cls in base.__mro__:
        if "forward" in cls.__dict__ and not _is_generated(cls):
            return cls.__dict__["forward"]
    return base.forward  # type: ignore[attr-defined]


def _subclass(base: type) -> type:
    """Returns the generated subclass of a module class, shared by all modules of that class."""
    with _generating:
        if base not in _generated:
            _generated[base] = _generate(base)
        return _generated[base]


def _generate(base: type) -> type:
    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        parts: Any = base.__reduce_ex__(self, protocol)  # type: ignore[call-arg]
        function, args, *rest = parts
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            # pickle checks that __newobj__ is given the object's current class.
            function, args = copyreg._reconstructor, (base, object, None)  # type: ignore[attr-defined]
        if rest and isinstance(rest[0], dict):
            state = {name: value for name, value in rest[0].items() if name != _SLOT}
            slot = self.__dict__.get(_SLOT)
            if slot is not None and slot.instance_forward is not None:
                state["forward"] = slot.instance_forward
            rest[0] = state
        return function, args, *rest

    def enable_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get(_SLOT) is None:
            return base.enable_cache(self, *args, **kwargs)  # type: ignore[attr-defined]
        raise AlreadyCachedError(
            f"{type(self).__name__} already runs under smoothcache; disable that first, or leave "
            "its block"
        )

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

    names: dict[str, Any] = {
        "forward": _ForwardOfInstance(_class_forward(base)),
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if hasattr(base, "cache_context"):  # diffusers names the calls of a step with it
        names["cache_context"] = cache_context
    if hasattr(base, "enable_cache"):
        names["enable_cache"] = enable_cache
    # Adapter layers have a property with one of these names, which must remain a property.
    methods = [name for name in _ALTERING if inspect.isfunction(getattr(base, name, None))]
    names |= {name: _altering(base, name) for name in methods}
    return type(base.__name__, (base,), names)
