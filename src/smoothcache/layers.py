"""Which layers of a model can be reused: found by structure, registered nowhere.

A block is an element of a list of modules that has an attention inside. Within it, an attention
is a module with query, key and value projections, a feed-forward one whose projections lead back
to the width they started from. Where these hold too little of the block's weights (attention and
MLP side by side with one projection, say), the residual that the whole block adds is the layer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .denoisers import find_denoisers
from .errors import LayersNotFoundError

# The smallest share of a block's weights that its layers must hold to be reused one by one.
LAYER_COVERAGE = 0.75

_QUERY = {"q", "to_q", "q_proj", "query", "wq", "q_linear", "proj_q", "linear_q", "query_proj"}
_KEY = {"k", "to_k", "k_proj", "key", "wk", "k_linear", "proj_k", "linear_k", "key_proj"}
_KEY_VALUE = {"kv", "to_kv", "kv_proj", "kv_linear", "wkv"}
_FUSED = {"qkv", "to_qkv", "qkv_proj", "in_proj", "wqkv", "query_key_value", "qkv_linear", "c_attn"}
_ATTENTION_NAME = re.compile(r"attn|attention")
_FEED_FORWARD_NAME = re.compile(r"(^|_)(ff|ffn|mlp|feed_?forward)\d*($|_)")
_CROSS_NAME = re.compile(r"cross|(^|_)(text|context|prompt|caption)($|_)")
_TEMPORAL_NAME = re.compile(r"(^|[._])(temp|temporal|time_attn)")
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Parts that condition the layers instead of being one: frozen, they would freeze the timestep.
_CONDITIONING_NAME = re.compile(
    r"^(t|time|temb)_(mlp|net|proj|fc|linear|ff)"
    r"|(^|_)(ada|adaln|mod|modulation|norm\d*|emb|embed|embedder|embedding|embeddings|rope|rotary"
    r"|pos|timestep|label|cond|gate|scale)($|_)"
)


@dataclass(frozen=True)
class CacheLayer:
    """One layer whose output can be reused between steps.

    Attributes:
        path: Dotted path of the module from the denoiser; where a pipeline has several
            denoisers, the component's name comes first.
        kind: ``self_attn``, ``cross_attn``, ``joint_attn``, ``ffn``, or ``block`` for the residual
            that a whole block adds; with ``spatial_`` or ``temporal_`` before it in a model that
            has both.
        block: Dotted path of the block that the layer belongs to.
        macs: Multiply-accumulates of the layer in one step (all of its calls, at the batch that
            was observed); None until a forward has been observed.
    """

    path: str
    kind: str
    block: str
    macs: int | None = None


@dataclass(frozen=True)
class ModelIdentity:
    """What a schedule or a calibration was made for.

    Attributes:
        class_name: Class of the denoiser; several are joined by ``+``.
        fingerprint: 16 hexadecimal digits over the denoiser's configuration, or over the names
            and shapes of its parameters if it has none. Weights and dtype do not enter.
    """

    class_name: str
    fingerprint: str


def find_layers(model: Any) -> list[CacheLayer]:
    """Finds the layers of a model whose output can be reused between steps.

    Args:
        model: A diffusers pipeline (all of its denoisers are searched) or any module.

    Returns:
        The layers in the order in which the model defines them.

    Raises:
        InvalidArgumentError: If ``model`` is neither a pipeline nor a module.
        LayersNotFoundError: If the model has no attention at all.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> [(layer.path, layer.kind) for layer in find_layers(model)]
        [('transformer_blocks.0.attn1', 'self_attn'), ('transformer_blocks.0.ff', 'ffn')]
    """
    layers: list[CacheLayer] = []
    for prefix, denoiser in find_denoisers(model).items():
        for path, block in _blocks(denoiser):
            layers += _layers_of(_join(prefix, path), block)
    if not layers:
        raise LayersNotFoundError(
            f"{type(model).__name__} has no block with an attention in it, so there is nothing "
            "that could be reused; pass the denoiser itself"
        )
    return _told_apart_in_time(layers)


def layer_modules(model: Any, layers: list[CacheLayer]) -> dict[str, nn.Module]:
    """The module of each layer, by the layer's path."""
    denoisers = find_denoisers(model)
    modules = {
        _join(prefix, path): module
        for prefix, denoiser in denoisers.items()
        for path, module in denoiser.named_modules()
    }
    return {layer.path: modules[layer.path] for layer in layers}


