"""Sees every operator that PyTorch runs, and lets each run as it would have run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every operator that runs inside its ``with`` block to ``saw``."""

    supports_higher_order_operators = True  # flex attention is one

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets flex attention trace itself, which it does even where nothing is compiled."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Is told of an operator that has run."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _runs_as_parts(func):
            with _as_outside(func), self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        with _as_outside(func):
            out = func(*args, **kwargs)
        self.saw(func, args, kwargs, out)
        return out


def _runs_as_parts(func: Any) -> bool:
    """Tells whether an operator is made of others, which are to be seen in its place.

    Autograd takes such operators apart before they come here, except in inference mode. Their
    C++ code then has to run: `OpOverload.decompose` prefers code in Python that chooses other
    kernels. A linear layer is seen whole: some devices have a kernel of their own for it.
    """
    if not isinstance(func, torch._ops.OpOverload) or func._schema.name == "aten::linear":
        return False
    return _has_kernel(func, "CompositeImplicitAutograd")


def _as_outside(func: Any) -> AbstractContextManager[Any]:
    """Lets an operator track views inside itself if it would without us.

    Under a dispatch mode it would not, in inference mode: a view of a weight would come without
    `requires_grad`, `matmul` would choose another kernel, and the last bits would change.
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
    if func.namespace == "prim":  # known to Python alone
        return False
    name = func.name()  # type: ignore[no-untyped-call]
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))
