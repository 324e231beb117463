"""Routers: trained weights that decide whether each layer is computed at each step."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..checks import check_count, check_number, check_texts, listed
from ..errors import InvalidArgumentError
from ..files.document import Value, check_version
from ..files.table import load_table, save_table
from ..layers.layer import (
    CacheLayer,
    ModelIdentity,
    identity_from_json,
    identity_to_json,
    layer_from_json,
    layer_to_json,
)
from ..steps.predictors import PREDICTORS

FORMAT, VERSION = "smoothcache.routers", 1
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Routers:
    """Trained routers of every layer and step, from which any threshold or budget is planned.

    Source: Ma et al., "Learning-to-Cache", arXiv 2406.01733. A router beta is the weight of the
    computed output when it is mixed with the reused output of a layer at a step.

    >>> layer = CacheLayer("blocks.0.attn", kind="self_attn", block="blocks.0", macs=50)
    >>> routers = Routers((layer,), np.array([[1.0, 0.2, 1.0]]), 2, timesteps=(9.0, 5.0, 1.0))
    >>> print(routers)
    Routers of an unknown model: 3 steps, every 2nd of them free to reuse with hold
      self_attn: 1 layers, beta 0.2 on average

    Attributes:
        layers: The layers, with their MACs where known.
        values: values[l, t] is beta of layer l at step t, in [0, 1]; 1 where the layer is always
            computed: at every ``interval``-th step from step 0 on, and where nothing could be
            reused. [layers, steps], read-only.
        interval: Number of steps between steps that compute everything.
        timesteps: The model's own timestep at every step, in running order; [steps].
        predictor: Name of the predictor used in training, from ``PREDICTORS``.
        total_macs: MACs of one uncached step, all denoiser calls and layers included; 0 if
            unknown.
        model: The model that the routers were trained for; None if unknown.
        solver: Class name of the noise scheduler; None if there was none.
        provenance: How, when, with which settings and at what cost they were trained.

    Raises:
        InvalidArgumentError: If fields are invalid or contradict each other.
    """

    layers: tuple[CacheLayer, ...]
    values: FloatArray
    interval: int
    timesteps: tuple[float, ...]
    predictor: str = "hold"
    total_macs: int = 0
    model: ModelIdentity | None = None
    solver: str | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = tuple(self.layers)
        timesteps = tuple(check_number("a timestep", t) for t in self.timesteps)
        interval = check_count("interval", self.interval, least=2)
        checked = {
            "layers": layers,
            "interval": interval,
            "timesteps": timesteps,
            "values": _check_values(self.values, (len(layers), len(timesteps)), interval),
            "total_macs": check_count("total_macs", self.total_macs, least=0),
            "provenance": check_texts("provenance", self.provenance.items()),
        }
        if self.predictor not in PREDICTORS:
            raise InvalidArgumentError(
                f"the predictor {self.predictor!r} is unknown; known predictors are "
                f"{listed(PREDICTORS, 20)}."
            )
        paths = [layer.path for layer in layers]
        if len(set(paths)) < len(paths):
            twice = {path for path in paths if paths.count(path) > 1}
            raise InvalidArgumentError(f"layers are repeated: {listed(sorted(twice))}.")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def num_steps(self) -> int:
        """Number of solver steps of each generation."""
        return int(self.values.shape[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, from which ``load`` restores the routers exactly.

        Args:
            path: The file; an existing one is replaced.

        Raises:
            FileNotFoundError: If the folder does not exist.
        """
        document = {
            "format": FORMAT,
            "version": VERSION,
            "layers": [layer_to_json(layer) for layer in self.layers],
            "interval": self.interval,
            "timesteps": self.timesteps,
            "predictor": self.predictor,
            "total_macs": self.total_macs,
            "model": identity_to_json(self.model),
            "solver": self.solver,
            "provenance": self.provenance,
        }
        save_table(path, "values", self.values, document)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Routers:
        """Reads a file written by ``save``.

        Args:
            path: The file to read.

        Returns:
            The routers, equal in all fields to the saved ones.

        Raises:
            FileNotFoundError: If there is no such file.
            FileFormatError: If the file is damaged or was written by a newer version.
        """
        values, document = load_table(Path(path), "values", "routers")
        check_version(document, FORMAT, VERSION)
        fields = document.fields(
            *("format", "version", "layers", "interval", "timesteps", "predictor"),
            *("total_macs", "model", "solver", "provenance"),
        )
        try:
            return cls(
                layers=tuple(fields["layers"].list_of(layer_from_json)),
                values=values,
                interval=fields["interval"].integer(),
                timesteps=tuple(fields["timesteps"].list_of(Value.number)),
                predictor=fields["predictor"].text(),
                total_macs=fields["total_macs"].integer(),
                model=fields["model"].or_none(identity_from_json),
                solver=fields["solver"].or_none(Value.text),
                provenance=fields["provenance"].dict_of(Value.text),
            )
        except InvalidArgumentError as error:  # inconsistent fields, such as a wrong shape
            raise document.error(str(error).rstrip(".")) from error

    def __str__(self) -> str:
        model = self.model.class_name if self.model else "an unknown model"
        every = {2: "every 2nd", 3: "2 of 3"}.get(
            self.interval, f"{self.interval - 1} of {self.interval}"
        )
        lines = [
            f"Routers of {model}: {self.num_steps} steps, {every} of them free to reuse with "
            f"{self.predictor}"
        ]
        is_free = np.arange(self.num_steps) % self.interval > 0
        for kind in dict.fromkeys(layer.kind for layer in self.layers):
            chosen = [index for index, x in enumerate(self.layers) if x.kind == kind]
            mean = self.values[chosen][:, is_free].mean() if is_free.any() else 1.0
            lines.append(f"  {kind}: {len(chosen)} layers, beta {mean:.3g} on average")
        return "\n".join(lines)


def _check_values(values: FloatArray, shape: tuple[int, int], interval: int) -> FloatArray:
    """Returns the validated values as a read-only copy in float64."""
    try:
        checked = np.array(values, dtype=np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"values is not an array of numbers: {error}.") from error
    if checked.shape != shape or 0 in shape:
        raise InvalidArgumentError(
            f"values has the shape {checked.shape}, expected [layers, steps] with {shape[0]} "
            f"layers and {shape[1]} steps, none of them 0."
        )
    is_full = np.arange(shape[1]) % interval == 0
    wrong = ~((checked >= 0) & (checked <= 1)) | (is_full & (checked != 1))
    if wrong.any():
        layer, step = (int(index) for index in np.argwhere(wrong)[0])
        raise InvalidArgumentError(
            f"values[{layer}, {step}] is {checked[layer, step]}, expected a number in [0, 1], and "
            f"1 at every step that computes everything (0, {interval}, {2 * interval}, ...)."
        )
    checked.flags.writeable = False
    return checked