def identify(model: Any) -> ModelIdentity:
    """Says which model this is, so that a schedule made for another one can be refused."""
    denoisers = find_denoisers(model).values()
    facts = [_configuration(denoiser) for denoiser in denoisers]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    return ModelIdentity("+".join(_class_name(d) for d in denoisers), digest.hexdigest()[:16])


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _configuration(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if isinstance(config, Mapping) and config:
        facts = {key: value for key, value in config.items() if not str(key).startswith("_")}
    else:
        facts = {name: list(value.shape) for name, value in module.named_parameters()}
    return {"class": _class_name(module), "facts": facts}


# ------------------------------------------------------------------------------------- blocks


def _blocks(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """The innermost repeated modules that have an attention inside, in order of definition."""
    modules = dict(denoiser.named_modules())
    attentions = [
        path
        for path, module in modules.items()
        if path and _is_attention(path, module) and not any(map(_is_conditioning, path.split(".")))
    ]
    listed = [_with_feed_forward(_listed_ancestor(path, modules), modules) for path in attentions]
    blocks = [path for path in listed if path] or [_parent(path) for path in attentions]
    return [(path, modules[path]) for path in dict.fromkeys(blocks)]


def _listed_ancestor(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The nearest element of a list that holds a module, or is it; None outside of any list."""
    ancestor = _parent(path)
    while ancestor:
        if isinstance(modules[_parent(ancestor)], _LISTS):
            return ancestor
        ancestor = _parent(ancestor)
    return path if isinstance(modules[_parent(path)], _LISTS) else None


def _with_feed_forward(path: str | None, modules: Mapping[str, nn.Module]) -> str | None:
    """A list that holds attention and feed-forward apart is the block, if it is listed itself."""
    if not path or not (outer := _parent(path)) or _contains_feed_forward(modules[path]):
        return path
    is_listed = isinstance(modules[outer], _LISTS) and isinstance(modules[_parent(outer)], _LISTS)
    return outer if is_listed and _contains_feed_forward(modules[outer]) else path


def _layers_of(path: str, block: nn.Module) -> list[CacheLayer]:
    found = dict(_reusable_parts(block, path.rpartition(".")[2]))
    covered = sum(_weights(module) for module, _ in found.values())
    runs_itself = not isinstance(block, nn.ModuleList | nn.ModuleDict)
    if runs_itself and covered < LAYER_COVERAGE * _working_weights(block):
        return [CacheLayer(path, "block", path)]
    return [CacheLayer(_join(path, name), kind, path) for name, (_, kind) in found.items()]


def _reusable_parts(
    block: nn.Module, block_name: str
) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Name below the block, module and kind of each attention and feed-forward of a block."""
    if _is_attention(block_name, block) and not _contains_attention(block):
        yield "", (block, _attention_kind(block_name, block))
        return
    for name, child in block.named_children():
        if _is_conditioning(name):
            continue
        if _is_attention(name, child):
            yield name, (child, _attention_kind(name, child))
        elif _is_feed_forward(name, child):
            yield name, (child, "ffn")
        else:
            for inner, part in _reusable_parts(child, name):
                yield _join(name, inner), part


def _working_weights(block: nn.Module) -> int:
    """Weights of a block that tokens are multiplied with, so without its conditioning."""
    own = sum(p.numel() for p in block.parameters(recurse=False) if p.ndim > 1)
    children = (child for name, child in block.named_children() if not _is_conditioning(name))
    return own + sum(map(_working_weights, children))


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


# -------------------------------------------------------------------------------------- kinds


def _is_conditioning(name: str) -> bool:
    return _CONDITIONING_NAME.search(_snake(name)) is not None


def _is_attention(path: str, module: nn.Module) -> bool:
    """Whether a module projects to queries, keys and values (or is named an attention)."""
    name = path.rpartition(".")[2]
    if isinstance(module, nn.MultiheadAttention):
        return True
    if isinstance(module, _LISTS) or _is_conditioning(name):
        return False
    children = {child.lower() for child, _ in module.named_children()}
    if children & _FUSED or (children & _QUERY and children & (_KEY | _KEY_VALUE)):
        return not _contains_attention(module) and not _contains_feed_forward(module)
    named = _ATTENTION_NAME.search(_snake(name)) is not None
    return named and _weights(module) > 0 and not _contains_attention(module) and bool(children)


def _contains_attention(module: nn.Module) -> bool:
    return any(_is_attention(path, child) for path, child in _descendants(module))


def _contains_feed_forward(module: nn.Module) -> bool:
    return any(_is_feed_forward(path.rpartition(".")[2], m) for path, m in _descendants(module))


def _descendants(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, child) for path, child in module.named_modules() if path)


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    """Whether a module's projections lead out of a width and back to it."""
    if _is_conditioning(name) or _is_attention(name, module) or _contains_attention(module):
        return False
    widths = [_widths(child) for child in module.modules()]
    projections = [pair for pair in widths if pair is not None]
    if _FEED_FORWARD_NAME.search(_snake(name)):
        return bool(projections)
    if any(_weights(child) == _weights(module) for child in module.children()):
        return False  # a wrapper, perhaps with the residual connection in it
    return len(projections) >= 2 and any(out == projections[0][0] for _, out in projections[1:])


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Channels in and out of a projection; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels, module.out_channels
    return None


def _attention_kind(name: str, module: nn.Module) -> str:
    if getattr(module, "add_q_proj", None) is not None:
        return "joint_attn"
    if getattr(module, "is_cross_attention", False) or _CROSS_NAME.search(_snake(name)):
        return "cross_attn"
    if isinstance(module, nn.MultiheadAttention):
        return "self_attn" if module.kdim == module.embed_dim else "cross_attn"
    widths = {child.lower(): _widths(part) for child, part in module.named_children()}
    query = next((w for child, w in widths.items() if child in _QUERY and w), None)
    key = next((w for child, w in widths.items() if child in _KEY | _KEY_VALUE and w), None)
    if query and key and query[0] != key[0]:
        return "cross_attn"
    flagged = hasattr(module, "is_cross_attention")
    return "cross_attn" if not flagged and _snake(name) == "attn2" else "self_attn"


def _told_apart_in_time(layers: list[CacheLayer]) -> list[CacheLayer]:
    """Names the kinds of a model with temporal and with other blocks apart."""
    stacks = {_TEMPORAL_NAME.search(layer.block) is not None for layer in layers}
    split = {
        kind
        for kind in {layer.kind for layer in layers}
        if len({_is_temporal(layer) for layer in layers if layer.kind == kind}) == 2
    }
    if len(stacks) == 1 and not split:
        return layers
    return [
        replace(layer, kind=f"{'temporal' if _is_temporal(layer) else 'spatial'}_{layer.kind}")
        if len(stacks) == 2 or layer.kind in split
        else layer
        for layer in layers
    ]


def _is_temporal(layer: CacheLayer) -> bool:
    return _TEMPORAL_NAME.search(layer.path) is not None


# -------------------------------------------------------------------------------------- names


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
