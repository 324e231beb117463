"""Observes every operator that PyTorch runs, without changing results."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes every operator that runs inside its ``with`` block to ``saw``."""

    supports_higher_order_operators = True  # flex attention is one

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Allows flex attention to trace itself, which it does even in eager mode."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Called after an operator has run."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with _as_outside(func), self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        with _as_outside(func):
            out = func(*args, **kwargs)
        self.saw(func, args, kwargs, out)
        return out


def _is_composite(func: Any) -> bool:
    """Whether an operator consists of others, which are observed in its place.

    Autograd decomposes such operators before they arrive here, except in inference mode. Their C++
    code must run then, because `OpOverload.decompose` prefers Python code that selects other
    kernels. A linear layer is observed as a whole, because some devices have a kernel for it.
    """
    if not isinstance(func, torch._ops.OpOverload) or func._schema.name == "aten::linear":
        return False
    return _has_kernel(func, "CompositeImplicitAutograd")


def _as_outside(func: Any) -> AbstractContextManager[Any]:
    """Makes an operator track views internally if it would do so outside the mode.

    In inference mode, a dispatch mode disables that: a view of a weight would lose
    `requires_grad`, `matmul` would select another kernel, and the last bits would change.
    """
    tracks = isinstance(func, torch._ops.OpOverload) and (
        _has_kernel(func, "CompositeImplicitAutograd")
        or (torch.is_inference_mode_enabled() and not _has_kernel(func, "ADInplaceOrView"))
    )
    if not tracks:
        return nullcontext()
    guard = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)
    return cast(AbstractContextManager[Any], guard)


def _has_kernel(func: torch._ops.OpOverload, key: str) -> bool:
    if func.namespace == "prim":  # operators without a C++ registration
        return False
    name = func.name()  # type: ignore[no-untyped-call]
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))
