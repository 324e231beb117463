"""What the user handed over: a pipeline or a module, and which of its parts denoise."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._branches import MOVING_NAME
from .errors import InvalidArgumentError, LayersNotFoundError, SmoothCacheWarning

# A denoiser's latents, and those of a second modality; all else but the timestep conditions it.
_LATENTS_NAME = re.compile(r"hidden_states|sample|x|x_t|z|img|latents?|latent_model_input")
_MORE_LATENTS_NAME = re.compile(
    r"(audio|video|noisy|local)_(hidden_states|sample|latents?)|(vision|sound|action)_tokens"
)
_COMPARABLE = (Tensor, str, int, float)
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas", "noise_level", "time", "ts")
# Of one modality among several, or where a step is to lead.
_TIMESTEP_NAME = re.compile(r"(\w+_)?(timesteps?|sigmas?|time)(_\w+)?")


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

    What wraps a module (``torch.compile``, PEFT, data parallelism) is looked through.
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


def warn_of_randomness(model: Any, stacklevel: int = 3) -> None:
    """Says so if a denoiser is left in training mode and drops values at random.

    Args:
        model: Pipeline or module.
        stacklevel: Whose line it is, as for ``warnings.warn``; the caller of our caller by default.
    """
    for denoiser in find_denoisers(model).values():
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


def noise_scheduler(model: Any) -> Any | None:
    """The pipeline's noise scheduler at this moment; None for a bare module."""
    return None if isinstance(model, nn.Module) else getattr(model, "scheduler", None)


def announced_timesteps(scheduler: Any | None) -> Any | None:
    """A noise scheduler's tensor of timesteps, a new one for each generation; None before any."""
    timesteps = getattr(scheduler, "timesteps", None)
    is_told = getattr(scheduler, "num_inference_steps", None) is not None
    training = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if timesteps is None or (not is_told and len(timesteps) == training):
        return None  # until it is told a number of steps it lists those of the training
    return timesteps


def solver_position(scheduler: Any | None) -> int | None:
    """Index of the timestep at which a noise scheduler is; None if it does not count its steps."""
    if scheduler is None or not hasattr(scheduler, "_step_index"):
        return None
    if scheduler._step_index is None:  # before its first step
        return getattr(scheduler, "_begin_index", None) or 0
    return int(scheduler._step_index)


def solver_stages(scheduler: Any | None) -> int | None:
    """Calls of the denoiser that a noise scheduler makes in a step, if it says, for each branch."""
    order = getattr(scheduler, "order", None)
    return order if isinstance(order, int) else None


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a denoiser, sorted by what they are.

    Attributes:
        timestep: The model's own t, a number or a tensor; None if the call has none.
        latents: The first tensor of what is to be denoised; None if no tensor looks like it.
        conditioning: All other tensors, numbers and strings, flattened, by the argument's name.
            What has the shape of the latents is taken for latents, too.
    """

    timestep: Any
    latents: Tensor | None
    conditioning: Mapping[str, tuple[Any, ...]]


class Signature:
    """Tells the arguments of a denoiser's calls apart.

    Attributes:
        timestep: The parameter that holds the timestep; None if no parameter has one of the usual
            names. Then it is the first argument that is a number or has at most one dimension.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        # Bound to the module, so the parameter that takes it is left out whatever its name is.
        forward = denoiser.__dict__.get("forward", MethodType(type(denoiser).forward, denoiser))
        self._names = [name for name in inspect.signature(forward).parameters if name != "self"]
        usual = [name for name in TIMESTEP_NAMES if name in self._names]
        usual += [name for name in self._names if _TIMESTEP_NAME.fullmatch(name)]
        self.timestep = next(iter(usual), None)
        self._timesteps = set(usual)

    def sort(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Sorts the arguments of a call."""
        extra = len(args) - len(self._names)  # of a parameter like ``*args``
        names = [*self._names, *(f"*{i}" for i in range(extra))]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        name = self.timestep
        if name not in given:  # as where everything is passed through ``**kwargs``
            name = next((n for n in TIMESTEP_NAMES if n in given), None)
        if name is None:
            name = next((n for n, value in given.items() if _could_be_a_timestep(value)), None)
        named = [n for n in given if n != name and _tensors(given[n])]
        # Unless their name says so, integers are no latents but ids and positions.
        floating = [n for n in named if _tensors(given[n])[0].is_floating_point()]
        latents = [n for n in named if _LATENTS_NAME.fullmatch(n)][:1] or (floating or named)[:1]
        latents += [n for n in named if n not in latents and _MORE_LATENTS_NAME.fullmatch(n)]
        tensors = [tensor for n in latents for tensor in _tensors(given[n])]
        shape = tensors[0].shape if tensors else None
        conditioning = {
            n: tuple(
                leaf
                for leaf in pytree.tree_leaves(value)
                if isinstance(leaf, _COMPARABLE) and getattr(leaf, "shape", ()) != shape
            )
            for n, value in _split(given).items()
            if n not in {name, *latents, *self._timesteps}
        }
        return Call(
            timestep=None if name is None else given[name],
            latents=tensors[0] if tensors else None,
            conditioning={n: leaves for n, leaves in conditioning.items() if leaves},
        )


def _split(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments; of a mapping among them, what follows the steps has a name of its own."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if not isinstance(value, Mapping):
            found[name] = value
            continue
        inner = _split({str(key): x for key, x in value.items()})
        moving = {key: x for key, x in inner.items() if MOVING_NAME.search(key)}
        found[name] = [x for key, x in inner.items() if key not in moving]
        found.update({f"{name}.{key}": x for key, x in moving.items()})
    return found


def _tensors(value: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 1]


def _could_be_a_timestep(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim <= 1
    return isinstance(value, Real) and not isinstance(value, bool)


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
