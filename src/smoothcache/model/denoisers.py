"""Finds which parts of a pipeline denoise."""

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
        Prefix of a layer's path to denoiser. The only denoiser has the prefix ``""``, so a
        schedule made for a pipeline with one transformer also fits that transformer alone.

    Raises:
        InvalidArgumentError: If ``model`` is neither a module nor a pipeline.
        LayersNotFoundError: If no component of the pipeline takes a timestep.

    What wraps a module (``torch.compile``, PEFT, data parallelism) is looked through.

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
    """Warns if a denoiser is left in training mode and drops values at random.

    Args:
        denoisers: Of the model that is about to be used.
        stacklevel: Whose line it is, as for ``warnings.warn``; the caller of our caller by default.
    """
    for denoiser in denoisers.values():
        for path, module in denoiser.named_modules():
            if module.training and _drops(module):
                warnings.warn(
                    f"{type(denoiser).__name__} is in training mode, and {path!r} drops values at "
                    "random, so every call differs; call its eval() first",
                    SmoothCacheWarning,
                    stacklevel=stacklevel,
                )
                return


def _drops(module: nn.Module) -> bool:
    share = getattr(module, "p", 0) if "Dropout" in type(module).__name__ else 0
    if isinstance(module, nn.MultiheadAttention):
        share = module.dropout
    return isinstance(share, int | float) and share > 0


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that was compiled, given adapters or made parallel; or the module itself.

    Raises:
        InvalidArgumentError: If it is copied to several devices for every call.
    """
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        raise InvalidArgumentError(
            "nn.DataParallel copies the model to its devices anew for every call, so nothing can "
            "be kept between steps; run one process for each device (torchrun) instead"
        )
    inner = getattr(module, "_orig_mod", None)  # torch.compile
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = module.module
    elif hasattr(module, "peft_config") and callable(getattr(module, "get_base_model", None)):
        inner = module.get_base_model()  # type: ignore[operator]
    return _unwrapped(inner) if isinstance(inner, nn.Module) else module
