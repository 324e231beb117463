"""Classifies modules as attention, feed-forward or conditioning by weights and names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from .layer import CacheLayer
from .structure import (
    LISTS,
    all_modules,
    is_linear,
    linear_widths,
    matrix_elements,
    named_children,
    named_modules,
    parent_path,
    snake_case,
)

_QUERY = {"q", "to_q", "q_proj", "query", "wq", "q_linear", "proj_q", "linear_q", "query_proj"}
_KEY = {"k", "to_k", "k_proj", "key", "wk", "k_linear", "proj_k", "linear_k", "key_proj"}
_KEY_VALUE = {"kv", "to_kv", "kv_proj", "kv_linear", "wkv"}
FUSED = {"qkv", "to_qkv", "qkv_proj", "in_proj", "wqkv", "query_key_value", "qkv_linear", "c_attn"}
_QUERY_NAME = re.compile(r"(^|_)(q|qkv)(_|$)")  # a joint attention has one per stream
_ATTENTION_NAME = re.compile(r"attn|attention")
FEED_FORWARD_NAME = re.compile(r"(^|_)(ff|ffn|mlp|feed_?forward)\d*($|_)")
_CROSS_NAME = re.compile(r"cross|(^|_)(text|context|prompt|caption)($|_)")
_TEMPORAL_NAME = re.compile(r"(^|[._])(temp|temporal|time_attn)")
# Modules that condition layers. They must not be reused, which would freeze the timestep.
_CONDITIONING_NAME = re.compile(
    r"^(t|time|temb)_(mlp|net|proj|fc|linear|ff)"
    r"|(^|_)(ada|adaln|mod|modulation|norm\d*|emb|embed|embedder|embedding|embeddings|rope|rotary"
    r"|pos|timestep|label|cond|gate|scale)($|_)"
)
# Blocks that process only a prompt or a reference have separate kinds, because their nearly
# constant outputs would lower the mean error of a kind.
_REFINER_NAME = re.compile(
    r"(^|[._])((context|token|text|caption)_refiner|perceiver\.|facial|text_fusion"
    r"|(txt|text)_\w*blocks)"
)


def kind_of_layer(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    name = path.rpartition(".")[2]
    if is_attention(path, module):
        return attention_kind(name, module)
    if isinstance(modules[parent_path(path)], LISTS) and _contains_attention(module):
        return "block"
    return "ffn"


# -------------------------------------------------------------------------------------- kinds
def is_in_conditioning(path: str) -> bool:
    return any(map(is_conditioning, path.split(".")))


def is_conditioning(name: str) -> bool:
    return _CONDITIONING_NAME.search(snake_case(name)) is not None


def is_attention(path: str, module: nn.Module) -> bool:
    """Whether a module has query, key and value projections, or an attention's name."""
    name = path.rpartition(".")[2]
    if isinstance(module, nn.MultiheadAttention):
        return True
    if isinstance(module, LISTS) or is_conditioning(name):
        return False
    children = {child.lower() for child, _ in named_children(module)}
    if children & FUSED or (children & _QUERY and children & (_KEY | _KEY_VALUE)):
        return not _contains_attention(module) and not contains_feed_forward(module)
    named = _ATTENTION_NAME.search(snake_case(name)) is not None
    return (
        named and matrix_elements(module) > 0 and not _contains_attention(module) and bool(children)
    )


def _contains_attention(module: nn.Module) -> bool:
    return any(is_attention(path, child) for path, child in _descendants(module))


def contains_feed_forward(module: nn.Module) -> bool:
    return any(is_feed_forward(path.rpartition(".")[2], m) for path, m in _descendants(module))


def _descendants(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, child) for path, child in named_modules(module) if path)


def is_feed_forward(name: str, module: nn.Module) -> bool:
    """Whether a module's projections return to their input width."""
    if is_conditioning(name) or is_attention(name, module) or _contains_attention(module):
        return False
    widths = [linear_widths(child) for child in all_modules(module)]
    projections = [pair for pair in widths if pair is not None]
    if FEED_FORWARD_NAME.search(snake_case(name)):
        return bool(projections) and not is_linear(module)
    if any(
        matrix_elements(child) == matrix_elements(module) for _, child in named_children(module)
    ):
        return False  # a wrapper, which may contain the residual connection
    return len(projections) >= 2 and any(out == projections[0][0] for _, out in projections[1:])


def attention_kind(name: str, module: nn.Module) -> str:
    children = [child for child, part in named_children(module) if linear_widths(part)]
    queries = [child for child in children if _QUERY_NAME.search(child)]
    if any(child.lower() in _QUERY for child in queries):  # fused projections may also exist
        queries = [child for child in queries if "qkv" not in child.lower()]
    if len(queries) > 1:
        return "joint_attn"
    if "self" in snake_case(name):
        return "self_attn"
    if getattr(module, "is_cross_attention", False) or _CROSS_NAME.search(snake_case(name)):
        return "cross_attn"
    if isinstance(module, nn.MultiheadAttention):
        return "self_attn" if module.kdim == module.embed_dim else "cross_attn"
    widths = {child.lower(): linear_widths(part) for child, part in named_children(module)}
    query = next((w for child, w in widths.items() if child in _QUERY and w), None)
    key = next((w for child, w in widths.items() if child in _KEY | _KEY_VALUE and w), None)
    if query and key and query[0] != key[0]:
        return "cross_attn"
    flagged = hasattr(module, "is_cross_attention")
    return "cross_attn" if not flagged and snake_case(name).endswith("attn2") else "self_attn"


def split_spatial_and_temporal(layers: list[CacheLayer]) -> list[CacheLayer]:
    """Prefixes kinds with "spatial" and "temporal" in models that have both."""
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


def mark_refiners(layers: list[CacheLayer]) -> list[CacheLayer]:
    return [
        replace(layer, kind=f"refiner_{layer.kind}") if _REFINER_NAME.search(layer.block) else layer
        for layer in layers
    ]


def _is_temporal(layer: CacheLayer) -> bool:
    return _TEMPORAL_NAME.search(layer.path) is not None
