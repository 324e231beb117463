"""The key under which a calibration is kept: the model, its weights, and what it is sampled with.

A sampler is a function of the user's, about which nothing else is known. So each of its generations
is begun, and what the denoiser is given in the first step is digested: the latents tell the seed,
the resolution and the dtype, and the other inputs the prompt. The timesteps of the first two steps
tell the number of steps, and the noise scheduler's settings tell the solver.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..layers.modules import identify
from ..model.arguments import Signature
from ..model.target import Target
from ..tracking.timesteps import timestep_value

_SAMPLED = 64  # elements of each weight that are digested
FORM = "1"  # of calibrations; another one makes older files useless


class _Begun(BaseException):
    """Ends a generation whose first step is known."""


def key_of(
    model: Any, sample: Callable[[int], Any], numbers: Iterable[int], more: Mapping[str, Any]
) -> str | None:
    """The key of a calibration on these samples.

    Args:
        model: Pipeline or module.
        sample: Runs generation number i; each is begun, and ended after its first step.
        numbers: Of the generations.
        more: What else a calibration depends on.

    Returns:
        Letters and digits; None if the sampler cannot be told by what it gives to the denoiser.
    """
    digest = hashlib.sha256(FORM.encode())
    identity = identify(model)
    digest.update(f"{identity.class_name} {identity.fingerprint}".encode())
    digest.update(json.dumps(dict(more), sort_keys=True, default=str).encode())
    scheduler = Target.of(model).noise_scheduler
    config = dict(getattr(scheduler, "config", {}) or {})
    digest.update(type(scheduler).__name__.encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, denoiser in sorted(Target.of(model).denoisers.items()):
        digest.update(name.encode())
        _add_weights(digest, denoiser)
    for i in numbers:
        if not _add_beginning(digest, model, sample, i):
            return None
    return f"{identity.class_name}-{digest.hexdigest()[:20]}"


def _add_weights(digest: Any, module: torch.nn.Module) -> None:
    """Adds names, shapes and dtypes of all weights, and some of their elements."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        if value.device.type != "meta" and value.layout is torch.strided and value.numel():
            values = value.detach().reshape(-1)
            digest.update(_bytes(values[:: values.numel() // _SAMPLED + 1]))


def _add_beginning(digest: Any, model: Any, sample: Callable[[int], Any], i: int) -> bool:
    """Adds what the denoisers are given in the first step of a generation, and the next time."""
    first: list[float | None] = []
    signatures = {name: Signature(x) for name, x in Target.of(model).denoisers.items()}

    def begun(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = timestep_value(signatures[name].sort(args, kwargs).timestep, batch=0)
        digest.update(f"{name} {time}".encode())
        if first and time != first[0]:
            raise _Begun
        first.append(time)
        for leaf in pytree.tree_leaves((args, kwargs)):
            digest.update(_described(leaf))

    handles = [
        denoiser.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: begun(name, args, kwargs), with_kwargs=True
        )
        for name, denoiser in Target.of(model).denoisers.items()
    ]
    try:
        sample(i)
    except _Begun:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return bool(first) and first[0] is not None


def _described(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        return f"{list(leaf.shape)} {leaf.dtype}".encode() + _bytes(leaf.detach())
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return repr(leaf).encode()
    return type(leaf).__name__.encode()


def _bytes(values: Tensor) -> bytes:
    if values.device.type == "meta" or values.layout is not torch.strided:
        return b""
    flat = values.reshape(-1).contiguous().cpu()
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""
