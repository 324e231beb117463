"""Finds the layers of a model that can be reused by its structure, without a registry.

A block is an element of a module list that contains an attention, or an element of a neighbouring
list whose projections return to their input width. Within a block, an attention is a module with
query, key and value projections, and a feed-forward is a module whose projections return to their
input width. If these hold too small a fraction of the block's weights (a fused projection for
attention and MLP, for example) or are bypassed, the residual of the whole block is the layer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, get_args

from torch import nn

from ..errors import InvalidArgumentError, LayersNotFoundError
from ..model.residual_stream import sentence
from ..model.target import Target
from .kinds import (
    FEED_FORWARD_NAME,
    FUSED,
    attention_kind,
    contains_feed_forward,
    is_attention,
    is_conditioning,
    is_feed_forward,
    is_in_conditioning,
    kind_of_layer,
    mark_refiners,
    split_spatial_and_temporal,
)
from .layer import CacheLayer, Granularity, Select
from .structure import (
    HOLDERS,
    LISTS,
    all_modules,
    is_linear,
    join_path,
    linear_widths,
    matrix_elements,
    named_children,
    named_modules,
    parent_path,
)

# Smallest fraction of a block's weights that its layers must hold to be reused separately.
LAYER_COVERAGE = 0.75


def find_layers(
    model: Any,
    *,
    granularity: Granularity = "auto",
    select: Select | None = None,
) -> list[CacheLayer]:
    """Finds the layers of a model whose output can be reused between steps, by structure.

    ``observe_layers`` also confirms them by observing a run of the model.

    Args:
        model: A diffusers pipeline (all of its denoisers are searched) or any module.
        granularity: "layer" for attentions and feed-forwards, "block" for the residual of each
            block, "model" for the denoiser's output. "auto" uses the layers of a block if they hold
            most of its weights, and the block otherwise.
        select: Predicate that chooses the layers instead: ``select(path, module)`` returns True
            for a layer, or the layer's kind to override the kind derived from its structure.

    Returns:
        The layers, in the order in which the model defines them.

    Raises:
        InvalidArgumentError: If ``model`` is neither a pipeline nor a module, the granularity is
            unknown, or a selected layer is inside another one or never called.
        LayersNotFoundError: If the model has no such layer.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> [(layer.path, layer.kind) for layer in find_layers(model)]
        [('transformer_blocks.0.attn1', 'self_attn'), ('transformer_blocks.0.ff', 'ffn')]
        >>> [layer.path for layer in find_layers(model, granularity="block")]
        ['transformer_blocks.0']
    """
    if granularity not in get_args(Granularity):
        raise InvalidArgumentError(
            f"granularity must be one of {', '.join(get_args(Granularity))}, got {granularity!r}"
        )
    layers: list[CacheLayer] = []
    target = Target.of(model)
    for prefix, denoiser in target.denoisers.items():
        if select is not None:
            found = _selected(denoiser, select)
        elif granularity == "model":
            found = [CacheLayer("", "model", "")]
        else:
            found = [
                x for path, block in _blocks(denoiser) for x in _layers_of(path, block, granularity)
            ]
        seen: set[nn.Module] = set()  # a module shared by two blocks is one layer, used twice
        for layer in found:
            module = denoiser.get_submodule(layer.path)
            if module not in seen:
                seen.add(module)
                path, block = join_path(prefix, layer.path), join_path(prefix, layer.block)
                layers.append(replace(layer, path=path, block=block))
    if not layers:
        raise LayersNotFoundError(_nothing_found(target, granularity, select))
    return layers if select is not None else mark_refiners(split_spatial_and_temporal(layers))


def confirmed(
    layers: Sequence[CacheLayer],
    macs: Mapping[str, int | None],
    *,
    mixed: Collection[str] = (),
    may_take_blocks: bool,
) -> list[CacheLayer]:
    """Returns the layers confirmed by an observed run, with whole blocks where necessary.

    Args:
        layers: Layers found by structure.
        macs: Observed MACs of each layer and block, by path; None if it never ran.
        mixed: Paths of layers whose output carries the input in a form that a difference cannot
            capture.
        may_take_blocks: Whether a block may replace its layers.

    Returns:
        The layers that ran, with their MACs. A block replaces layers that are ``mixed`` or account
        for too small a fraction of its MACs. Mixed layers without a block that runs are omitted.

    Raises:
        InvalidArgumentError: If a layer is mixed and ``may_take_blocks`` is False.
    """
    if mixed and not may_take_blocks:
        raise InvalidArgumentError(sentence(next(iter(mixed))))
    covered: dict[str, int] = {}
    for layer in layers:
        covered[layer.block] = covered.get(layer.block, 0) + (macs[layer.path] or 0)
    mixed_blocks = {layer.block for layer in layers if layer.path in mixed}
    result: dict[str, CacheLayer] = {}
    for layer in layers:
        whole = macs.get(layer.block)
        too_little = (
            whole
            and covered[layer.block] < LAYER_COVERAGE * whole
            and layer.path != layer.block
            and may_take_blocks
        )
        if too_little or layer.block in mixed_blocks:
            if not whole:
                continue
            kind = re.sub(r"[a-z]+_attn$|ffn$", "block", layer.kind)
            layer = CacheLayer(layer.block, kind, layer.block)
        if macs[layer.path] is not None:
            result.setdefault(layer.path, replace(layer, macs=macs[layer.path]))
    return list(result.values())


def _nothing_found(target: Target, granularity: Granularity, select: Select | None) -> str:
    name = target.name
    if select is not None:
        return (
            f"select returned True for no module of {name}; it is called with each path and module"
        )
    if granularity == "layer":
        return (
            f"{name} has no attention or feed-forward modules; use the granularity "
            '"block" or "auto" instead'
        )
    return (
        f"{name} has no block with an attention, so no layer can be reused; pass the denoiser "
        "itself, or choose its layers with find_layers(model, select=...)"
    )


# ------------------------------------------------------------------------------------- blocks
def _blocks(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the innermost list elements that contain an attention, and neighbouring blocks."""
    modules = dict(named_modules(denoiser))
    attentions = [
        path
        for path, module in modules.items()
        if path and is_attention(path, module) and not is_in_conditioning(path)
    ]
    listed = [_with_feed_forward(_listed_ancestor(path, modules), modules) for path in attentions]
    blocks = [path for path in listed if path] or [parent_path(path) for path in attentions]
    blocks += _blocks_beside(blocks, modules)
    found = set(blocks)
    return [(path, module) for path, module in modules.items() if path in found]


