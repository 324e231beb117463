"""Sorts the arguments of a denoiser's call: timestep, latents and conditioning."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Arguments that depend on the step, so that their first change does not indicate a new branch.
MOVING_NAME = re.compile(
    r"control|residual|res_samples|adapter|hint|sigma|step|noise_level|progress|iteration"
    r"|(^|[._])(i|k|idx|index)$",
    re.IGNORECASE,
)
# Latents, and latents of a second modality. All other arguments but the timestep are conditioning.
_LATENTS_NAME = re.compile(r"hidden_states|sample|x|x_t|z|img|latents?|latent_model_input")
_MORE_LATENTS_NAME = re.compile(
    r"(audio|video|noisy|local)_(hidden_states|sample|latents?)|(vision|sound|action)_tokens"
)
_COMPARABLE = (Tensor, str, int, float)
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas", "noise_level", "time", "ts")
# Also timesteps of one of several modalities, and target timesteps.
_TIMESTEP_NAME = re.compile(r"(\w+_)?(timesteps?|sigmas?|time)(_\w+)?")


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a denoiser, sorted by what they are.

    Attributes:
        timestep: The model's own timestep, a number or a tensor; None if the call has none.
        latents: First tensor of the latents being denoised; None if there is none.
        conditioning: All other tensors, numbers and strings, flattened, by argument name. Tensors
            in the shape of the latents count as latents.
    """

    timestep: Any
    latents: Tensor | None
    conditioning: Mapping[str, tuple[Any, ...]]


class Signature:
    """Sorts the arguments of a denoiser's calls into timestep, latents and conditioning.

    Attributes:
        timestep: Name of the timestep parameter; None if no parameter has a common name. The first
            argument that is a number or has at most one dimension is then used.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        # Bound to the module, so that the parameter for the module is omitted whatever its name.
        forward = denoiser.__dict__.get("forward", MethodType(type(denoiser).forward, denoiser))
        self._names = [name for name in inspect.signature(forward).parameters if name != "self"]
        usual = [name for name in TIMESTEP_NAMES if name in self._names]
        usual += [name for name in self._names if _TIMESTEP_NAME.fullmatch(name)]
        self.timestep = next(iter(usual), None)
        self._timesteps = set(usual)

    def sort(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Sorts the arguments of a call.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            Timestep, latents and conditioning.
        """
        extra = len(args) - len(self._names)  # arguments of a parameter like ``*args``
        names = [*self._names, *(f"*{i}" for i in range(extra))]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        name = self.timestep
        if name not in given:  # for example, if everything is passed through ``**kwargs``
            name = next((n for n in TIMESTEP_NAMES if n in given), None)
        if name is None:
            name = next((n for n, value in given.items() if _could_be_a_timestep(value)), None)
        named = [n for n in given if n != name and _tensors(given[n])]
        # Integer tensors are ids and positions, unless their name is that of latents.
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
    """Returns the arguments, with step-dependent entries of mappings as separate arguments."""
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
