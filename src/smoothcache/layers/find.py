"""Which layers of a model can be reused: found by structure, registered nowhere.

A block is an element of a list of modules that has an attention inside, or that stands beside a
list of such and leads back to the width it started from. Within it, an attention is a module with
query, key and value projections, a feed-forward one whose projections lead back to their width.
Where these hold too little of the block's weights (attention and MLP side by side with one
projection, say) or are bypassed, the residual that the whole block adds is the layer.
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

# The smallest share of a block's weights that its layers must hold to be reused one by one.
LAYER_COVERAGE = 0.75


def find_layers(
    model: Any,
    *,
    granularity: Granularity = "auto",
    select: Select | None = None,
) -> list[CacheLayer]:
    """Finds the layers of a model whose output can be reused between steps, by its structure.

    ``observe_layers`` confirms them by watching the model run.

    Args:
        model: A diffusers pipeline (all of its denoisers are searched) or any module.
        granularity: "layer" for attentions and feed-forwards, "block" for the residual of each
            block, "model" for the denoiser's output; "auto" takes the layers of every block that
            has its weights in them, and the block itself elsewhere.
        select: Names the layers by hand instead: ``select(path, module)`` is True for a layer,
            or its kind if it is to have another than its structure says.

    Returns:
        The layers in the order in which the model defines them.

    Raises:
        InvalidArgumentError: If ``model`` is neither a pipeline nor a module, the granularity
            is unknown, or a selected layer lies inside another or is never called.
        LayersNotFoundError: If the model has no such layer at all.

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
        seen: set[nn.Module] = set()  # one that two blocks share is one layer, used twice
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
    """The layers after watching them: a block whose layers cannot be reused is taken as a whole.

    Args:
        layers: What was found.
        macs: What each layer and each block was seen to cost, by path; None if it never ran.
        mixed: Paths of layers that carry their input on in a way that no difference keeps.
        may_take_blocks: Whether the layers were left to be chosen; otherwise they stay as given.

    Returns:
        The layers that ran, with their MACs, and a block in place of layers that did too little,
        or that carry their input on. Where such layers have no block that runs, they are left out.

    Raises:
        InvalidArgumentError: If such a layer was asked for.
    """
    if mixed and not may_take_blocks:
        raise InvalidArgumentError(sentence(next(iter(mixed))))
    covered: dict[str, int] = {}
    for layer in layers:
        covered[layer.block] = covered.get(layer.block, 0) + (macs[layer.path] or 0)
    carrying = {layer.block for layer in layers if layer.path in mixed}
    result: dict[str, CacheLayer] = {}
    for layer in layers:
        whole = macs.get(layer.block)
        too_little = (
            whole
            and covered[layer.block] < LAYER_COVERAGE * whole
            and layer.path != layer.block
            and may_take_blocks
        )
        if too_little or layer.block in carrying:
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
            f"select chose no module of {name}; it is called with the path and the module of each"
        )
    if granularity == "layer":
        return (
            f"{name} has no attention or feed-forward that is a module of its own; ask for the "
            'granularity "block" or "auto"'
        )
    return (
        f"{name} has no block with an attention in it, so there is nothing that could be reused; "
        "pass the denoiser itself, or name its layers with find_layers(model, select=...)"
    )


