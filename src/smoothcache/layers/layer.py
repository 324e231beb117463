"""Records of a layer that can be reused and of its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..files.document import Value


def layer_to_json(layer: CacheLayer) -> dict[str, Any]:
    written = {"path": layer.path, "kind": layer.kind, "block": layer.block, "macs": layer.macs}
    return written if layer.nbytes is None else {**written, "bytes": layer.nbytes}


def layer_from_json(value: Value) -> CacheLayer:
    fields = value.fields("path", "kind", "block", "macs", optional=("bytes",))
    return CacheLayer(
        path=fields["path"].text(),
        kind=fields["kind"].text(),
        block=fields["block"].text(),
        macs=fields["macs"].or_none(Value.integer),
        nbytes=fields["bytes"].or_none(Value.integer),
    )


def identity_to_json(model: ModelIdentity | None) -> dict[str, Any] | None:
    if model is None:
        return None
    return {"class_name": model.class_name, "fingerprint": model.fingerprint}


def identity_from_json(value: Value) -> ModelIdentity:
    fields = value.fields("class_name", "fingerprint")
    return ModelIdentity(fields["class_name"].text(), fields["fingerprint"].text())


Granularity = Literal["auto", "layer", "block", "model"]
"""Unit of reuse: layers, whole blocks, or the denoiser's output; "auto" chooses per block."""
Select = Callable[[str, nn.Module], bool | str]
"""Predicate over path and module; returns whether the module is a layer, or its kind."""


@dataclass(frozen=True)
class CacheLayer:
    """One layer whose output can be reused between steps.

    Attributes:
        path: Dotted path of the module within the denoiser, prefixed with the component's name if a
            pipeline has several denoisers. Empty for the denoiser itself (granularity "model").
        kind: ``self_attn``, ``cross_attn``, ``joint_attn``, ``ffn``, ``block`` for the residual of
            a whole block, or ``model`` for the denoiser's output. Prefixed with ``spatial_`` or
            ``temporal_`` in a model that has both, and with ``refiner_`` in blocks that process
            only the prompt.
        block: Dotted path of the layer's block.
        macs: Multiply-accumulates of the layer in one step (all of its calls, at the observed batch
            size); None before a forward has been observed.
        nbytes: Bytes of the layer's outputs in one step (all of its calls, at the observed batch
            size and dtype); None before a forward has been observed.
    """

    path: str
    kind: str
    block: str
    macs: int | None = None
    nbytes: int | None = None


@dataclass(frozen=True)
class ModelIdentity:
    """Class and fingerprint of the model of a schedule or calibration.

    Attributes:
        class_name: Class of the denoiser; several classes are joined by ``+``.
        fingerprint: Hash of the denoiser's configuration, or of the names and shapes of its
            parameters if it has none, as 16 hexadecimal digits. Independent of weights and dtype.
    """

    class_name: str
    fingerprint: str


def is_residual(layer: CacheLayer) -> bool:
    """Whether a module's residual is reused instead of its output.

    Args:
        layer: A layer of any granularity.

    Returns:
        True for whole blocks, False for attentions, feed-forwards and the denoiser's output.

    Example:
        >>> is_residual(CacheLayer("blocks.0", kind="block", block="blocks.0"))
        True
    """
    return layer.kind.endswith("block")


def is_followed(layer: CacheLayer) -> bool:
    """Whether the first forward determines if the layer's output or its residual is reused."""
    return not is_residual(layer) and layer.kind != "model"
