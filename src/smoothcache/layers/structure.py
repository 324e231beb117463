"""Traverses a model's modules, seeing through adapters and parametrizations."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
HOLDERS = (nn.ModuleList, nn.ModuleDict)  # lists without a forward


def matrix_elements(module: nn.Module) -> int:
    """Returns the number of matrix elements in a module, before any packing by quantisation."""
    projections = [child for child in all_modules(module) if is_linear(child)]
    others = [child for child in all_modules(module) if not is_linear(child)]
    other_elements = sum(p.numel() for m in others for _, p in own_tensors(m) if p.ndim > 1)
    return other_elements + sum(math.prod(linear_widths(child) or ()) for child in projections)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear projection, including quantised and adapted ones."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """Returns the input and output channels of a projection; None for other modules."""
    if is_linear(module):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels, module.out_channels
    return None


# ----------------------------------------------------------------- adapters and parametrizations
def _without_adapters(module: nn.Module) -> nn.Module:
    """Returns the base module of a PEFT adapter, or the module itself."""
    for name in ("base_layer", "original_module"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _without_adapters(inner)
    return module


def named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    hidden = {"parametrizations"} if parametrize.is_parametrized(module) else set()
    return (
        (name, _without_adapters(child))
        for name, child in module.named_children()
        if name not in hidden
    )


def named_modules(
    module: nn.Module, path: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yields like ``nn.Module.named_modules``, without adapters and parametrizations."""
    seen = set() if seen is None else seen
    if module not in seen:
        seen.add(module)
        yield path, module
        for name, child in named_children(module):
            yield from named_modules(child, join_path(path, name), seen)


def all_modules(module: nn.Module) -> Iterator[nn.Module]:
    return (child for _, child in named_modules(module))


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields a module's direct parameters, including parametrized ones."""
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            yield name, getattr(module, name)


# -------------------------------------------------------------------------------------- names
def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def join_path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def parent_path(path: str) -> str:
    return path.rpartition(".")[0]
