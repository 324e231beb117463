"""Schedule files: human-readable JSON, fully validated on load."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..checks import listed
from ..errors import InvalidArgumentError
from ..files.document import Value, check_version, format_json, parse_json, write_atomically
from ..layers.layer import (
    CacheLayer,
    identity_from_json,
    identity_to_json,
    layer_from_json,
    layer_to_json,
)
from ..steps.predictors import FITTED, PREDICTORS
from .row import Row

_OPTIONAL = ("gains", "weights", "branch_weights", "batch_parts")
FORMAT, VERSION = "smoothcache.schedule", 1
T = TypeVar("T")


def write(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Writes the fields of a schedule, by name; see ``Schedule.save``."""
    layers, noise_levels = fields["layers"], fields["noise_levels"]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "num_steps": fields["num_steps"],
        "model": identity_to_json(fields["model"]),
        "solver": fields["solver"],
        "timesteps": fields["timesteps"],
        **({"noise_levels": noise_levels} if noise_levels else {}),
        "compute": fields["compute"],
        "quality": {name: _finite_or_text(x) for name, x in fields["quality"].items()},
        "provenance": dict(fields["provenance"]),
        "layers": layers and [layer_to_json(x) for x in layers],
        "rows": _rows_to_json(layers, fields["rows"]),
    }
    write_atomically(path, format_json(document))


def read(path: str | os.PathLike[str], make: Callable[..., T]) -> T:
    """Reads a schedule or a published 0/1 file; see ``Schedule.load``.

    Args:
        path: The file.
        make: Constructor of the schedule; takes its fields as keyword arguments.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If the file is damaged or was written by a newer version.
    """
    document = parse_json(Path(path).read_bytes(), str(path))
    if _is_published(document):
        masks = read_masks(document)
        return make(
            num_steps=len(next(iter(masks.values()))),
            rows={name: Row(mask) for name, mask in masks.items()},
            provenance={"source": "published 0/1 file", "file": Path(path).name},
        )
    check_version(document, FORMAT, VERSION)
    fields = document.fields(
        *("format", "version", "num_steps", "model", "solver", "timesteps", "compute"),
        *("quality", "provenance", "layers", "rows"),
        optional=("noise_levels",),
    )
    num_steps = fields["num_steps"].integer(least=1)
    layers = fields["layers"].or_none(lambda x: tuple(x.list_of(layer_from_json)))
    try:
        return make(
            num_steps=num_steps,
            rows=_rows_from_json(fields["rows"], layers, num_steps),
            layers=layers,
            model=fields["model"].or_none(identity_from_json),
            solver=fields["solver"].or_none(Value.text),
            timesteps=fields["timesteps"].or_none(lambda x: tuple(x.list_of(Value.number))),
            noise_levels=fields["noise_levels"].or_none(lambda x: tuple(x.list_of(Value.number))),
            compute=fields["compute"].or_none(Value.number),
            quality=fields["quality"].dict_of(_number_or_text),
            provenance=fields["provenance"].dict_of(Value.text),
        )
    except InvalidArgumentError as error:  # inconsistent fields, such as a repeated layer
        raise document.error(str(error).rstrip(".")) from error


def _is_published(document: Value) -> bool:
    """Whether this looks like a published 0/1 file: lists, and none of the library's fields."""
    entries = document.raw if isinstance(document.raw, dict) else {}
    has_lists = any(isinstance(entry, list) for entry in entries.values())
    return has_lists and not {"format", "version", "rows"} & entries.keys()


def _rows_to_json(
    layers: Sequence[CacheLayer] | None, rows: Mapping[str, Row]
) -> list[dict[str, Any]]:
    """Writes one row per kind if all its layers have equal rows, otherwise one row per layer."""
    if layers is None:
        return [_row_to_json("name", name, row) for name, row in rows.items()]
    by_kind: dict[str, dict[str, Row]] = {}
    for layer in layers:
        by_kind.setdefault(layer.kind, {})[layer.path] = rows[layer.path]
    written = []
    for kind, of_kind in by_kind.items():
        if len(distinct := set(of_kind.values())) == 1:
            written.append(_row_to_json("kind", kind, distinct.pop()))
        else:
            written += [_row_to_json("layer", path, row) for path, row in of_kind.items()]
    return written


def _row_to_json(what: str, name: str, row: Row) -> dict[str, Any]:
    steps = [step for step, computed in enumerate(row.computed) if computed]
    written: dict[str, Any] = {what: name, "predictor": row.predictor, "compute_steps": steps}
    if row.gains is not None:
        pairs = zip(row.gains, row.computed, strict=True)
        written["gains"] = [gain for gain, is_computed in pairs if not is_computed]
    if row.weights is not None:
        written["weights"] = [weights for weights in row.weights if weights]
    if row.branch_weights:
        written["branch_weights"] = [[x for x in table if x] for table in row.branch_weights]
        written["batch_parts"] = row.batch_parts
    return written


