"""Bytes that a schedule will keep, told before it runs."""

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
    """The most bytes that an uncompiled run keeps at any moment.

    A value is kept from when it is computed until its last use. The layers are taken to run in
    their order, and the calls of a step as one: with several, the run may keep less.

    Args:
        rows: Layer path -> row.
        layers: The layers with their bytes of one step.

    Returns:
        None if the bytes of a layer that is reused are not known.
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
    """Bytes of the buffers that a layer of a compiled model keeps its values in, as long as it may.

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

    What lies outside the layers is computed at every step; predicting counts as free.

    >>> half = CacheLayer("blocks.0.ff", kind="ffn", block="blocks.0", macs=50)
    >>> compute_fraction({"blocks.0.ff": Row((True, False))}, [half], total_macs=100)
    0.75

    Args:
        rows: Layer path -> row.
        layers: The layers with their MACs of one step.
        total_macs: MACs of one uncached step of the whole denoiser, layers included.

    Returns:
        A fraction in (0, 1]; None if the cost of a layer, or the total, is not known.
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
    """MACs that reuse saves in a step, on average; None if not known."""
    saved = 0.0
    for layer in layers:
        if layer.macs is None:
            return None
        computed = rows[layer.path].computed
        saved += layer.macs * computed.count(False) / len(computed)
    return saved if layers else None
