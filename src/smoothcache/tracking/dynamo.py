"""Keeps our own decisions out of what ``torch.compile`` traces: they are Python, not arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import SmoothCacheError

EXPORT_REFUSED = (
    "torch.export cannot trace a model that runs under smoothcache, since what is reused is "
    "decided at every call; export it before enable(), or after disable()"
)
F = TypeVar("F", bound=Callable[..., Any])


def eagerly(function: F) -> F:
    """Runs a function, and all that it calls, as it is."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


@cache
def between_graphs(function: F) -> F:
    """Runs a function as it is; the model's code that it calls is compiled all the same."""
    own = FunctionType(
        function.__code__.replace(),  # another object, for whoever else has the code
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    between = torch.compiler.disable(own, recursive=False)  # type: ignore[no-untyped-call]
    # Otherwise PyTorch asks itself at every call anew whether to compile it.
    torch._dynamo.decorators.skip(own)
    return cast(F, between)


def uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function that runs as it is, with all that was compiled inside of it.

    Raises:
        SmoothCacheError: If this PyTorch cannot do that.
    """
    if not hasattr(torch.compiler, "set_stance"):
        raise SmoothCacheError(
            f"a compiled model needs PyTorch 2.6 or newer, this is {torch.__version__}; upgrade, "
            "or do not compile the model"
        )
    with torch.compiler.set_stance("force_eager"):
        return function(*args, **kwargs)


def traced() -> tuple[Tensor, bool]:
    """Whether what calls this, between graphs, is compiled; beside it, a tensor of no meaning.

    The tensor makes it a graph, without which ``fullgraph=True`` refuses a call that needs none of
    the model's.
    """
    return torch.empty(0), torch.compiler.is_dynamo_compiling()


def refuse_export() -> None:
    """Refuses a call that ``torch.export`` makes to trace the model.

    Raises:
        SmoothCacheError: If it does; what is reused is decided anew at every call.
    """
    is_exporting = getattr(torch.compiler, "is_exporting", None)
    if is_exporting is not None and is_exporting():
        raise SmoothCacheError(EXPORT_REFUSED)


def has_compiled_parts(module: nn.Module) -> bool:
    """Whether a module, some part of it, or the forward of one was compiled in place or wrapped."""
    return any(
        part._compiled_call_impl is not None
        or "_orig_mod" in part._modules
        or _is_compiled(getattr(part.forward, "plain", part.forward))
        for part in module.modules()
    )


def _is_compiled(forward: Callable[..., Any]) -> bool:
    """Whether ``torch.compile`` made a function."""
    # What torch.compiler.disable made has the same mark.
    is_disabled = getattr(forward, "_torchdynamo_disable", False)
    return hasattr(forward, "_torchdynamo_orig_callable") and not is_disabled