def _rows_from_json(
    rows: Value, layers: Sequence[CacheLayer] | None, num_steps: int
) -> dict[str, Row]:
    """Returns the row of every layer; each layer must have exactly one, for itself or its kind."""
    found: dict[str, Row] = {}
    for item in rows.items():
        what = _what(item, ("name",) if layers is None else ("kind", "layer"))
        fields = item.fields(what, "predictor", "compute_steps", optional=_OPTIONAL)
        name = fields[what].text()
        if layers is None:
            covered = [name]
        else:
            covered = [x.path for x in layers if name == (x.kind if what == "kind" else x.path)]
        if not covered:
            raise item.error(f"there is no layer with the {_noun(what)} '{name}' in 'layers'")
        for path in covered:
            if path in found:
                raise item.error(f"'{path}' already has a row; each layer needs exactly one")
            found[path] = _row_from_json(item, fields, num_steps)
    if missing := [layer.path for layer in layers or () if layer.path not in found]:
        raise rows.error(f"no row covers {listed(missing)}; each layer needs exactly one")
    return found


def _row_from_json(item: Value, fields: dict[str, Value], num_steps: int) -> Row:
    predictor = fields["predictor"].text()
    if predictor not in (*PREDICTORS, FITTED):
        known = listed((*PREDICTORS, FITTED), 20)
        raise fields["predictor"].error(f"'{predictor}' is unknown; known predictors are {known}")
    steps: set[int] = set()
    for value in fields["compute_steps"].items():
        step = value.integer()
        if step >= num_steps:
            raise value.error(f"step {step} is out of range; the steps are 0 to {num_steps - 1}")
        if steps and step <= max(steps):
            raise value.error(f"step {step} follows step {max(steps)}; steps must be increasing")
        if not steps and step != 0:
            raise value.error("step 0 must be computed: there is nothing to reuse yet")
        steps.add(step)
    if not steps:
        raise item.error("step 0 must be computed: there is nothing to reuse yet")
    computed = tuple(step in steps for step in range(num_steps))
    gains = fields["gains"].or_none(lambda value: _gains_from_json(value, computed))
    weights = fields["weights"].or_none(lambda value: _weights_from_json(value, computed))
    others = fields["branch_weights"].or_none(
        lambda value: tuple(value.list_of(lambda x: _weights_from_json(x, computed)))
    )
    parts = fields["batch_parts"].or_none(lambda value: value.integer(least=1))
    try:
        return Row(computed, predictor, gains, weights, others or (), parts or 1)
    except InvalidArgumentError as error:
        raise item.error(str(error).rstrip(".")) from error


def _gains_from_json(value: Value, computed: Sequence[bool]) -> tuple[float, ...]:
    """Returns the gains of all steps from the gains of the reused steps."""
    given = value.list_of(Value.number)
    if len(given) != computed.count(False):
        raise value.error(
            f"{len(given)} gains for {computed.count(False)} reused steps; each needs one"
        )
    rest = iter(given)
    return tuple(1.0 if is_computed else next(rest) for is_computed in computed)


def _weights_from_json(value: Value, computed: Sequence[bool]) -> tuple[tuple[float, ...], ...]:
    """Returns the weights of all steps from the weights of the reused steps."""
    given = value.list_of(lambda x: tuple(x.list_of(Value.number)))
    if len(given) != computed.count(False):
        raise value.error(
            f"weights for {len(given)} steps, but {computed.count(False)} steps are reused; each "
            "needs a list of weights"
        )
    rest = iter(given)
    return tuple(() if is_computed else next(rest) for is_computed in computed)


def _what(item: Value, choices: tuple[str, ...]) -> str:
    """Returns whether a row is for a kind, a layer or a name."""
    found = [choice for choice in choices if choice in item.entries()]
    if len(found) != 1:
        raise item.error(f"expected exactly one of the fields {listed(choices)}")
    return found[0]


def _noun(what: str) -> str:
    return "path" if what == "layer" else what


def _finite_or_text(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)  # JSON has no infinity


def _number_or_text(value: Value) -> float:
    return float(str(value.raw)) if value.raw in ("inf", "-inf") else value.number()


def read_masks(document: Value) -> dict[str, tuple[bool, ...]]:
    """Returns the masks of a published file by name, True where a step is computed.

    Raises:
        FileFormatError: If it is not an object of equally long 0/1 lists that start with 1.
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


def _is_one(bit: Value) -> bool:
    if bit.raw not in (0, 1) or not isinstance(bit.raw, int) or isinstance(bit.raw, bool):
        raise bit.error(f"expected 0 or 1, got {bit.raw!r}")
    return bit.raw == 1
