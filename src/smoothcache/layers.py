"""Which layers of a model can be reused: found by structure, registered nowhere.

A block is an element of a list of modules that has an attention inside, or that stands beside a
list of such and leads back to the width it started from. Within it, an attention is a module with
query, key and value projections, a feed-forward one whose projections lead back to their width.
Where these hold too little of the block's weights (attention and MLP side by side with one
projection, say) or are bypassed, the residual that the whole block adds is the layer.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._carried import sentence
from ._checks import listed
from .denoisers import find_denoisers
from .errors import InvalidArgumentError, LayersNotFoundError, ScheduleMismatchError

Granularity = Literal["auto", "layer", "block", "model"]
Select = Callable[[str, nn.Module], bool | str]

# The smallest share of a block's weights that its layers must hold to be reused one by one.
LAYER_COVERAGE = 0.75

_QUERY = {"q", "to_q", "q_proj", "query", "wq", "q_linear", "proj_q", "linear_q", "query_proj"}
_KEY = {"k", "to_k", "k_proj", "key", "wk", "k_linear", "proj_k", "linear_k", "key_proj"}
_KEY_VALUE = {"kv", "to_kv", "kv_proj", "kv_linear", "wkv"}
_FUSED = {"qkv", "to_qkv", "qkv_proj", "in_proj", "wqkv", "query_key_value", "qkv_linear", "c_attn"}
_QUERY_NAME = re.compile(r"(^|_)(q|qkv)(_|$)")  # a joint attention has one for each stream
_ATTENTION_NAME = re.compile(r"attn|attention")
_FEED_FORWARD_NAME = re.compile(r"(^|_)(ff|ffn|mlp|feed_?forward)\d*($|_)")
_CROSS_NAME = re.compile(r"cross|(^|_)(text|context|prompt|caption)($|_)")
_TEMPORAL_NAME = re.compile(r"(^|[._])(temp|temporal|time_attn)")
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_HOLDERS = (nn.ModuleList, nn.ModuleDict)  # lists that have no forward of their own
_ABOUT_STORAGE = re.compile(
    r"quantization_config|(torch_)?dtype|variant|device(_map)?|name_or_path|use_safetensors"
    r"|attn_(implementation|backend|processor)|attention_backend|(\w+_)?version"
)
_PUT_BEFORE = ("FSDP", "Parametrized")  # the names of classes
# Parts that condition the layers instead of being one: frozen, they would freeze the timestep.
_CONDITIONING_NAME = re.compile(
    r"^(t|time|temb)_(mlp|net|proj|fc|linear|ff)"
    r"|(^|_)(ada|adaln|mod|modulation|norm\d*|emb|embed|embedder|embedding|embeddings|rope|rotary"
    r"|pos|timestep|label|cond|gate|scale)($|_)"
)
# Blocks that prepare a prompt or a reference and never see the latents: kinds of their own, so
# that a curve averaged over a kind is not flattered by layers that do not change.
_REFINER_NAME = re.compile(
    r"(^|[._])((context|token|text|caption)_refiner|perceiver\.|facial|text_fusion"
    r"|(txt|text)_\w*blocks)"
)


@dataclass(frozen=True)
class CacheLayer:
    """One layer whose output can be reused between steps.

    Attributes:
        path: Dotted path of the module from the denoiser; where a pipeline has several
            denoisers, the component's name comes first.
            The denoiser itself, at the granularity "model", has the empty path.
        kind: ``self_attn``, ``cross_attn``, ``joint_attn``, ``ffn``, ``block`` for the residual
            that a whole block adds, or ``model`` for the denoiser's output; with ``spatial_`` or
            ``temporal_`` before it in a model that has both, and with ``refiner_`` in blocks that
            work on the prompt alone.
        block: Dotted path of the block that the layer belongs to.
        macs: Multiply-accumulates of the layer in one step (all of its calls, at the batch that
            was observed); None until a forward has been observed.
        nbytes: Bytes of what the layer returns in one step (all of its calls, at the batch and
            dtype that were observed): what keeping it takes; None until then.
    """

    path: str
    kind: str
    block: str
    macs: int | None = None
    nbytes: int | None = None


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
    for prefix, denoiser in find_denoisers(model).items():
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
                path, block = _join(prefix, layer.path), _join(prefix, layer.block)
                layers.append(replace(layer, path=path, block=block))
    if not layers:
        raise LayersNotFoundError(_nothing_found(model, granularity, select))
    return layers if select is not None else _refiners_apart(_told_apart_in_time(layers))


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


def is_residual(layer: CacheLayer) -> bool:
    """Whether what is reused is what the module adds to its input, instead of its output."""
    return layer.kind.endswith("block")


def is_followed(layer: CacheLayer) -> bool:
    """Whether a forward decides if a layer's output, or what it adds to its input, is reused."""
    return not is_residual(layer) and layer.kind != "model"


