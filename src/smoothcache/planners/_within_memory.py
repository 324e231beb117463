"""Limits the bytes that a schedule keeps."""

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
    """Reuses the layers that save the most MACs per byte within a limit, and computes the rest.

    Bytes are counted for the buffers of a compiled model; an uncompiled model keeps no more.

    >>> layers = [
    ...     CacheLayer("attn", "self_attn", "", macs=50, nbytes=10),
    ...     CacheLayer("ff", "ffn", "", macs=90, nbytes=10),
    ... ]
    >>> rows = {"attn": Row((True, False)), "ff": Row((True, False))}
    >>> {path: row.computed for path, row in within_bytes(rows, layers, 15).items()}
    {'attn': (True, True), 'ff': (True, False)}

    Args:
        rows: Rows by layer path.
        layers: The layers, with the MACs and output bytes of one step.
        max_bytes: Limit in bytes.

    Raises:
        InvalidArgumentError: If the bytes of a reused layer are unknown.
    """
    needed: dict[str, int] = {}
    gains: dict[str, float] = {}
    for layer in layers:
        row = rows[layer.path]
        nbytes = buffer_bytes(row, layer)
        if nbytes is None:
            raise InvalidArgumentError(
                f"max_bytes requires the bytes of every layer, but {layer.path!r} has none, "
                "because the calibration is of an older version; calibrate again"
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
