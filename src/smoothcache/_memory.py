"""Bytes that a schedule will keep, told before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from .layers import CacheLayer
from .predictors import PREDICTORS, last_uses


class _Row(Protocol):
    @property
    def computed(self) -> tuple[bool, ...]: ...

    @property
    def predictor(self) -> str: ...


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
        for step, last_use in enumerate(last_uses(row.computed, PREDICTORS[row.predictor].order)):
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
    return None if layer.nbytes is None else layer.nbytes * (PREDICTORS[row.predictor].order + 1)