def _nothing_found(model: Any, granularity: Granularity, select: Select | None) -> str:
    name = type(model).__name__
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


def layer_modules(model: Any, layers: Sequence[CacheLayer]) -> dict[str, nn.Module]:
    """The module of each layer, by the layer's path.

    Raises:
        ScheduleMismatchError: If the model has no module at some of the paths.
    """
    denoisers = find_denoisers(model)
    modules = {
        _join(prefix, path): module
        for prefix, denoiser in denoisers.items()
        for path, module in denoiser.named_modules(remove_duplicate=False)
    }
    missing = [layer.path for layer in layers if layer.path not in modules]
    if missing:
        raise ScheduleMismatchError(
            f"the layers of the schedule are not those of the model; missing from the model: "
            f"{listed(missing)}. Load the model that it was planned for, or plan a schedule for "
            "this one."
        )
    found = {layer.path: modules[layer.path] for layer in layers}
    owners: dict[nn.Module, str] = {}
    for path, module in found.items():
        other = owners.setdefault(module, path)
        if other != path:
            raise ScheduleMismatchError(
                f"{other!r} and {path!r} are one module in two places; give it one row"
            )
    return found


def identify(model: Any) -> ModelIdentity:
    """Says which model this is, so that a schedule made for another one can be refused."""
    denoisers = find_denoisers(model).values()
    facts = [_configuration(denoiser) for denoiser in denoisers]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    return ModelIdentity("+".join(_class_name(d) for d in denoisers), digest.hexdigest()[:16])


def _class_name(module: nn.Module) -> str:
    """The name of a module's class, without what FSDP2 or a parametrization put before it."""
    cls = type(module)
    while cls.__name__ in {prefix + cls.__bases__[-1].__name__ for prefix in _PUT_BEFORE}:
        cls = cls.__bases__[-1]
    return cls.__name__


