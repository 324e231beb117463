"""What is written of samples: arrays for ADM's evaluator, pictures, sounds, clips."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import listed
from ..errors import InvalidArgumentError
from ..files.media import encoded, encoded_video, rgb_pixels
from ..metrics.external import vbench_name
from .shards import Shard

LONGEST_NAME = 255  # bytes that file systems take


@dataclass(frozen=True)
class Layout:
    """How samples lie in a folder.

    Attributes:
        name: What the user calls it.
        ndim: Dimensions of one sample.
        what: What such samples are, in messages.
        shard_size: Default number of samples that are written together; None for a batch.
    """

    name: str
    ndim: int
    what: str
    shard_size: int | None = None


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("npz", 3, "images [channels, height, width]", shard_size=64),
        Layout("png", 3, "images [channels, height, width]"),
        Layout("wav", 2, "sounds [channels, samples]"),
        Layout("gif", 4, "clips [frames, channels, height, width]"),
        Layout("mp4", 4, "clips [frames, channels, height, width]"),
    )
}
"""Name -> layout. ``npz``: shards of images in ``arr_0``, as ADM's evaluator reads them. ``png``
and ``wav``: a file for each sample. ``gif`` and ``mp4``: likewise, named as VBench asks for."""


def layout_named(name: str) -> Layout:
    """The layout of a name.

    Raises:
        InvalidArgumentError: If there is none.
    """
    if name not in LAYOUTS:
        raise InvalidArgumentError(f"there is no layout {name!r}; there are {listed(LAYOUTS, 9)}.")
    return LAYOUTS[name]


def file_names(
    layout: Layout,
    shard: Shard,
    inputs: Sequence[str | int],
    names: Sequence[str],
    *,
    come_again: bool,
) -> list[str]:
    """Names of the files of a shard: one for an array, otherwise one for each sample.

    Samples have the name of their input, or else clips their prompt, and the others their number.

    Args:
        layout: Of the run.
        shard: What is written.
        inputs: Prompts or class labels.
        names: Of the inputs; empty if they have none.
        come_again: Whether inputs are used several times, so that the number of the turn follows.

    Raises:
        InvalidArgumentError: If a prompt cannot be part of a file's name.
    """
    if layout.name == "npz":
        first, last = shard.samples[0], shard.samples[-1]
        return [f"{first:08d}-{last:08d}.npz"]
    return [
        f"{stem}.{layout.name}" for stem in _stems(layout, shard.samples, inputs, names, come_again)
    ]


def _stems(
    layout: Layout,
    samples: range,
    inputs: Sequence[str | int],
    names: Sequence[str],
    come_again: bool,
) -> list[str]:
    if names:
        turns = [f"-{i // len(names)}" if come_again else "" for i in samples]
        stems = [names[i % len(names)] + turn for i, turn in zip(samples, turns, strict=True)]
    elif has_prompts_as_names(layout, inputs):
        stems = [vbench_name(str(inputs[i % len(inputs)]), i // len(inputs), "") for i in samples]
    else:
        stems = [f"{i:08d}" for i in samples]
    for stem in stems:
        if "/" in stem or "\0" in stem or len(stem.encode()) + 5 > LONGEST_NAME:
            raise InvalidArgumentError(
                f"{stem[:60]!r} cannot be the name of a file (a slash, or over {LONGEST_NAME} "
                "bytes). Give the prompts names of their own, as an object of names and prompts."
            )
    return stems


def has_prompts_as_names(layout: Layout, inputs: Sequence[str | int]) -> bool:
    """Whether files are named by prompt and number, as VBench asks for."""
    return layout.name in ("gif", "mp4") and bool(inputs) and isinstance(inputs[0], str)


def encode(
    layout: Layout, samples: Tensor, sampling_rate: int | None, frames_per_second: float
) -> list[bytes]:
    """The files of a shard's samples, in their order.

    Args:
        layout: Of the run.
        samples: [samples, ...], images and clips in [0, 1], sounds in [-1, 1].
        sampling_rate: Of sounds.
        frames_per_second: Of clips.

    Raises:
        InvalidArgumentError: If they are of another kind, or not finite.
    """
    check_samples(layout, samples)
    if layout.name == "npz":
        return [_array(samples)]
    if layout.name == "mp4":
        return [encoded_video(rgb_pixels(x), frames_per_second) for x in samples]
    files = [encoded(x, sampling_rate, frames_per_second=frames_per_second) for x in samples]
    return [data for _, data in files]


def check_samples(layout: Layout, samples: Tensor) -> None:
    """Refuses what the layout cannot hold.

    Raises:
        InvalidArgumentError: If the samples are of another kind, or not finite.
    """
    if samples.ndim != layout.ndim + 1:
        fitting = [x.name for x in LAYOUTS.values() if x.ndim == samples.ndim - 1]
        hint = f"; take the layout {listed(fitting)}" if fitting else ""
        raise InvalidArgumentError(
            f"the layout '{layout.name}' holds {layout.what}, got samples of shape "
            f"{list(samples.shape[1:])}{hint}."
        )
    if not bool(torch.isfinite(samples).all()):
        raise InvalidArgumentError("the samples contain NaN or infinity.")


def _array(images: Tensor) -> bytes:
    pixels = np.round(255 * rgb_pixels(images).clip(0, 1)).astype(np.uint8)
    data = io.BytesIO()
    np.savez(data, arr_0=pixels)
    return data.getvalue()
