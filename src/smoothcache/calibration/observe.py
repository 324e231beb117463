"""Confirms the layers found in a model by observing one generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ..errors import LayersNotFoundError
from ..layers.find import confirmed, find_layers
from ..layers.layer import CacheLayer, Granularity, Select, is_followed
from ..layers.modules import layer_modules
from ..model.costs import MacCounter
from ..model.outputs import bytes_of
from ..model.residual_stream import followed
from ..model.target import Target
from ..tracking.attachment import Attachment
from ..tracking.listener import CallListener, CallMode, DenoiserCall


def observe_layers(
    model: Any,
    sample: Callable[[int], Any],
    *,
    granularity: Granularity = "auto",
    select: Select | None = None,
) -> list[CacheLayer]:
    """Finds the layers of a model as ``find_layers`` does, and observes which of them run.

    A block is taken as a whole if its layers are bypassed (their submodules are called directly),
    or if their output carries the input in a form that a difference cannot capture. Layers that
    never run are omitted.

    Args:
        model: A diffusers pipeline or any module.
        sample: ``sample(i)`` runs a generation; only ``sample(0)`` is run, once.
        granularity: As for ``find_layers``.
        select: As for ``find_layers``.

    Returns:
        The layers that ran, with their MACs and output bytes of one step.

    Raises:
        LayersNotFoundError: If no layer ran.
        InvalidArgumentError: If a requested layer cannot be reused.
        AlreadyCachedError: If the model already runs under a schedule.

    Example:
        >>> import torch
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(
        ...     num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
        ...     sample_size=8,
        ... ).eval()
        >>> def sample(i):
        ...     return model(torch.zeros(1, 4, 8, 8), torch.tensor([500]), torch.tensor([0])).sample
        >>> with torch.no_grad():
        ...     [(layer.path, layer.macs) for layer in observe_layers(model, sample)]
        [('transformer_blocks.0.attn1', 24576), ('transformer_blocks.0.ff', 32768)]
    """
    target = Target.of(model)
    layers = find_layers(target, granularity=granularity, select=select)
    modules = layer_modules(target, [*layers, *blocks_of(layers)])
    may_follow = {layer.path for layer in layers if is_followed(layer)}
    watchers = {path: Watcher(follow=path in may_follow) for path in modules}
    attachment = Attachment(target, modules, watchers, _FirstStep(list(watchers.values())))
    try:
        sample(0)
    finally:
        attachment.remove()
    seen = confirmed(
        layers,
        {path: watcher.macs for path, watcher in watchers.items()},
        mixed=[path for path, watcher in watchers.items() if watcher.is_mixed],
        may_take_blocks=granularity == "auto" and select is None,
    )
    if not seen:
        raise LayersNotFoundError(
            f"sample(0) ran none of the {len(layers)} layers of {target.name}; it must "
            "run the same object that was passed, uncompiled"
        )
    return [replace(layer, nbytes=watchers[layer.path].nbytes) for layer in seen]


def blocks_of(layers: Sequence[CacheLayer]) -> list[CacheLayer]:
    """Returns the blocks of layers, as layers of kind "block"."""
    paths = dict.fromkeys(layer.block for layer in layers)
    return [CacheLayer(path, "block", path) for path in paths]


class Watcher:
    """Handler that records whether a module ran and its cost in the first step.

    Args:
        follow: Whether to detect in the first call which inputs the module adds to.

    Attributes:
        macs: MACs in the first step; None if the module never ran.
        nbytes: Bytes of the module's outputs in the first step.
        is_mixed: Whether the output depends on an input in a way that a difference cannot capture.
        counter: MAC counter, set during the first step.
    """

    def __init__(self, *, follow: bool = False) -> None:
        self.macs: int | None = None
        self.nbytes = 0
        self.is_mixed = False
        self.counter: MacCounter | None = None
        self._follow = follow

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.macs = self.macs or 0
        if self.counter is None:
            return forward(*args, **kwargs)
        before = self.counter.total
        if self._follow:
            output, carried = followed(forward, args, kwargs)
            self._follow, self.is_mixed = False, carried.is_mixed
        else:
            output = forward(*args, **kwargs)
        self.macs += self.counter.total - before
        self.nbytes += bytes_of(output)
        return output


class _FirstStep(CallListener):
    """Listener that enables counting in the first step of each denoiser."""

    def __init__(self, watchers: list[Watcher]) -> None:
        self._watchers = watchers
        self._counting = ExitStack()
        self._counted_at: dict[str, int] = {}
        self._over: set[str] = set()

    def before(self, call: DenoiserCall) -> CallMode:
        step = call.tick.step
        if step != self._counted_at.setdefault(call.denoiser, step) and not call.tick.starts:
            self._over.add(call.denoiser)
        is_over = call.denoiser in self._over
        counter = None if is_over else self._counting.enter_context(MacCounter())
        for watcher in self._watchers:
            watcher.counter = counter
        return CallMode.UNCOMPILED

    def after(self, call: DenoiserCall) -> None:
        self._counting.close()

    def failed(self) -> None:
        self._counting.close()
