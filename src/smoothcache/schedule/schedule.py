"""Schedules: which layers are computed at which steps, for which model and solver."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checks import check_count, check_number, check_texts, listed
from ..errors import InvalidArgumentError, ScheduleMismatchError
from ..files.markup import fragment, paragraph
from ..hub.card import Card, Details
from ..hub.shared import Shared
from ..layers.find import find_layers
from ..layers.layer import CacheLayer, Granularity, ModelIdentity
from ..layers.modules import identify
from ..model.target import Target
from ..steps.noise_scheduler import check_noise_levels, levels_of_solver
from ..steps.predictors import POLYNOMIAL, PREDICTORS
from ..steps.resample import (
    CARRIED_OVER,
    NOT_MEASURED,
    as_timesteps,
    between,
    edges,
    nearest,
    positions,
    resample_row,
    resampled_provenance,
)
from . import card, file
from .binding import check_same_layers, describe_other_model, map_names, with_costs_of
from .expected_cost import buffer_bytes, macs_saved_per_step, peak_bytes
from .export import FORMATS, StepPlan, step_plan
from .html import schedule_map
from .row import Row


# A long class, half of which is documentation of public methods.
@dataclass(frozen=True)
class Schedule(Shared):
    """An immutable table, layers x steps, that marks each cell as computed or reused.

    A schedule is *bound* if it has layers. A schedule read from a published 0/1 file is unbound;
    ``bind`` maps its names onto the layers of a model.

    >>> attn = CacheLayer("blocks.0.attn", kind="self_attn", block="blocks.0")
    >>> schedule = Schedule(3, {attn.path: Row((True, False, True))}, (attn,))
    >>> schedule.table()
    array([[ True, False,  True]])
    >>> schedule.reused
    1

    Attributes:
        num_steps: Number of solver steps.
        rows: Rows by layer path, or by published name if unbound.
        layers: The layers in order of definition; None if unbound.
        model: The model it was planned for; None if unknown.
        solver: Class name of the noise scheduler it was planned with; None if none or any.
        timesteps: The model's own timestep at every step, in running order [steps]; None if
            unknown.
        noise_levels: sigma / (alpha + sigma) at every step, in [0, 1], monotonic [steps]; None if
            unknown. Required by predictors over the noise level.
        compute: Expected fraction of the uncached MACs of a run, in (0, 1]; None if unknown.
        quality: Measured quality by metric, if measured; infinity is allowed, NaN is not.
        provenance: How and with which settings it was made.

    Raises:
        InvalidArgumentError: If fields are invalid or contradict each other.
    """

    _file_kind = card.FILE_KIND  # without annotation, so that it is no field

    num_steps: int
    rows: Mapping[str, Row]
    layers: tuple[CacheLayer, ...] | None = None
    model: ModelIdentity | None = None
    solver: str | None = None
    timesteps: tuple[float, ...] | None = None
    compute: float | None = None
    quality: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    noise_levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        num_steps = check_count("num_steps", self.num_steps, least=1)
        layers = None if self.layers is None else tuple(self.layers)
        checked: dict[str, object] = {
            "num_steps": num_steps,
            "rows": MappingProxyType(_check_rows(self.rows, layers, num_steps)),
            "layers": layers,
            "quality": MappingProxyType(_check_quality(self.quality)),
            "provenance": MappingProxyType(check_texts("provenance", self.provenance.items())),
        }
        if self.timesteps is not None:
            timesteps = tuple(check_number("a timestep", t) for t in self.timesteps)
            if len(timesteps) != num_steps:
                raise InvalidArgumentError(f"{len(timesteps)} timesteps for {num_steps} steps.")
            checked["timesteps"] = timesteps
        checked["noise_levels"] = check_noise_levels(self.noise_levels, num_steps)
        if self.noise_levels is None:
            _refuse_without_levels(self.rows)
        if self.compute is not None:
            compute = checked["compute"] = check_number("compute", self.compute)
            if not 0 < compute <= 1:
                raise InvalidArgumentError(f"compute must be in (0, 1], got {compute}.")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        mappings = (self.rows, self.quality, self.provenance)
        values = (self.num_steps, self.layers, self.model, self.solver, self.timesteps)
        return hash((*values, *[frozenset(x.items()) for x in mappings]))

    @classmethod
    def uniform(
        cls,
        model: Any,
        num_steps: int,
        interval: int,
        *,
        predictor: str = "hold",
        last: bool = False,
        granularity: Granularity = "auto",
        layers: Sequence[CacheLayer] | None = None,
        noise_levels: Sequence[float] | None = None,
    ) -> Schedule:
        """Computes every layer at the steps 0, interval, 2 interval, ... and reuses it in between.

        Source: Selvaraju et al., "FORA", arXiv 2407.01425; ``predictor`` is our addition.

        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> print(Schedule.uniform(model, num_steps=6, interval=2))
        Schedule of 6 steps for DiTTransformer2DModel
          self_attn x1 hold #.#.#.
          ffn x1 hold #.#.#.

        Args:
            model: A pipeline or a module.
            num_steps: Number of solver steps.
            interval: 1 computes everything; num_steps or more computes only step 0.
            predictor: Name of a predictor in ``PREDICTORS``.
            last: Whether to compute the last step as well, as the published schedules do.
            granularity: Granularity of the layers, as for ``find_layers``.
            layers: Reuse exactly these layers, as returned by ``find_layers`` or
                ``observe_layers``; None finds them.
            noise_levels: sigma / (alpha + sigma) at every step [num_steps], for predictors over
                the noise level; None reads them from the pipeline's noise scheduler.

        Returns:
            A schedule bound to the model's layers, without ``compute``.

        Raises:
            InvalidArgumentError: If an argument is invalid.
            LayersNotFoundError: If the model has no layer to reuse.
        """
        target = Target.of(model)
        row = Row.uniform(num_steps, interval, predictor=predictor, last=last)
        found = tuple(find_layers(target, granularity=granularity) if layers is None else layers)
        settings = {"interval": interval, "predictor": predictor, "last": last}
        if noise_levels is None and PREDICTORS[predictor].needs_noise_levels:
            noise_levels = levels_of_solver(target.noise_scheduler, num_steps)
        return cls(
            num_steps=num_steps,
            rows={layer.path: row for layer in found},
            layers=found,
            model=identify(target),
            noise_levels=None if noise_levels is None else tuple(noise_levels),
            provenance={"planner": "uniform", **{name: str(x) for name, x in settings.items()}},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Reads a file written by ``save``, or a published 0/1 file.

        Args:
            path: The file to read.

        Returns:
            The schedule; unbound if read from a published file.

        Raises:
            FileNotFoundError: If there is no such file.
            FileFormatError: If the file is damaged or was written by a newer version.
        """
        return file.read(path, cls)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a human-readable JSON file, from which ``load`` restores an equal schedule.

        Args:
            path: The file; an existing one is replaced.

        Raises:
            FileNotFoundError: If the folder does not exist.
        """
        file.write(path, {one.name: getattr(self, one.name) for one in fields(self)})

    def export(self, runtime: str) -> StepPlan:
        """The plan for another runtime, if that can express it.

        Both cache-dit and SGLang Diffusion, which is built on it, take whole steps alone: one row
        for the denoiser's output, with the predictor "hold", "taylor" or "taylor2".

        >>> output = CacheLayer("", kind="model", block="")
        >>> schedule = Schedule(4, {"": Row((True, True, False, True))}, (output,))
        >>> schedule.export("cache-dit").steps_computation_mask
        [1, 1, 0, 1]

        Args:
            runtime: "cache-dit", for SGLang Diffusion as well.

        Returns:
            The mask over the steps, and the same as bins of computed and reused steps.

        Raises:
            InvalidArgumentError: If the runtime is unknown, or the schedule reuses layers or
                blocks, has different rows for several denoisers, fitted weights or gains, or a
                predictor over the noise level.
        """
        if runtime not in FORMATS:
            raise InvalidArgumentError(
                f"runtime must be one of {listed(FORMATS)}, got {runtime!r}."
            )
        return step_plan(self.rows, self.layers)

    def measurements(self) -> list[list[str]]:
        """A table of what was measured of it beside other ways of sampling, for its card.

        Returns:
            Rows of texts, the heading first; empty if nothing was measured but its quality.
        """
        return []

    def _card(self, name: str, details: Details) -> Card:
        return card.schedule_card(self, name, details, self.measurements())

    def _repr_html_(self) -> str:
        """What a notebook shows: the map of computed and reused steps."""
        cost = "" if self.compute is None else f", {self.compute:.1%} of the uncached MACs"
        made_for = self.model.class_name if self.model else "a model yet to be bound"
        title = f"Schedule of {self.num_steps} steps for {made_for}{cost}"
        notes = [NOT_MEASURED] if CARRIED_OVER in self.provenance else []
        notes += [f"{name}: {value:.4g}" for name, value in self.quality.items()]
        return fragment(title, *map(paragraph, notes), schedule_map(self))

    def bind(self, layers: Sequence[CacheLayer], model: ModelIdentity | None = None) -> Schedule:
        """Binds the schedule to these layers, in their order.

        A bound schedule must have the same layers. The names of a published file are mapped onto
        the layers; layers that no name covers are always computed.

        Args:
            layers: All layers of the model that can be reused.
            model: Identity of the model, compared with the schedule's if both are known.

        Returns:
            A schedule with one row per layer.

        Raises:
            ScheduleMismatchError: If the schedule does not fit the layers; lists every mismatch.
        """
        if None not in (self.model, model) and self.model != model:
            raise ScheduleMismatchError(describe_other_model(self.model, model))
        rows = dict(self.rows)
        if self.layers is None:
            owners = map_names(rows, layers)
            always = Row((True,) * self.num_steps)
            rows = {x.path: rows[owners[x.path]] if x.path in owners else always for x in layers}
        else:
            known = {layer.path: layer for layer in self.layers}
            check_same_layers(self.layers, layers)
            layers = [with_costs_of(known[layer.path], layer) for layer in layers]
        return replace(self, rows=rows, layers=tuple(layers), model=model or self.model)

    def resample(self, num_steps: int, *, timesteps: Iterable[float] | None = None) -> Schedule:
        """Converts the schedule to another number of steps, by position in the noise level.

        The fraction of computed steps stays the same at every noise level; rounding errors carry
        over to later steps. The quality of the result is not measured. With the same number of
        steps and no or the same timesteps, the schedule itself is returned.

        Source: ours.

        >>> print(Schedule(8, {"attn": Row.uniform(8, 2)}).resample(4))
        Schedule of 4 steps for a model yet to be bound
          carried over, not measured
          attn         x1   hold     #.#.

        Args:
            num_steps: New number of solver steps.
            timesteps: The model's own timestep at each new step, in running order [num_steps]. By
                default, or if the schedule has no timesteps, positions are spaced evenly.

        Returns:
            A schedule with these timesteps and without quality. Its expected compute is known if
            the schedule's is and the layers have MACs.

        Raises:
            InvalidArgumentError: If num_steps is not an integer of at least 1, or if the timesteps
                are not num_steps finite monotonic numbers with the direction and unit of the
                schedule's.
        """
        num_steps = check_count("num_steps", num_steps, least=1)
        given = None if timesteps is None else as_timesteps(timesteps, num_steps)
        if num_steps == self.num_steps and given in (None, self.timesteps):
            return self
        found = positions(self.timesteps, given, num_old=self.num_steps)
        begins = edges(found, self.num_steps, num_steps)
        rows = {
            name: Row(
                resample_row(row.computed, begins),
                row.predictor if row.weights is None else POLYNOMIAL,
                row.gains and nearest(row.gains, begins),
            )
            for name, row in self.rows.items()
        }
        levels = self.noise_levels
        return replace(
            self,
            num_steps=num_steps,
            rows=rows,
            timesteps=given,
            noise_levels=levels and between(levels, found, num_steps),
            compute=self._compute_with(rows),
            quality={},
            provenance=resampled_provenance(self.provenance, self.num_steps, num_steps),
        )

    def _compute_with(self, rows: Mapping[str, Row]) -> float | None:
        """Returns the expected compute with other rows; None if it cannot be derived."""
        before, after = (macs_saved_per_step(x, self.layers or ()) for x in (self.rows, rows))
        if self.compute is None or before is None or after is None:
            return None
        if before == after:
            return self.compute
        if before == 0 or self.compute == 1:
            return None
        compute = 1 - (1 - self.compute) * after / before
        return compute if 0 < compute <= 1 else None

    def table(self) -> npt.NDArray[np.bool_]:
        """Returns the schedule as a table; [layers, steps], or [names, steps] if unbound.

        Returns:
            A boolean array, True where a layer is computed, in the order of ``rows``.
        """
        return np.array([row.computed for row in self.rows.values()], dtype=np.bool_)

    @property
    def reused(self) -> int:
        """Number of reuses in a generation, summed over layers and steps."""
        return sum(row.computed.count(False) for row in self.rows.values())

    @property
    def patterns(self) -> int:
        """Number of distinct steps by their computed layers, each of which compiles to a graph."""
        return len(set(zip(*(row.computed for row in self.rows.values()), strict=True)))

    @property
    def peak_bytes(self) -> int | None:
        """Peak bytes of kept values in an uncompiled run; None if unknown.

        Exact if the denoiser is called once per step, at the calibrated batch size and dtype, and
        runs its layers in order. Otherwise a run may keep less.
        """
        return None if self.layers is None else peak_bytes(self.rows, self.layers)

    @property
    def buffer_bytes(self) -> int | None:
        """Bytes of the buffers for kept values in a compiled model; None if unknown."""
        needed = [buffer_bytes(self.rows[layer.path], layer) for layer in self.layers or ()]
        if self.layers is None or None in needed:
            return None
        return sum(nbytes or 0 for nbytes in needed)

    @property
    def is_all_compute(self) -> bool:
        """Whether every layer is computed at every step."""
        return self.reused == 0

    def __str__(self) -> str:
        """One line per distinct row: ``#`` is a computed step, a dot a reused step."""
        kinds = {layer.path: layer.kind for layer in self.layers or ()}
        groups: dict[tuple[str, Row], int] = {}
        for name, row in self.rows.items():
            key = (kinds.get(name, name), row)
            groups[key] = groups.get(key, 0) + 1
        cost = "" if self.compute is None else f", {self.compute:.1%} of the uncached MACs"
        made_for = self.model.class_name if self.model else "a model yet to be bound"
        lines = [f"Schedule of {self.num_steps} steps for {made_for}{cost}"]
        if CARRIED_OVER in self.provenance:
            lines.append(f"  {NOT_MEASURED}")
        for (name, row), count in groups.items():
            steps = "".join("#" if computed else "." for computed in row.computed)
            lines.append(f"  {name:12} x{count:<3} {row.predictor:8} {steps}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[type[Schedule], tuple[Any, ...]]:
        # A mapping proxy can be neither pickled nor deep-copied; the dict behind it can.
        values = (getattr(self, item.name) for item in fields(self))
        return type(self), tuple(dict(x) if isinstance(x, MappingProxyType) else x for x in values)


def _check_rows(
    rows: Mapping[str, Row], layers: tuple[CacheLayer, ...] | None, num_steps: int
) -> dict[str, Row]:
    """Returns the validated rows, in layer order if bound."""
    if not rows:
        raise InvalidArgumentError("a schedule needs at least one row.")
    for name, row in rows.items():
        if not isinstance(name, str) or not isinstance(row, Row):
            raise InvalidArgumentError(f"rows maps names to Row, got {name!r}: {row!r}.")
        if len(row.computed) != num_steps:
            raise InvalidArgumentError(
                f"the row '{name}' has {len(row.computed)} steps, the schedule {num_steps}."
            )
    if layers is None:
        return dict(rows)
    paths = [layer.path for layer in layers]
    if len(set(paths)) < len(paths):
        twice = {path for path in paths if paths.count(path) > 1}
        raise InvalidArgumentError(f"layers are repeated: {listed(sorted(twice))}.")
    if set(paths) != set(rows):
        raise InvalidArgumentError(
            "rows and layers differ; "
            f"layers without a row: {listed(x for x in paths if x not in rows) or 'none'}; "
            f"rows without a layer: {listed(x for x in rows if x not in paths) or 'none'}."
        )
    return {path: rows[path] for path in paths}


def _check_quality(quality: Mapping[str, float]) -> dict[str, float]:
    for name, value in quality.items():
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not isinstance(name, str) or not real or math.isnan(value):
            raise InvalidArgumentError(f"quality maps strings to numbers, got {name!r}: {value!r}.")
    return {name: float(value) for name, value in quality.items()}


def _refuse_without_levels(rows: Mapping[str, Row]) -> None:
    for name, row in rows.items():
        if row.axis != "step" and False in row.computed:
            raise InvalidArgumentError(
                f"the predictor {row.predictor!r} of {name!r} requires noise levels, which are "
                "unknown; calibrate a pipeline with a noise scheduler, pass noise_levels, or use a "
                "predictor over the step, such as 'taylor'."
            )
