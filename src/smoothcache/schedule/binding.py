"""Maps the names in published SmoothCache schedule files onto the layers of a model.

Such a 0/1 file is one JSON object, ``{"attn": [1, 0, 1], "mlp": [1, 0, 1]}``: 1 computes the layers
of that name at that step, 0 reuses them. "attn-3" refers to block number 3 only.

Source: the schedules in the repository Roblox/SmoothCache, and Learning-to-Cache in its format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ..checks import listed
from ..errors import ScheduleMismatchError
from ..layers.layer import CacheLayer, ModelIdentity

_SELF = ("self_attn", "joint_attn")  # the first of these kinds in the model is used
KINDS_OF_NAME: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("attn", "attn1", "self_attn"), _SELF),
        **dict.fromkeys(("attn2", "cross_attn"), ("cross_attn",)),
        **dict.fromkeys(("mlp", "ff", "ffn", "feed_forward"), ("ffn",)),
    }
)


def map_names(names: Iterable[str], layers: Sequence[CacheLayer]) -> dict[str, str]:
    """Maps each layer to the published name that covers it.

    A name covers the layers whose path ends in it or, if there are none, the layers of the kind
    that it commonly denotes. "name-3" applies the same rules within block 3, counted in layer
    order.

    Args:
        names: All names of the schedule.
        layers: The layers of the model.

    Returns:
        Names by layer path, without the layers that no name covers.

    Raises:
        ScheduleMismatchError: If a name covers no layer, two names cover the same layer, or the
            number of blocks differs from the model's; all such names are listed.
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
                problems.append(f"'{name}' is for block {index}, but there are {len(blocks)}")
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
            f"{len(layers)} layers in {len(blocks)} blocks, of the kinds {kinds}. Use a schedule "
            f"made for this model, or rename the rows of the file."
        )
    return owners


def _covered_by(name: str, layers: Sequence[CacheLayer]) -> list[CacheLayer]:
    """Returns the layers covered by a name without a block number."""
    if covered := [layer for layer in layers if layer.path.rpartition(".")[2] == name]:
        return covered
    for kind in KINDS_OF_NAME.get(name, ()):  # a kind may be prefixed: spatial_self_attn
        if covered := [x for x in layers if x.kind == kind or x.kind.endswith(f"_{kind}")]:
            return covered
    return []


def with_costs_of(known: CacheLayer, layer: CacheLayer) -> CacheLayer:
    """Returns ``layer`` with missing costs filled in from ``known``."""
    macs = known.macs if layer.macs is None else layer.macs
    nbytes = known.nbytes if layer.nbytes is None else layer.nbytes
    return replace(layer, macs=macs, nbytes=nbytes)


def describe_other_model(planned: ModelIdentity | None, given: ModelIdentity | None) -> str:
    return (
        f"the schedule was planned for {_named(planned)}, but the model is {_named(given)}. "
        f"Load the model that it was planned for, or plan a schedule for this one."
    )


def _named(model: ModelIdentity | None) -> str:
    return f"{model.class_name} (configuration {model.fingerprint})" if model else "any model"


def check_same_layers(planned: Sequence[CacheLayer], given: Sequence[CacheLayer]) -> None:
    planned_kinds = {layer.path: layer.kind for layer in planned}
    given_kinds = {layer.path: layer.kind for layer in given}
    problems = {
        "missing from the model": [path for path in planned_kinds if path not in given_kinds],
        "not in the schedule": [path for path in given_kinds if path not in planned_kinds],
        "of another kind": [
            f"{path} ({kind}, planned {planned_kinds[path]})"
            for path, kind in given_kinds.items()
            if kind != planned_kinds.get(path, kind)
        ],
    }
    if found := [f"{what}: {listed(paths)}" for what, paths in problems.items() if paths]:
        raise ScheduleMismatchError(
            f"the layers of the schedule differ from the model's; {'; '.join(found)}. "
            f"Load the model that it was planned for, or plan a schedule for this one."
        )
