"""The 0/1 files that the authors of SmoothCache published, and what their names mean on a model.

Such a file is one JSON object, ``{"attn": [1, 0, 1], "mlp": [1, 0, 1]}``: 1 computes the layers
of that name at that step, 0 reuses them. "attn-3" means block number 3 alone.

Source: the schedules in the repository Roblox/SmoothCache, and Learning-to-Cache in its format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from ._checks import listed
from ._files import Value
from .errors import ScheduleMismatchError
from .layers import CacheLayer

_SELF = ("self_attn", "joint_attn")  # the first of these kinds that the model has
KINDS_OF_NAME: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("attn", "attn1", "self_attn"), _SELF),
        **dict.fromkeys(("attn2", "cross_attn"), ("cross_attn",)),
        **dict.fromkeys(("mlp", "ff", "ffn", "feed_forward"), ("ffn",)),
    }
)


def read_masks(document: Value) -> dict[str, tuple[bool, ...]]:
    """The masks of a published file by name, True where a step is computed.

    Raises:
        FileFormatError: If it is not an object of equally long lists of 0 and 1 that start with 1.
    """
    masks = {
        name: tuple(_is_one(bit) for bit in row.items()) for name, row in document.entries().items()
    }
    num_steps = len(next(iter(masks.values())))
    for name, mask in masks.items():
        row = Value(None, document.file, name)
        if len(mask) != num_steps:
            raise row.error(f"has {len(mask)} steps, but {listed(masks, 1)} has {num_steps}")
        if not mask or not mask[0]:
            raise row.error("step 0 must be computed (1): there is nothing to reuse yet")
    return masks


def map_names(names: Iterable[str], layers: Sequence[CacheLayer]) -> dict[str, str]:
    """Which published name covers which layer.

    In this order a name means: the layers whose path ends in it; the layers of the kind that it
    usually stands for; and "name-3" means the same within block 3, counted in the order of layers.

    Args:
        names: All names of the schedule.
        layers: The layers of the model.

    Returns:
        Layer path -> name. A layer that no name covers is not in it.

    Raises:
        ScheduleMismatchError: If a name covers no layer, two names cover the same layer, or the
            file has another number of blocks than the model; all such names are listed.
    """
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    owners: dict[str, str] = {}
    unnamed_blocks = set(range(len(blocks)))
    problems: list[str] = []
    for name in names:
        covered = _covered_by(name, layers)
        if not covered and (numbered := re.fullmatch(r"(.+)-([0-9]+)", name)):
            base, index = numbered[1], int(numbered[2])
            if index >= len(blocks):
                problems.append(f"'{name}' means block {index}, the model has {len(blocks)}")
                continue
            unnamed_blocks.discard(index)
            covered = _covered_by(base, [x for x in layers if x.block == blocks[index]])
        if not covered:
            problems.append(f"'{name}' fits no layer")
        for layer in covered:
            if layer.path in owners:
                problems.append(f"'{owners[layer.path]}' and '{name}' both cover '{layer.path}'")
            owners[layer.path] = name
    if 0 < len(unnamed_blocks) < len(blocks):
        unnamed = listed(blocks[index] for index in sorted(unnamed_blocks))
        problems.append(f"no row for the blocks {unnamed}")
    if problems:
        shown = "; ".join(problems[:10])
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        kinds = listed(dict.fromkeys(layer.kind for layer in layers), 20) or "none"
        raise ScheduleMismatchError(
            f"the published schedule does not fit this model: {shown}{more}. The model has "
            f"{len(layers)} layers in {len(blocks)} blocks, of the kinds {kinds}. Take a schedule "
            f"that was made for this model, or rename the rows of the file."
        )
    return owners


def _covered_by(name: str, layers: Sequence[CacheLayer]) -> list[CacheLayer]:
    """The layers that a name without a block number means."""
    if covered := [layer for layer in layers if layer.path.rpartition(".")[2] == name]:
        return covered
    for kind in KINDS_OF_NAME.get(name, ()):  # a kind may be prefixed: spatial_self_attn
        if covered := [x for x in layers if x.kind == kind or x.kind.endswith(f"_{kind}")]:
            return covered
    return []


def _is_one(bit: Value) -> bool:
    if bit.raw not in (0, 1) or not isinstance(bit.raw, int) or isinstance(bit.raw, bool):
        raise bit.error(f"expected 0 or 1, got {bit.raw!r}")
    return bit.raw == 1
