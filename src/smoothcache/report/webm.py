"""A clip as a WebM video that every browser plays, made without a video encoder.

A lossy WebP picture is one key frame of VP8. Pictures of pillow, put one after the other into a
Matroska container, are a video in which every frame can be sought.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..optional import optional_module

QUALITY = 85
SMALLEST = 192  # pixels of the shorter side below which frames are enlarged by a whole factor
CLUSTER_MS = 1000
HEADER, SEGMENT, INFO, TRACKS = 0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B
CLUSTER, CUES = 0x1F43B675, 0x1C53BB6B


def encoded_video(frames: npt.NDArray[np.uint8], *, frames_per_second: float) -> bytes:
    """Frames as a WebM file with one VP8 track.

    Args:
        frames: [frames, height, width, 3].
        frames_per_second: How fast it runs.

    Raises:
        MissingPackageError: If pillow is not installed.
    """
    factor = max(1, -(-SMALLEST // min(frames.shape[1:3])))
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    keys = [_key_frame(frame) for frame in frames]
    times = [round(1000 * i / frames_per_second) for i in range(len(keys) + 1)]
    height, width = frames.shape[1:3]
    info = _element(
        INFO,
        _element(0x2AD7B1, _number(1_000_000)),  # a tick is a millisecond
        _element(0x4D80, b"smoothcache"),
        _element(0x5741, b"smoothcache"),
        _element(0x4489, struct.pack(">d", times[-1])),
    )
    video = _element(0xE0, _element(0xB0, _number(width)), _element(0xBA, _number(height)))
    track = _element(
        0xAE,
        _element(0xD7, _number(1)),
        _element(0x73C5, _number(1)),
        _element(0x9C, _number(0)),
        _element(0x86, b"V_VP8"),
        _element(0x83, _number(1)),
        video,
    )
    before = info + _element(TRACKS, track)
    clusters = _clusters(keys, times)
    segment = before + _cues([time for time, _ in clusters], clusters, len(before))
    segment += b"".join(data for _, data in clusters)
    return _header() + _element(SEGMENT, segment)


def _header() -> bytes:
    return _element(
        HEADER,
        _element(0x4286, _number(1)),
        _element(0x42F7, _number(1)),
        _element(0x42F2, _number(4)),
        _element(0x42F3, _number(8)),
        _element(0x4282, b"webm"),
        _element(0x4287, _number(2)),
        _element(0x4285, _number(2)),
    )


def _clusters(keys: Sequence[bytes], times: Sequence[int]) -> list[tuple[int, bytes]]:
    """Time of a cluster and its bytes; times of blocks are relative to it, in 16 bits."""
    groups: dict[int, list[tuple[int, bytes]]] = {}
    for time, key in zip(times, keys, strict=False):
        groups.setdefault(time // CLUSTER_MS, []).append((time, key))
    clusters = []
    for blocks in groups.values():
        start = blocks[0][0]
        data = [
            _element(0xA3, b"\x81" + struct.pack(">hB", time - start, 0x80) + key)
            for time, key in blocks
        ]
        clusters.append((start, _element(CLUSTER, _element(0xE7, _number(start)), *data)))
    return clusters


def _cues(times: Sequence[int], clusters: Sequence[tuple[int, bytes]], offset: int) -> bytes:
    """Where each cluster begins; all numbers have eight bytes, so the size is known beforehand."""

    def written(positions: Sequence[int]) -> bytes:
        points = [
            _element(
                0xBB,
                _element(0xB3, _number(time, 8)),
                _element(0xB7, _element(0xF7, _number(1)), _element(0xF1, _number(position, 8))),
            )
            for time, position in zip(times, positions, strict=True)
        ]
        return _element(CUES, *points)

    begin = offset + len(written([0] * len(times)))
    positions = []
    for _, data in clusters:
        positions.append(begin)
        begin += len(data)
    return written(positions)


def _element(name: int, *content: bytes) -> bytes:
    """An element of EBML: its identifier, its size in eight bytes, its content."""
    data = b"".join(content)
    identifier = name.to_bytes((name.bit_length() + 7) // 8, "big")
    return identifier + struct.pack(">Q", len(data) | 1 << 56) + data


def _number(value: int, size: int = 0) -> bytes:
    return value.to_bytes(size or max(1, (value.bit_length() + 7) // 8), "big")


def _key_frame(frame: npt.NDArray[np.uint8]) -> bytes:
    """The VP8 key frame inside of a lossy WebP picture."""
    image: Any = optional_module("PIL.Image", extra="report")
    data = io.BytesIO()
    image.fromarray(frame).save(data, format="WEBP", quality=QUALITY, method=4)
    raw, place = data.getvalue(), 12
    while raw[place : place + 4] != b"VP8 ":
        place += 8 + (int.from_bytes(raw[place + 4 : place + 8], "little") + 1) // 2 * 2
    return raw[place + 8 : place + 8 + int.from_bytes(raw[place + 4 : place + 8], "little")]
