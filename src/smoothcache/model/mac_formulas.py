"""Formulas for the multiply-accumulates of operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


class Macs(NamedTuple):
    """Cost of one operator, in multiply-accumulates.

    Attributes:
        weights: MACs of products with weights.
        attention: MACs of products of activations with activations.
        biases: Bias additions, one per output element.
    """

    weights: int = 0
    attention: int = 0
    biases: int = 0


def macs_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Macs:
    """Returns the cost of an operator; zero without a formula here or in PyTorch.

    Args:
        func: The operator, as passed to `__torch_dispatch__`.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: Its output.
    """
    name = _name(func)
    if name.startswith("aten::_scaled_dot_product_") and not name.endswith("_backward"):
        return _attention_kernel(args, out)
    if name in _FORMULAS:
        return _FORMULAS[name](args, out)
    return _registered(func, args, kwargs, out)


class LateBiases:
    """Detects a bias added after the ``mm`` of a linear layer, as for non-contiguous inputs."""

    def __init__(self) -> None:
        self._product: tuple[int, int] | None = None  # elements and columns of the last `mm`

    def of(self, func: Any, args: tuple[Any, ...], out: Any) -> Macs:
        """Returns the bias additions of an operator; must be called for all in running order."""
        name = _name(func)
        product = self._product
        if name == "aten::mm":
            self._product = (out.numel(), _columns(out))
        elif name not in _RESHAPES:
            self._product = None
        if name not in ("aten::add", "aten::add_") or not _is_row(args[1], out):
            return Macs()
        return Macs(biases=out.numel() if product == (out.numel(), _columns(out)) else 0)


_RESHAPES = ("aten::view", "aten::_unsafe_view", "aten::squeeze", "aten::squeeze_")
_MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def _registered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Macs:
    """Returns the cost by a formula registered with PyTorch, also by the user."""
    name = _name(func)
    formula = flop_registry.get(getattr(func, "_overloadpacket", func))
    if formula is None:
        return Macs()
    if name in _MATMULS:  # some overloads have a dtype argument that the formulas do not expect
        args = tuple(value for value in args if isinstance(value, torch.Tensor))
    macs = int(formula(*args, **kwargs, out_val=out)) // 2
    if name in ("aten::bmm", "aten::baddbmm"):
        is_attention = not any(_is_weight(factor) for factor in args[-2:])
    else:
        is_attention = "attention" in name or "attn" in name
    if is_attention:
        return Macs(attention=macs)
    return Macs(weights=macs, biases=out.numel() if _adds_bias(name, args, out) else 0)


def _adds_bias(name: str, args: tuple[Any, ...], out: Any) -> bool:
    if name == "aten::addmm":
        return _is_row(args[0], out)
    return "convolution" in name and "backward" not in name and args[2] is not None


def _name(func: Any) -> str:
    """Returns an operator's qualified name without the overload, such as ``aten::mm``."""
    return func._schema.name if isinstance(func, torch._ops.OpOverload) else str(func)


def _columns(tensor: torch.Tensor) -> int:
    return tensor.shape[-1] if tensor.dim() else 1


def _is_row(value: Any, out: torch.Tensor) -> bool:
    """Whether ``value`` may be a bias: one number per column of ``out``."""
    return isinstance(value, torch.Tensor) and value.dim() == 1 and len(value) == _columns(out)


def _is_weight(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, Parameter) or isinstance(tensor._base, Parameter)


# Operators without a formula in PyTorch, or with a formula that is wrong in some versions.
def _rows_times_weights(args: tuple[Any, ...], out: Any) -> Macs:
    """``[..., rows, k]`` times weights ``k x n`` in any packing, to ``[..., rows, n]``."""
    return Macs(weights=args[0].numel() * _columns(out))


def _linear(args: tuple[Any, ...], out: Any) -> Macs:
    has_bias = len(args) > 2 and args[2] is not None
    return Macs(args[0].numel() * args[1].shape[0], biases=out.numel() if has_bias else 0)


def _matrix_times_vector(args: tuple[Any, ...], out: Any) -> Macs:
    return Macs(weights=args[-2].numel())


def _attention_kernel(args: tuple[Any, ...], out: Any) -> Macs:
    """Queries ``[batch, heads, tokens, dim]``; keys and values may have fewer heads."""
    query, key, value = (tensor.shape for tensor in args[:3])
    key, value = ((shape[0], query[1], *shape[2:]) for shape in (key, value))
    return Macs(attention=sdpa_flop_count(query, key, value) // 2)  # type: ignore[no-untyped-call]


def _fused_attention_layer(args: tuple[Any, ...], out: Any) -> Macs:
    """`torch.nn.MultiheadAttention` as one kernel: self-attention on ``[batch, tokens, dim]``."""
    tokens, dim = args[0], args[3]
    projections = 4 * tokens.numel()
    products = sum(2 * len(sample) ** 2 * dim for sample in tokens.unbind())
    return Macs(projections * dim, products, projections)


def _fused_encoder_layer(args: tuple[Any, ...], out: Any) -> Macs:
    """`torch.nn.TransformerEncoderLayer` as one kernel, on ``[batch, tokens, dim]``."""
    tokens, dim, hidden = args[0], args[1], args[14].shape[0]
    attention = _fused_attention_layer((tokens, None, None, dim), out)
    rows = tokens.numel() // dim
    return Macs(
        attention.weights + 2 * rows * dim * hidden,
        attention.attention,
        attention.biases + rows * (hidden + dim),
    )


_FORMULAS: Mapping[str, Callable[[tuple[Any, ...], Any], Macs]] = {
    "aten::linear": _linear,
    "aten::mv": _matrix_times_vector,
    "aten::addmv": _matrix_times_vector,
    "aten::_int_mm": _rows_times_weights,
    "aten::_weight_int8pack_mm": _rows_times_weights,
    "aten::_weight_int4pack_mm": _rows_times_weights,
    "aten::_weight_int4pack_mm_for_cpu": _rows_times_weights,
    "aten::_grouped_mm": _rows_times_weights,
    "aten::_scaled_grouped_mm": _rows_times_weights,
    "quantized::linear_dynamic": _rows_times_weights,
    "aten::_native_multi_head_attention": _fused_attention_layer,
    "aten::_transformer_encoder_layer_fwd": _fused_encoder_layer,
}
