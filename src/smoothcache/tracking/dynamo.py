"""Keeps the library's control flow out of the code that ``torch.compile`` traces."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import SmoothCacheError

EXPORT_REFUSED = (
    "torch.export cannot trace a model that runs under smoothcache, because reuse is decided at "
    "every call; export it before enable() or after disable()"
)
F = TypeVar("F", bound=Callable[..., Any])


def eagerly(function: F) -> F:
    """Returns the function excluded from compilation, including the functions that it calls."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


@cache
def between_graphs(function: F) -> F:
    """Returns the function excluded from compilation; model code that it calls is compiled."""
    copy = FunctionType(
        function.__code__.replace(),  # a new object, so that other users of the code are unaffected
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    between = torch.compiler.disable(copy, recursive=False)  # type: ignore[no-untyped-call]
    # Otherwise PyTorch decides at every call whether to compile it.
    torch._dynamo.decorators.skip(copy)
    return cast(F, between)


def uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function with all compiled code inside it run eagerly, and returns its result.

    Raises:
        SmoothCacheError: If this version of PyTorch does not support it.
    """
    if not hasattr(torch.compiler, "set_stance"):
        raise SmoothCacheError(
            f"a compiled model needs PyTorch 2.6 or newer, this is {torch.__version__}; upgrade, "
            "or do not compile the model"
        )
    with torch.compiler.set_stance("force_eager"):
        return function(*args, **kwargs)


def traced() -> tuple[Tensor, bool]:
    """Returns an unused tensor, and whether the caller, between graphs, is being compiled.

    Creating the tensor adds a graph: ``fullgraph=True`` refuses a call that runs none.
    """
    return torch.empty(0), torch.compiler.is_dynamo_compiling()


def refuse_export() -> None:
    """Refuses a call that ``torch.export`` makes to trace the model.

    Raises:
        SmoothCacheError: If ``torch.export`` is tracing; reuse is decided at every call.
    """
    is_exporting = getattr(torch.compiler, "is_exporting", None)
    if is_exporting is not None and is_exporting():
        raise SmoothCacheError(EXPORT_REFUSED)


def has_compiled_parts(module: nn.Module) -> bool:
    """Whether a module or any submodule, or the forward of one, is compiled or wrapped."""
    return any(
        part._compiled_call_impl is not None
        or "_orig_mod" in part._modules
        or _is_compiled(getattr(part.forward, "plain", part.forward))
        for part in module.modules()
    )


def _is_compiled(forward: Callable[..., Any]) -> bool:
    """Whether ``torch.compile`` returned this function."""
    # Functions returned by torch.compiler.disable have the same attribute.
    is_disabled = getattr(forward, "_torchdynamo_disable", False)
    return hasattr(forward, "_torchdynamo_orig_callable") and not is_disabled
