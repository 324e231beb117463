"""Schedules that keep no more than so many bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import InvalidArgumentError
from ..layers.layer import CacheLayer
from ..schedule.expected_cost import buffer_bytes
from ..schedule.row import Row


def within_bytes(
    rows: Mapping[str, Row], layers: Sequence[CacheLayer], max_bytes: int
) -> dict[str, Row]:
    """Reuses what gains the most MACs for its bytes, as long as it fits, and computes the rest.

    The bytes are those of the buffers of a compiled model. An uncompiled one keeps no more.

    >>> layers = [
    ...     CacheLayer("attn", "self_attn", "", macs=50, nbytes=10),
    ...     CacheLayer("ff", "ffn", "", macs=90, nbytes=10),
    ... ]
    >>> rows = {"attn": Row((True, False)), "ff": Row((True, False))}
    >>> {path: row.computed for path, row in within_bytes(rows, layers, 15).items()}
    {'attn': (True, True), 'ff': (True, False)}

    Args:
        rows: Layer path -> row.
        layers: The layers, with the MACs and the bytes of one step.
        max_bytes: The limit.

    Raises:
        InvalidArgumentError: If the bytes of a layer that is reused are not known.
    """
    needed: dict[str, int] = {}
    gains: dict[str, float] = {}
    for layer in layers:
        row = rows[layer.path]
        nbytes = buffer_bytes(row, layer)
        if nbytes is None:
            raise InvalidArgumentError(
                f"max_bytes needs the bytes of every layer, and those of {layer.path!r} are not "
                "known: the calibration is of an older version; calibrate again"
            )
        needed[layer.path] = nbytes
        gains[layer.path] = (layer.macs or 1) * row.computed.count(False) / max(nbytes, 1)
    rows, left = dict(rows), max_bytes
    for path in sorted(rows, key=gains.__getitem__, reverse=True):
        if needed[path] <= left:
            left -= needed[path]
        else:
            rows[path] = replace(rows[path], computed=(True,) * len(rows[path].computed))
    return rows
