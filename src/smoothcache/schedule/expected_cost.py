"""Memory and compute of a schedule, estimated before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from ..layers.layer import CacheLayer
from ..steps.predictors import last_uses
from .row import Row


class _Row(Protocol):
    @property
    def computed(self) -> tuple[bool, ...]: ...

    @property
    def order(self) -> int: ...


def peak_bytes(rows: Mapping[str, _Row], layers: Sequence[CacheLayer]) -> int | None:
    """Estimates the peak size of the values kept by an uncompiled run, in bytes.

    A value is kept from its computation until its last use. The estimate assumes that layers run
    in the given order and that a step is one call; with several calls, a run may keep less.

    Args:
        rows: Rows by layer path.
        layers: The layers with the bytes of their outputs in one step.

    Returns:
        The peak in bytes; None if the bytes of a reused layer are unknown.
    """
    changes: list[tuple[int, int, int]] = []  # step, number of the layer, bytes
    for number, layer in enumerate(layers):
        row = rows[layer.path]
        if all(row.computed):
            continue
        if layer.nbytes is None:
            return None
        for step, last_use in enumerate(last_uses(row.computed, row.order)):
            if row.computed[step] and last_use is not None:
                changes += [(step, number, layer.nbytes), (last_use, number, -layer.nbytes)]
    return max(accumulate(change for _, _, change in sorted(changes)), default=0)


def buffer_bytes(row: _Row, layer: CacheLayer) -> int | None:
    """Returns the bytes of a layer's buffers in a compiled model; None if unknown.

    >>> from smoothcache.schedule import Row
    >>> layer = CacheLayer("blocks.0.attn", kind="self_attn", block="blocks.0", nbytes=100)
    >>> buffer_bytes(Row((True, False), "taylor"), layer)
    200
    """
    if all(row.computed):
        return 0
    return None if layer.nbytes is None else layer.nbytes * (row.order + 1)


def compute_fraction(
    rows: Mapping[str, Row], layers: Sequence[CacheLayer], total_macs: int
) -> float | None:
    """MACs of a run under a schedule, relative to the uncached run.

    Everything outside the layers is computed at every step; prediction is counted as free.

    >>> half = CacheLayer("blocks.0.ff", kind="ffn", block="blocks.0", macs=50)
    >>> compute_fraction({"blocks.0.ff": Row((True, False))}, [half], total_macs=100)
    0.75

    Args:
        rows: Rows by layer path.
        layers: The layers with their MACs of one step.
        total_macs: MACs of one uncached step of the whole denoiser, layers included.

    Returns:
        A fraction in (0, 1]; None if the cost of a layer or the total is unknown.
    """
    if total_macs <= 0:
        return None
    saved = steps = 0
    for layer in layers:
        if layer.macs is None:
            return None
        steps = len(rows[layer.path].computed)
        saved += layer.macs * rows[layer.path].computed.count(False)
    return 1 - saved / (total_macs * steps)


def macs_saved_per_step(rows: Mapping[str, Row], layers: Sequence[CacheLayer]) -> float | None:
    """Returns the mean MACs saved per step by reuse; None if unknown."""
    saved = 0.0
    for layer in layers:
        if layer.macs is None:
            return None
        computed = rows[layer.path].computed
        saved += layer.macs * computed.count(False) / len(computed)
    return saved if layers else None
