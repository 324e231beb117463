"""Trajectories in a calibration file: additional tables, validated on load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..files.document import Value
from .trajectory import Guidance, SolverResponses, Trajectories

_GRAMS, _RESPONSES = "trajectory.grams", "trajectory.responses"
_LATENTS, _OUTPUTS = "trajectory.latents", "trajectory.outputs"  # with the sample's number
_OFFSETS = "trajectory.offsets"  # likewise
_HALF = (np.dtype(np.float16), np.dtype(np.float32))


def to_file(trajectories: Trajectories) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Returns the metadata, and the tables by name."""
    guidance = trajectories.responses.guidance
    document = {
        "samples": trajectories.num_samples,
        "denoisers": list(trajectories.denoisers),
        "output_bytes": trajectories.output_bytes,
        "has_latents": trajectories.has_latents,
        "knows_end": trajectories.responses.knows_end,
        "guidance": [list(weights) for weights in guidance.weights],
        "parts": guidance.parts,
        "channels": guidance.channels,
    }
    if trajectories.offsets:
        document["has_offsets"] = True
    tables: dict[str, npt.NDArray[Any]] = {
        _GRAMS: np.ascontiguousarray(trajectories.grams),
        _RESPONSES: np.ascontiguousarray(trajectories.responses.table),
    }
    for i, (latents, outputs) in enumerate(
        zip(trajectories.latents, trajectories.outputs, strict=True)
    ):
        tables[f"{_LATENTS}.{i}"] = latents.contiguous().numpy()
        tables[f"{_OUTPUTS}.{i}"] = outputs.contiguous().numpy()
    for i, offsets in enumerate(trajectories.offsets):
        tables[f"{_OFFSETS}.{i}"] = offsets.contiguous().numpy()
    return document, tables


def from_file(document: Value, tables: Mapping[str, npt.NDArray[Any]]) -> Trajectories | None:
    """Restores trajectories written by ``to_file``; None if the file has none.

    Raises:
        FileFormatError: If a table is missing, unknown or of another type.
        InvalidArgumentError: If tables contradict each other.
    """
    fields = document.or_none(
        lambda value: value.fields(
            *("samples", "denoisers", "output_bytes", "has_latents", "knows_end", "guidance"),
            *("parts", "channels"),
            optional=("has_offsets",),
        )
    )
    if fields is None:
        if tables:
            raise document.error(
                f"the table '{next(iter(tables))}' is unknown, so this is not a calibration file"
            )
        return None
    count = fields["samples"].integer(least=1)
    numbers = range(count) if _flag(fields["has_latents"]) else range(0)
    has_offsets = fields["has_offsets"].or_none(_flag) or False
    doubles = {_GRAMS, _RESPONSES}
    halves = {f"{name}.{i}" for name in (_LATENTS, _OUTPUTS) for i in numbers}
    halves |= {f"{_OFFSETS}.{i}" for i in numbers if has_offsets}
    _refuse_unknown(document, set(tables), doubles | halves)
    for name in doubles | halves:
        allowed = _HALF if name in halves else (np.dtype(np.float64),)
        if tables[name].dtype not in allowed:
            raise document.error(f"the table '{name}' is stored as {tables[name].dtype}")
        if not np.isfinite(tables[name]).all():
            raise document.error(f"the table '{name}' contains NaN or infinity")
    weights = fields["guidance"].list_of(lambda x: tuple(x.list_of(Value.number)))
    guidance = Guidance(
        tuple(weights),
        fields["parts"].integer(least=1),
        fields["channels"].or_none(lambda value: value.integer(least=1)),
    )
    if not weights or any(len(x) != guidance.parts for x in weights):
        raise fields["guidance"].error(f"expected {guidance.parts} weights for each branch")
    responses = SolverResponses(tables[_RESPONSES], guidance, _flag(fields["knows_end"]))
    if len(tables[_GRAMS]) != count:
        raise document.error(f"inner products of {len(tables[_GRAMS])} samples, expected {count}")
    return Trajectories(
        responses,
        tables[_GRAMS],
        tuple(fields["denoisers"].list_of(Value.text)),
        fields["output_bytes"].integer(),
        tuple(torch.from_numpy(tables[f"{_LATENTS}.{i}"]) for i in numbers),
        tuple(torch.from_numpy(tables[f"{_OUTPUTS}.{i}"]) for i in numbers),
        tuple(torch.from_numpy(tables[f"{_OFFSETS}.{i}"]) for i in numbers if has_offsets),
    )


def _refuse_unknown(document: Value, found: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - found):
        raise document.error(f"the table '{missing[0]}' is missing")
    if unknown := sorted(found - wanted):
        raise document.error(f"the table '{unknown[0]}' is unknown")


def _flag(value: Value) -> bool:
    if not isinstance(value.raw, bool):
        raise value.error(f"expected true or false, got {value.raw!r}")
    return value.raw