def _configuration(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if isinstance(config, Mapping) and config:
        facts = {key: value for key, value in config.items() if not _is_about_storage(str(key))}
    else:
        facts = {
            _join(path, name): _logical_shape(part, name, value)
            for path, part in _named_modules(module)
            for name, value in _own_tensors(part)
        }
    return {"class": _class_name(module), "facts": facts}


def _is_about_storage(key: str) -> bool:
    """Whether a configuration's key says how weights are stored or run, not what the model is."""
    return key.startswith("_") or _ABOUT_STORAGE.fullmatch(key) is not None


def _logical_shape(part: nn.Module, name: str, value: Tensor) -> list[int]:
    """A tensor's shape; of a linear projection's weight also where it is stored packed."""
    if isinstance(part, nn.Linear) and name == "weight":
        return [part.out_features, part.in_features]
    return list(value.shape)


# ------------------------------------------------------------------------------------- blocks


def _blocks(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """The innermost repeated modules that have an attention inside, and those beside them."""
    modules = dict(_named_modules(denoiser))
    attentions = [
        path
        for path, module in modules.items()
        if path and _is_attention(path, module) and not _is_in_conditioning(path)
    ]
    listed = [_with_feed_forward(_listed_ancestor(path, modules), modules) for path in attentions]
    blocks = [path for path in listed if path] or [_parent(path) for path in attentions]
    blocks += _blocks_beside(blocks, modules)
    found = set(blocks)
    return [(path, module) for path, module in modules.items() if path in found]


def _blocks_beside(blocks: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Elements of lists beside those of the blocks, which do their attention by hand.

    Where no attention was found at all, every such list of the denoiser counts.
    """
    owners = {_parent(_parent(path)) for path in blocks} or set(modules)
    inside = tuple(f"{path}." for path in blocks)
    return [
        path
        for path, module in modules.items()
        if path
        and path not in blocks
        and isinstance(modules[_parent(path)], _HOLDERS)
        and _parent(_parent(path)) in owners
        and not path.startswith(inside)
        and not any(block.startswith(f"{path}.") for block in blocks)
        and not _is_in_conditioning(path)
        and _leads_back(module)
        and [type(x) for _, x in _named_children(modules[_parent(path)])].count(type(module)) > 1
    ]


def _leads_back(module: nn.Module) -> bool:
    """Whether linear projections of a module of its own lead to the width that the first takes."""
    if isinstance(module, _LISTS):
        return False
    linear = [child for child in _modules(module) if _is_linear(child)]
    widths = [pair for pair in map(_widths, linear) if pair is not None]
    return len(widths) >= 2 and any(out in {w[0] for w in widths} for _, out in widths[1:])


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


def _layers_of(path: str, block: nn.Module, granularity: Granularity) -> list[CacheLayer]:
    """The layers of a block, or the block."""
    found = dict(_reusable_parts(block, path.rpartition(".")[2]))
    layers = [CacheLayer(_join(path, name), kind, path) for name, (_, kind) in found.items()]
    if granularity == "layer" or isinstance(block, _HOLDERS) or "" in found:
        return layers
    covered = sum(
        _weights(module) for name, (module, _) in found.items() if not _reaches_into(block, name)
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
    modules = dict(_named_modules(denoiser))
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
        block = _listed_ancestor(path, modules) or _parent(path)
        kind = choice if isinstance(choice, str) else _kind_of(path, module, modules)
        layers.append(CacheLayer(path, kind, path if kind.endswith("block") else block))
    return layers


def _has_no_forward(module: nn.Module) -> bool:
    """Whether a module only holds others, as a list of blocks does."""
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def _kind_of(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    name = path.rpartition(".")[2]
    if _is_attention(path, module):
        return _attention_kind(name, module)
    if isinstance(modules[_parent(path)], _LISTS) and _contains_attention(module):
        return "block"
    return "ffn"


def _reusable_parts(
    block: nn.Module, block_name: str
) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Name below the block, module and kind of each attention and feed-forward of a block."""
    if _is_attention(block_name, block) and not _does_more(block):
        yield "", (block, _attention_kind(block_name, block))
        return
    for name, child in _named_children(block):
        if _is_conditioning(name):
            continue
        if _is_attention(name, child):
            yield name, (child, _attention_kind(name, child))
        elif _is_feed_forward(name, child):
            yield name, (child, "ffn")
        else:
            for inner, part in _reusable_parts(child, name):
                yield _join(name, inner), part


def _does_more(attention: nn.Module) -> bool:
    """Whether a block that projects to queries and keys has its feed-forward in the same place."""
    children = {name.lower(): _widths(child) for name, child in _named_children(attention)}
    return any(
        widths is not None
        and ((name in _FUSED and widths[1] > 3 * widths[0]) or _FEED_FORWARD_NAME.search(name))
        for name, widths in children.items()
    )


def _working_weights(block: nn.Module) -> int:
    """Weights of a block that tokens are multiplied with, so without its conditioning."""
    if _is_linear(block):
        return _weights(block)
    own = sum(p.numel() for p in block.parameters(recurse=False) if p.ndim > 1)
    children = (child for name, child in _named_children(block) if not _is_conditioning(name))
    return own + sum(map(_working_weights, children))


def _weights(module: nn.Module) -> int:
    """Elements of the matrices in a module, as they are before any quantisation packs them."""
    projections = [child for child in _modules(module) if _is_linear(child)]
    others = [child for child in _modules(module) if not _is_linear(child)]
    own = sum(p.numel() for m in others for _, p in _own_tensors(m) if p.ndim > 1)
    return own + sum(math.prod(_widths(child) or ()) for child in projections)


# -------------------------------------------------------------------------------------- kinds


def _is_in_conditioning(path: str) -> bool:
    return any(map(_is_conditioning, path.split(".")))


def _is_conditioning(name: str) -> bool:
    return _CONDITIONING_NAME.search(_snake(name)) is not None


def _is_attention(path: str, module: nn.Module) -> bool:
    """Whether a module projects to queries, keys and values (or is named an attention)."""
    name = path.rpartition(".")[2]
    if isinstance(module, nn.MultiheadAttention):
        return True
    if isinstance(module, _LISTS) or _is_conditioning(name):
        return False
    children = {child.lower() for child, _ in _named_children(module)}
    if children & _FUSED or (children & _QUERY and children & (_KEY | _KEY_VALUE)):
        return not _contains_attention(module) and not _contains_feed_forward(module)
    named = _ATTENTION_NAME.search(_snake(name)) is not None
    return named and _weights(module) > 0 and not _contains_attention(module) and bool(children)


def _contains_attention(module: nn.Module) -> bool:
    return any(_is_attention(path, child) for path, child in _descendants(module))


def _contains_feed_forward(module: nn.Module) -> bool:
    return any(_is_feed_forward(path.rpartition(".")[2], m) for path, m in _descendants(module))


def _descendants(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, child) for path, child in _named_modules(module) if path)


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    """Whether a module's projections lead out of a width and back to it."""
    if _is_conditioning(name) or _is_attention(name, module) or _contains_attention(module):
        return False
    widths = [_widths(child) for child in _modules(module)]
    projections = [pair for pair in widths if pair is not None]
    if _FEED_FORWARD_NAME.search(_snake(name)):
        return bool(projections) and not _is_linear(module)
    if any(_weights(child) == _weights(module) for _, child in _named_children(module)):
        return False  # a wrapper, perhaps with the residual connection in it
    return len(projections) >= 2 and any(out == projections[0][0] for _, out in projections[1:])


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix, also if quantised or with adapters beside it."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Channels in and out of a projection; None for anything else."""
    if _is_linear(module):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels, module.out_channels
    return None


def _attention_kind(name: str, module: nn.Module) -> str:
    children = [child for child, part in _named_children(module) if _widths(part)]
    queries = [child for child in children if _QUERY_NAME.search(child)]
    if any(child.lower() in _QUERY for child in queries):  # fused ones may stand beside them
        queries = [child for child in queries if "qkv" not in child.lower()]
    if len(queries) > 1:
        return "joint_attn"
    if "self" in _snake(name):
        return "self_attn"
    if getattr(module, "is_cross_attention", False) or _CROSS_NAME.search(_snake(name)):
        return "cross_attn"
    if isinstance(module, nn.MultiheadAttention):
        return "self_attn" if module.kdim == module.embed_dim else "cross_attn"
    widths = {child.lower(): _widths(part) for child, part in _named_children(module)}
    query = next((w for child, w in widths.items() if child in _QUERY and w), None)
    key = next((w for child, w in widths.items() if child in _KEY | _KEY_VALUE and w), None)
    if query and key and query[0] != key[0]:
        return "cross_attn"
    flagged = hasattr(module, "is_cross_attention")
    return "cross_attn" if not flagged and _snake(name).endswith("attn2") else "self_attn"


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


def _refiners_apart(layers: list[CacheLayer]) -> list[CacheLayer]:
    return [
        replace(layer, kind=f"refiner_{layer.kind}") if _REFINER_NAME.search(layer.block) else layer
        for layer in layers
    ]


def _is_temporal(layer: CacheLayer) -> bool:
    return _TEMPORAL_NAME.search(layer.path) is not None


# ------------------------------------------------------ what adapters and parametrizations cover


def _behind_adapters(module: nn.Module) -> nn.Module:
    """The module that adapters (PEFT) were put beside; or the module itself."""
    for name in ("base_layer", "original_module"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _behind_adapters(inner)
    return module


def _named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    hidden = {"parametrizations"} if parametrize.is_parametrized(module) else set()
    return (
        (name, _behind_adapters(child))
        for name, child in module.named_children()
        if name not in hidden
    )


def _named_modules(
    module: nn.Module, path: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Like ``named_modules``, without adapters and parametrizations."""
    seen = set() if seen is None else seen
    if module not in seen:
        seen.add(module)
        yield path, module
        for name, child in _named_children(module):
            yield from _named_modules(child, _join(path, name), seen)


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    return (child for _, child in _named_modules(module))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a module itself has, also those that are made from others."""
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            yield name, getattr(module, name)


# -------------------------------------------------------------------------------------- names


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
