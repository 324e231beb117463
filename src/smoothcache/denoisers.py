"""What the user handed over: a pipeline or a module, and which of its parts denoise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from .errors import InvalidArgumentError, LayersNotFoundError

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas", "noise_level", "time", "ts")


def find_denoisers(model: Any) -> dict[str, nn.Module]:
    """Names the denoisers of a pipeline, or the one module that was given.

    Args:
        model: A diffusers pipeline (anything with a ``components`` mapping) or a module.

    Returns:
        Prefix of a layer's path to denoiser. The only denoiser has the prefix ``""``, so a
        schedule made for a pipeline with one transformer also fits that transformer alone.

    Raises:
        InvalidArgumentError: If ``model`` is neither a module nor a pipeline.
        LayersNotFoundError: If no component of the pipeline takes a timestep.
    """
    if isinstance(model, nn.Module):
        return {"": _unwrapped(model)}
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise InvalidArgumentError(
            f"expected a diffusers pipeline or a torch.nn.Module, got {type(model).__name__}"
        )
    modules = {n: _unwrapped(c) for n, c in components.items() if isinstance(c, nn.Module)}
    found = {n: m for n, m in modules.items() if TimestepArgument(m).name is not None}
    if not found:
        raise LayersNotFoundError(
            f"no component of {type(model).__name__} takes a timestep; pass the denoiser itself "
            f"(components: {', '.join(components)})"
        )
    return {"": next(iter(found.values()))} if len(found) == 1 else found


def noise_scheduler(model: Any) -> Any | None:
    """The pipeline's noise scheduler at this moment; None for a bare module."""
    return None if isinstance(model, nn.Module) else getattr(model, "scheduler", None)


def solver_position(scheduler: Any | None) -> int | None:
    """Index of the timestep at which a noise scheduler is; None if it does not count its steps."""
    if scheduler is None or not hasattr(scheduler, "_step_index"):
        return None
    if scheduler._step_index is None:  # before its first step
        return getattr(scheduler, "_begin_index", None) or 0
    return int(scheduler._step_index)


class TimestepArgument:
    """Finds the timestep among the arguments of a denoiser's call.

    Attributes:
        name: The parameter that holds it; None if no parameter has one of the usual names. Then
            it is the first argument that is a number or has at most one dimension.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        forward = denoiser.__dict__.get("forward", type(denoiser).forward)
        names = [name for name in inspect.signature(forward).parameters if name != "self"]
        self.name = next((name for name in TIMESTEP_NAMES if name in names), None)
        self._index = names.index(self.name) if self.name else -1

    def among(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The timestep of a call; None if the call has none."""
        if self.name is not None and self.name in kwargs:
            return kwargs[self.name]
        if 0 <= self._index < len(args):
            return args[self._index]
        values = (*args, *kwargs.values())
        return next((value for value in values if _could_be_a_timestep(value)), None)


def latents_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a call is to denoise: its first tensor with more than one dimension."""
    values = (*args, *kwargs.values())
    return next((v for v in values if isinstance(v, Tensor) and v.ndim > 1), None)


def _could_be_a_timestep(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim <= 1
    return isinstance(value, Real) and not isinstance(value, bool)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module