# ------------------------------------------------------------------------------------- blocks
def _blocks(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """The innermost repeated modules that have an attention inside, and those beside them."""
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
    """Elements of lists beside those of the blocks, which do their attention by hand.

    Where no attention was found at all, every such list of the denoiser counts.
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
        and _leads_back(module)
        and [type(x) for _, x in named_children(modules[parent_path(path)])].count(type(module)) > 1
    ]


def _leads_back(module: nn.Module) -> bool:
    """Whether linear projections of a module of its own lead to the width that the first takes."""
    if isinstance(module, LISTS):
        return False
    linear = [child for child in all_modules(module) if is_linear(child)]
    widths = [pair for pair in map(linear_widths, linear) if pair is not None]
    return len(widths) >= 2 and any(out in {w[0] for w in widths} for _, out in widths[1:])


def _listed_ancestor(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The nearest element of a list that holds a module, or is it; None outside of any list."""
    ancestor = parent_path(path)
    while ancestor:
        if isinstance(modules[parent_path(ancestor)], LISTS):
            return ancestor
        ancestor = parent_path(ancestor)
    return path if isinstance(modules[parent_path(path)], LISTS) else None


def _with_feed_forward(path: str | None, modules: Mapping[str, nn.Module]) -> str | None:
    """A list that holds attention and feed-forward apart is the block, if it is listed itself."""
    if not path or not (outer := parent_path(path)) or contains_feed_forward(modules[path]):
        return path
    is_listed = isinstance(modules[outer], LISTS) and isinstance(modules[parent_path(outer)], LISTS)
    return outer if is_listed and contains_feed_forward(modules[outer]) else path


def _layers_of(path: str, block: nn.Module, granularity: Granularity) -> list[CacheLayer]:
    """The layers of a block, or the block."""
    found = dict(_reusable_parts(block, path.rpartition(".")[2]))
    layers = [CacheLayer(join_path(path, name), kind, path) for name, (_, kind) in found.items()]
    if granularity == "layer" or isinstance(block, HOLDERS) or "" in found:
        return layers
    covered = sum(
        matrix_elements(module)
        for name, (module, _) in found.items()
        if not _reaches_into(block, name)
    )
    if granularity == "block" or covered < LAYER_COVERAGE * _working_weights(block):
        return [CacheLayer(path, "block", path)]
    return layers


def _reaches_into(block: nn.Module, name: str) -> bool:
    """Whether a block uses the parts of a child without calling the child, as far as code shows.

    Read from the source of the block's methods and of the objects that it delegates to.
    """
    helpers = [type(x) for x in vars(block).values() if callable(x) and not inspect.isroutine(x)]
    classes = {type(block), *helpers}
    source = "".join(_source(cls) for cls in classes)  # type: ignore[arg-type]
    child = re.escape(name)
    reaches = re.search(rf"\.{child}\.\w+\(", source)
    return reaches is not None and re.search(rf"\.{child}\(", source) is None


@lru_cache(maxsize=256)
def _source(cls: type) -> str:
    """The methods of a class but for those that it has from torch; empty if they are not known."""
    owners = [owner for owner in cls.__mro__ if not owner.__module__.startswith("torch.")]
    methods = [x for owner in owners for x in vars(owner).values() if inspect.isfunction(x)]
    sources = []
    for method in methods:
        with suppress(OSError, TypeError):
            sources.append(inspect.getsource(method))
    return "".join(sources)


def _selected(denoiser: nn.Module, select: Select) -> list[CacheLayer]:
    """The layers that a predicate chooses."""
    modules = dict(named_modules(denoiser))
    layers: list[CacheLayer] = []
    for path, module in modules.items():
        choice = select(path, module) if path else False
        if not choice:
            continue
        if _has_no_forward(module):
            raise InvalidArgumentError(
                f"select chose {path!r}, a {type(module).__name__} that has no forward and so is "
                "never called; choose the modules in it"
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
    """Whether a module only holds others, as a list of blocks does."""
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def _reusable_parts(
    block: nn.Module, block_name: str
) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Name below the block, module and kind of each attention and feed-forward of a block."""
    if is_attention(block_name, block) and not _does_more(block):
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


def _does_more(attention: nn.Module) -> bool:
    """Whether a block that projects to queries and keys has its feed-forward in the same place."""
    children = {name.lower(): linear_widths(child) for name, child in named_children(attention)}
    return any(
        widths is not None
        and ((name in FUSED and widths[1] > 3 * widths[0]) or FEED_FORWARD_NAME.search(name))
        for name, widths in children.items()
    )


def _working_weights(block: nn.Module) -> int:
    """Weights of a block that tokens are multiplied with, so without its conditioning."""
    if is_linear(block):
        return matrix_elements(block)
    own = sum(p.numel() for p in block.parameters(recurse=False) if p.ndim > 1)
    children = (child for name, child in named_children(block) if not is_conditioning(name))
    return own + sum(map(_working_weights, children))
