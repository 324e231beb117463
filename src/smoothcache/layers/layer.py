"""The record of a layer that can be reused, and of the model that it belongs to."""

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
"""What is reused: layers, whole blocks, or the denoiser's output; "auto" chooses for each block."""
Select = Callable[[str, nn.Module], bool | str]
"""Path and module -> whether it is a layer, or of which kind."""


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
    """Class and fingerprint of the model that a schedule or a calibration is for.

    Attributes:
        class_name: Class of the denoiser; several are joined by ``+``.
        fingerprint: 16 hexadecimal digits over the denoiser's configuration, or over the names
            and shapes of its parameters if it has none. Weights and dtype do not enter.
    """

    class_name: str
    fingerprint: str


def is_residual(layer: CacheLayer) -> bool:
    """Whether the residual of a module is reused instead of its output.

    Args:
        layer: Of any granularity.

    Returns:
        True for whole blocks, False for attentions, feed-forwards and the denoiser's output.

    Example:
        >>> is_residual(CacheLayer("blocks.0", kind="block", block="blocks.0"))
        True
    """
    return layer.kind.endswith("block")


def is_followed(layer: CacheLayer) -> bool:
    """Whether a forward decides if a layer's output, or what it adds to its input, is reused."""
    return not is_residual(layer) and layer.kind != "model"
