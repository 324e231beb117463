"""Looks up the modules of layers, and identifies models."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..checks import listed
from ..errors import ScheduleMismatchError
from ..model.target import Target
from .layer import CacheLayer, ModelIdentity
from .structure import join_path, named_modules, own_tensors

_ABOUT_STORAGE = re.compile(
    r"quantization_config|(torch_)?dtype|variant|device(_map)?|name_or_path|use_safetensors"
    r"|attn_(implementation|backend|processor)|attention_backend|(\w+_)?version"
)
_CLASS_PREFIXES = ("FSDP", "Parametrized")


def layer_modules(model: Any, layers: Sequence[CacheLayer]) -> dict[str, nn.Module]:
    """Returns the module of each layer.

    Args:
        model: A diffusers pipeline or a module.
        layers: Layers of this model, as returned by ``find_layers``.

    Returns:
        Modules by layer path, in the order of ``layers``.

    Raises:
        ScheduleMismatchError: If the model has no module at a path, or two paths are one module.

    Example:
        >>> from smoothcache.layers import find_layers
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> [type(module).__name__ for module in layer_modules(model, find_layers(model)).values()]
        ['Attention', 'FeedForward']
    """
    modules = {
        join_path(prefix, path): module
        for prefix, denoiser in Target.of(model).denoisers.items()
        for path, module in denoiser.named_modules(remove_duplicate=False)
    }
    missing = [layer.path for layer in layers if layer.path not in modules]
    if missing:
        raise ScheduleMismatchError(
            f"the layers of the schedule differ from the model's; missing from the model: "
            f"{listed(missing)}. Load the model that it was planned for, or plan a schedule for "
            "this one."
        )
    found = {layer.path: modules[layer.path] for layer in layers}
    owners: dict[nn.Module, str] = {}
    for path, module in found.items():
        other = owners.setdefault(module, path)
        if other != path:
            raise ScheduleMismatchError(
                f"{other!r} and {path!r} are the same module; give it a single row"
            )
    return found


def identify(model: Any) -> ModelIdentity:
    """Returns the identity of a model, by which schedules for other models are refused.

    Args:
        model: A diffusers pipeline or a module.

    Returns:
        Class and fingerprint of its denoisers.

    Raises:
        InvalidArgumentError: If ``model`` is neither a module nor a pipeline.
        LayersNotFoundError: If no component of the pipeline takes a timestep.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> identify(model).class_name
        'DiTTransformer2DModel'
    """
    denoisers = Target.of(model).denoisers.values()
    facts = [_configuration(denoiser) for denoiser in denoisers]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    return ModelIdentity("+".join(_class_name(d) for d in denoisers), digest.hexdigest()[:16])


def _class_name(module: nn.Module) -> str:
    """Returns the name of a module's class without the prefix of FSDP2 or a parametrization."""
    cls = type(module)
    while cls.__name__ in {prefix + cls.__bases__[-1].__name__ for prefix in _CLASS_PREFIXES}:
        cls = cls.__bases__[-1]
    return cls.__name__


def _configuration(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if isinstance(config, Mapping) and config:
        facts = {key: value for key, value in config.items() if not _is_about_storage(str(key))}
    else:
        facts = {
            join_path(path, name): _logical_shape(part, name, value)
            for path, part in named_modules(module)
            for name, value in own_tensors(part)
        }
    return {"class": _class_name(module), "facts": facts}


def _is_about_storage(key: str) -> bool:
    """Whether a configuration key describes storage or execution rather than the model."""
    return key.startswith("_") or _ABOUT_STORAGE.fullmatch(key) is not None


def _logical_shape(part: nn.Module, name: str, value: Tensor) -> list[int]:
    """Returns a tensor's shape; for a linear weight, the shape before packing."""
    if isinstance(part, nn.Linear) and name == "weight":
        return [part.out_features, part.in_features]
    return list(value.shape)
