"""Finds the denoisers of a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import InvalidArgumentError, LayersNotFoundError, SmoothCacheWarning
from .arguments import Signature


def find_denoisers(model: Any) -> dict[str, nn.Module]:
    """Finds the denoisers of a pipeline; a module is its own denoiser.

    Args:
        model: A diffusers pipeline (anything with a ``components`` mapping) or a module.

    Returns:
        Denoisers by the prefix of their layers' paths. A single denoiser has the prefix ``""``, so
        a schedule for a pipeline with one transformer also fits that transformer alone.

    Raises:
        InvalidArgumentError: If ``model`` is neither a module nor a pipeline.
        LayersNotFoundError: If no component of the pipeline takes a timestep.

    Wrappers of ``torch.compile``, PEFT and data parallelism are removed.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> list(find_denoisers(model))
        ['']
    """
    if isinstance(model, nn.Module):
        return {"": _unwrapped(model)}
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise InvalidArgumentError(
            f"expected a diffusers pipeline or a torch.nn.Module, got {type(model).__name__}"
        )
    modules = {n: _unwrapped(c) for n, c in components.items() if isinstance(c, nn.Module)}
    found = {n: m for n, m in modules.items() if Signature(m).timestep is not None}
    if not found:
        raise LayersNotFoundError(
            f"no component of {type(model).__name__} takes a timestep; pass the denoiser itself "
            f"(components: {', '.join(components)})"
        )
    return {"": next(iter(found.values()))} if len(found) == 1 else found


def warn_of_randomness(denoisers: Mapping[str, nn.Module], stacklevel: int = 3) -> None:
    """Warns if a denoiser is in training mode with active dropout.

    Args:
        denoisers: Denoisers of the model.
        stacklevel: Stack level for ``warnings.warn``; by default the caller's caller.
    """
    for denoiser in denoisers.values():
        for path, module in denoiser.named_modules():
            if module.training and _drops(module):
                warnings.warn(
                    f"{type(denoiser).__name__} is in training mode with active dropout at "
                    f"{path!r}, so every call differs; call eval() on it first",
                    SmoothCacheWarning,
                    stacklevel=stacklevel,
                )
                return


def _drops(module: nn.Module) -> bool:
    rate = getattr(module, "p", 0) if "Dropout" in type(module).__name__ else 0
    if isinstance(module, nn.MultiheadAttention):
        rate = module.dropout
    return isinstance(rate, int | float) and rate > 0


def _unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module inside ``torch.compile``, PEFT or data-parallel wrappers.

    Raises:
        InvalidArgumentError: If ``nn.DataParallel`` copies it to several devices at every call.
    """
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        raise InvalidArgumentError(
            "nn.DataParallel copies the model to its devices at every call, so values cannot be "
            "kept between steps; run one process per device (torchrun) instead"
        )
    inner = getattr(module, "_orig_mod", None)  # torch.compile
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = module.module
    elif hasattr(module, "peft_config") and callable(getattr(module, "get_base_model", None)):
        inner = module.get_base_model()  # type: ignore[operator]
    return _unwrapped(inner) if isinstance(inner, nn.Module) else module