def _blocks_beside(blocks: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns blocks of neighbouring lists, which implement attention without a module.

    If no attention was found, all lists of the denoiser are considered.
    """
    owners = {parent_path(parent_path(path)) for path in blocks} or set(modules)
    inside = tuple(f"{path}." for path in blocks)
    return [
        path
        for path, module in modules.items()
        if path
        and path not in blocks
        and isinstance(modules[parent_path(path)], HOLDERS)
        and parent_path(parent_path(path)) in owners
        and not path.startswith(inside)
        and not any(block.startswith(f"{path}.") for block in blocks)
        and not is_in_conditioning(path)
        and _preserves_width(module)
        and [type(x) for _, x in named_children(modules[parent_path(path)])].count(type(module)) > 1
    ]


def _preserves_width(module: nn.Module) -> bool:
    """Whether a module has a forward, and linear projections that return to an input width."""
    if isinstance(module, LISTS):
        return False
    linear = [child for child in all_modules(module) if is_linear(child)]
    widths = [pair for pair in map(linear_widths, linear) if pair is not None]
    return len(widths) >= 2 and any(out in {w[0] for w in widths} for _, out in widths[1:])


def _listed_ancestor(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Returns the nearest list element that contains a module; None outside any list."""
    ancestor = parent_path(path)
    while ancestor:
        if isinstance(modules[parent_path(ancestor)], LISTS):
            return ancestor
        ancestor = parent_path(ancestor)
    return path if isinstance(modules[parent_path(path)], LISTS) else None


def _with_feed_forward(path: str | None, modules: Mapping[str, nn.Module]) -> str | None:
    """Returns the outer list as the block if it is itself listed and has a feed-forward."""
    if not path or not (outer := parent_path(path)) or contains_feed_forward(modules[path]):
        return path
    is_listed = isinstance(modules[outer], LISTS) and isinstance(modules[parent_path(outer)], LISTS)
    return outer if is_listed and contains_feed_forward(modules[outer]) else path


def _layers_of(path: str, block: nn.Module, granularity: Granularity) -> list[CacheLayer]:
    """Returns the layers of a block, or the block as one layer."""
    found = dict(_reusable_parts(block, path.rpartition(".")[2]))
    layers = [CacheLayer(join_path(path, name), kind, path) for name, (_, kind) in found.items()]
    if granularity == "layer" or isinstance(block, HOLDERS) or "" in found:
        return layers
    covered = sum(
        matrix_elements(module)
        for name, (module, _) in found.items()
        if not _reaches_into(block, name)
    )
    if granularity == "block" or covered < LAYER_COVERAGE * _token_weights(block):
        return [CacheLayer(path, "block", path)]
    return layers


def _reaches_into(block: nn.Module, name: str) -> bool:
    """Whether a block calls submodules of a child but never the child, judging by source code.

    The source of the block's methods and of the objects that it delegates to is searched.
    """
    helpers = [type(x) for x in vars(block).values() if callable(x) and not inspect.isroutine(x)]
    classes = {type(block), *helpers}
    source = "".join(_source(cls) for cls in classes)  # type: ignore[arg-type]
    child = re.escape(name)
    reaches = re.search(rf"\.{child}\.\w+\(", source)
    return reaches is not None and re.search(rf"\.{child}\(", source) is None


@lru_cache(maxsize=256)
def _source(cls: type) -> str:
    """Returns the source of a class's methods, except inherited from torch; empty if unknown."""
    owners = [owner for owner in cls.__mro__ if not owner.__module__.startswith("torch.")]
    methods = [x for owner in owners for x in vars(owner).values() if inspect.isfunction(x)]
    sources = []
    for method in methods:
        with suppress(OSError, TypeError):
            sources.append(inspect.getsource(method))
    return "".join(sources)


def _selected(denoiser: nn.Module, select: Select) -> list[CacheLayer]:
    """Returns the layers that a predicate chooses."""
    modules = dict(named_modules(denoiser))
    layers: list[CacheLayer] = []
    for path, module in modules.items():
        choice = select(path, module) if path else False
        if not choice:
            continue
        if _has_no_forward(module):
            raise InvalidArgumentError(
                f"select chose {path!r}, but {type(module).__name__} has no forward and is never "
                "called; choose the modules in it"
            )
        outer = next((x.path for x in layers if path.startswith(f"{x.path}.")), None)
        if outer is not None:
            raise InvalidArgumentError(
                f"select chose {path!r} inside {outer!r}, which is reused as a whole; choose one"
            )
        block = _listed_ancestor(path, modules) or parent_path(path)
        kind = choice if isinstance(choice, str) else kind_of_layer(path, module, modules)
        layers.append(CacheLayer(path, kind, path if kind.endswith("block") else block))
    return layers


def _has_no_forward(module: nn.Module) -> bool:
    """Whether a module is only a container, such as a list of blocks."""
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def _reusable_parts(
    block: nn.Module, block_name: str
) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Yields the name, module and kind of each attention and feed-forward of a block."""
    if is_attention(block_name, block) and not _has_fused_feed_forward(block):
        yield "", (block, attention_kind(block_name, block))
        return
    for name, child in named_children(block):
        if is_conditioning(name):
            continue
        if is_attention(name, child):
            yield name, (child, attention_kind(name, child))
        elif is_feed_forward(name, child):
            yield name, (child, "ffn")
        else:
            for inner, part in _reusable_parts(child, name):
                yield join_path(name, inner), part


def _has_fused_feed_forward(attention: nn.Module) -> bool:
    """Whether a block with query and key projections also contains its feed-forward."""
    children = {name.lower(): linear_widths(child) for name, child in named_children(attention)}
    return any(
        widths is not None
        and ((name in FUSED and widths[1] > 3 * widths[0]) or FEED_FORWARD_NAME.search(name))
        for name, widths in children.items()
    )


def _token_weights(block: nn.Module) -> int:
    """Returns the number of a block's weights that are applied to tokens, without conditioning."""
    if is_linear(block):
        return matrix_elements(block)
    direct = sum(p.numel() for p in block.parameters(recurse=False) if p.ndim > 1)
    children = (child for name, child in named_children(block) if not is_conditioning(name))
    return direct + sum(map(_token_weights, children))
