"""Schedule: which layers are computed at which steps, and for which model and sampler."""

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
    told,
)
from . import file
from .binding import check_same_layers, describe_other_model, map_names, with_costs_of
from .expected_cost import buffer_bytes, macs_saved_per_step, peak_bytes
from .export import FORMATS, StepPlan, step_plan
from .row import Row


# Longer than most classes, because half of it documents public methods.
@dataclass(frozen=True)
class Schedule:
    """An immutable table, layers x steps, of what is computed and what is reused.

    A schedule is *bound* if it knows its layers; one read from a published 0/1 file is not, and
    ``bind`` maps its names onto the layers of a model.

    >>> attn = CacheLayer("blocks.0.attn", kind="self_attn", block="blocks.0")
    >>> schedule = Schedule(3, {attn.path: Row((True, False, True))}, (attn,))
    >>> schedule.table()
    array([[ True, False,  True]])
    >>> schedule.reused
    1

    Attributes:
        num_steps: Solver steps of a generation.
        rows: Layer path -> row; published name -> row if unbound.
        layers: The layers in order of definition; None if unbound.
        model: What it was planned for; None if unknown.
        solver: Class name of the noise scheduler that it was planned with; None if none or any.
        timesteps: The model's own t at every step, in running order [steps]; None if unknown.
        noise_levels: sigma / (alpha + sigma) at every step, in [0, 1], only falling or only rising
            [steps]; None if unknown. Predictors over the noise level need them.
        compute: Expected fraction of the uncached MACs of a run, in (0, 1]; None if unknown.
        quality: Measured quality by metric, if it was measured; infinite is allowed, NaN is not.
        provenance: How and with which settings it was made.

    Raises:
        InvalidArgumentError: If any of these contradicts another.
    """

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
        """Compute every layer at the steps 0, interval, 2 interval, ... and reuse it between.

        Source: Selvaraju et al., "FORA", arXiv 2407.01425; ``predictor`` is our addition.

        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> print(Schedule.uniform(model, num_steps=6, interval=2))
        Schedule of 6 steps for DiTTransformer2DModel
          self_attn x1 hold #.#.#.
          ffn x1 hold #.#.#.

        Args:
            model: A pipeline or a module.
            num_steps: Solver steps of a generation.
            interval: 1 computes everything; num_steps or more computes step 0 alone.
            predictor: How reused values are made, a name in ``PREDICTORS``.
            last: Compute the last step as well, as the published schedules do.
            granularity: What is reused, as for ``find_layers``.
            layers: Reuse exactly these instead, as ``find_layers`` or ``observe_layers`` gave them.
            noise_levels: sigma / (alpha + sigma) at every step [num_steps], for predictors over
                the noise level; None asks the pipeline's noise scheduler for them.

        Returns:
            A schedule that is bound to the model's layers; its ``compute`` is None unless the
            layers know their MACs.

        Raises:
            InvalidArgumentError: If an argument is not as described.
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
        """Read a file that ``save`` wrote, or a published 0/1 file (unbound).

        Args:
            path: The file to read.

        Returns:
            The schedule; a published file gives one without layers.

        Raises:
            FileNotFoundError: If there is no such file.
            FileFormatError: If it is damaged or made by a newer version; says where and why.
        """
        return file.read(path, cls)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that people can read and ``load`` reads back as an equal schedule.

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

    def bind(self, layers: Sequence[CacheLayer], model: ModelIdentity | None = None) -> Schedule:
        """The same schedule for exactly these layers, in their order.

        A bound schedule must have been made for them. The names of a published file are mapped
        onto them; layers that no name covers are always computed.

        Args:
            layers: All layers of the model that can be reused.
            model: What the model is; compared if both sides know it.

        Returns:
            A schedule with one row for each layer.

        Raises:
            ScheduleMismatchError: If the schedule does not fit; lists all that does not.
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
        """The same schedule for another number of steps, by position in the noise level.

        At every noise level as large a share of the steps is computed as before; what is left of
        a step by rounding counts for the steps after it. The quality of the result is not known:
        it was not measured. With the same number of steps, and no or the same timesteps, this is
        the schedule itself.

        Source: ours.

        >>> print(Schedule(8, {"attn": Row.uniform(8, 2)}).resample(4))
        Schedule of 4 steps for a model yet to be bound
          carried over, not measured
          attn         x1   hold     #.#.

        Args:
            num_steps: Solver steps of the generations that it will be for.
            timesteps: The model's own t at each of them, in running order [num_steps]. By default,
                and where the schedule does not know its own, both divide the noise levels alike.

        Returns:
            A schedule with these timesteps, without quality; its expected compute is known if it
            was before and the layers have their MACs.

        Raises:
            InvalidArgumentError: If num_steps is not an integer of at least 1; or if the timesteps
                are not as many finite numbers, do not only fall or only rise, run against those of
                the schedule, or are of another unit.
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
            provenance=told(self.provenance, self.num_steps, num_steps),
        )

    def _compute_with(self, rows: Mapping[str, Row]) -> float | None:
        """The expected compute of other rows; None if it does not follow from that of these."""
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
        """True where a layer is computed; [layers, steps], or [names, steps] if unbound.

        Returns:
            A boolean array, with a row for each layer in the order of ``rows``.
        """
        return np.array([row.computed for row in self.rows.values()], dtype=np.bool_)

    @property
    def reused(self) -> int:
        """How many times a layer is reused in a run, all layers and steps together."""
        return sum(row.computed.count(False) for row in self.rows.values())

    @property
    def patterns(self) -> int:
        """How many different steps there are, by the layers computed: graphs to be compiled."""
        return len(set(zip(*(row.computed for row in self.rows.values()), strict=True)))

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes that an uncompiled run keeps at any moment; None if not known.

        Exact if the denoiser is called once a step, at the batch and dtype that were calibrated,
        and runs its layers in their order. Otherwise a run may keep less.
        """
        return None if self.layers is None else peak_bytes(self.rows, self.layers)

    @property
    def buffer_bytes(self) -> int | None:
        """Bytes of the buffers that a compiled model keeps its values in; None if not known."""
        needed = [buffer_bytes(self.rows[layer.path], layer) for layer in self.layers or ()]
        if self.layers is None or None in needed:
            return None
        return sum(nbytes or 0 for nbytes in needed)

    @property
    def is_all_compute(self) -> bool:
        """Whether nothing is ever reused."""
        return self.reused == 0

    def __str__(self) -> str:
        """A line for each distinct row: # is a computed step, a dot a reused one."""
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
    """The rows, those of a bound schedule in the order of its layers."""
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
        raise InvalidArgumentError(f"the layers {listed(sorted(twice))} come twice.")
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
                f"the predictor {row.predictor!r} of {name!r} runs over the noise level, which is "
                "not known here: calibrate a pipeline with a noise scheduler, give noise_levels, "
                "or take a predictor over the step, such as 'taylor'."
            )
