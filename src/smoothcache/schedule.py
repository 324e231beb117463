"""Schedule: which layers are computed at which steps, and what that was planned for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _resample
from ._checks import check_count, check_number, check_texts, listed
from ._memory import buffer_bytes, peak_bytes
from ._noise_levels import check_noise_levels, levels_of_solver
from ._published import map_names
from .denoisers import noise_scheduler
from .errors import InvalidArgumentError, ScheduleMismatchError
from .layers import CacheLayer, Granularity, ModelIdentity, find_layers, identify
from .predictors import PREDICTORS


@dataclass(frozen=True)
class Row:
    """What one layer does at every step.

    >>> Row(computed=(True, False, False)).computed
    (True, False, False)

    Attributes:
        computed: True where the layer is computed, False where it is reused; [steps].
        predictor: How a reused value is made from computed ones, a name in ``PREDICTORS``.
        gains: How much of the predicted change since the last computed value is taken at each
            reused step, 1 at computed ones; [steps]. None for 1 everywhere. A search fits them.

    Raises:
        InvalidArgumentError: If step 0 is not computed, the predictor is unknown, or the gains
            are not as many finite numbers.
    """

    computed: tuple[bool, ...]
    predictor: str = "hold"
    gains: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        computed = tuple(self.computed)
        if not all(isinstance(step, bool | np.bool_) for step in computed):
            raise InvalidArgumentError(f"a row says True or False at each step, got {computed}.")
        if not computed or not computed[0]:
            raise InvalidArgumentError("step 0 must be computed: there is nothing to reuse yet.")
        if self.predictor not in PREDICTORS:
            raise InvalidArgumentError(
                f"the predictor {self.predictor!r} is unknown; there are {listed(PREDICTORS, 20)}."
            )
        object.__setattr__(self, "computed", tuple(bool(step) for step in computed))
        object.__setattr__(self, "gains", _check_gains(self.gains, self.computed))

    def moved(self, computed: tuple[bool, ...]) -> Row:
        """The same with other computed steps; the gains go along, gap by gap.

        >>> row = Row((True, False, True, False), "taylor", (1, 0.5, 1, 2))
        >>> row.moved((True, True, False, False))
        Row(computed=(True, True, False, False), predictor='taylor', gains=(1.0, 1.0, 2.0, 2.0))
        """
        if self.gains is None:
            return Row(computed, self.predictor)
        of_gap = [1.0] * len(computed)
        for gap, gain in zip(accumulate(self.computed), self.gains, strict=True):
            of_gap[gap - 1] = gain  # the last of the gap, which is a reused step if there is one
        gaps = accumulate(computed)
        return Row(computed, self.predictor, tuple(of_gap[gap - 1] for gap in gaps))

    @classmethod
    def uniform(
        cls, num_steps: int, interval: int, *, predictor: str = "hold", last: bool = False
    ) -> Row:
        """Computes the steps 0, interval, 2 interval, ... and, with ``last``, the last one.

        >>> Row.uniform(6, 2, last=True).computed
        (True, False, True, False, True, True)

        Raises:
            InvalidArgumentError: If a number is not an integer of at least 1.
        """
        num_steps = check_count("num_steps", num_steps, least=1)
        interval = check_count("interval", interval, least=1)
        steps = range(num_steps)
        return cls(tuple(x % interval == 0 or (last and x == steps[-1]) for x in steps), predictor)


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
        num_steps: Solver steps of the generation that it is for.
        rows: Layer path -> row; published name -> row if unbound.
        layers: The layers in order of definition; None if unbound.
        model: What it was planned for; None if unknown.
        solver: Class name of the noise scheduler that it was planned with; None if none or any.
        timesteps: The model's own t at every step, in running order [steps]; None if unknown.
        noise_levels: sigma / (alpha + sigma) at every step, in [0, 1], only falling or only rising
            [steps]; None if unknown. Predictors over the noise level need them.
        compute: Expected fraction of the uncached MACs of a run, in (0, 1]; None if unknown.
        quality: Measured quality by metric, if it was measured; infinite is allowed, NaN is not.
        provenance: Who made it and with what settings.

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

        Raises:
            InvalidArgumentError: If an argument is not as described.
            LayersNotFoundError: If the model has no layer to reuse.
        """
        row = Row.uniform(num_steps, interval, predictor=predictor, last=last)
        found = tuple(find_layers(model, granularity=granularity) if layers is None else layers)
        settings = {"interval": interval, "predictor": predictor, "last": last}
        if noise_levels is None and PREDICTORS[predictor].needs_noise_levels:
            noise_levels = levels_of_solver(noise_scheduler(model), num_steps)
        return cls(
            num_steps=num_steps,
            rows={layer.path: row for layer in found},
            layers=found,
            model=identify(model),
            noise_levels=None if noise_levels is None else tuple(noise_levels),
            provenance={"planner": "uniform", **{name: str(x) for name, x in settings.items()}},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read a file that ``save`` wrote, or a published 0/1 file (unbound).

        Raises:
            FileNotFoundError: If there is no such file.
            FileFormatError: If it is damaged or made by a newer version; says where and why.
        """
        from ._schedule_file import load  # it imports this module

        return load(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that people can read and ``load`` reads back as an equal schedule.

        Raises:
            FileNotFoundError: If the folder does not exist.
        """
        from ._schedule_file import save  # it imports this module

        save(self, path)

    def bind(self, layers: Sequence[CacheLayer], model: ModelIdentity | None = None) -> Schedule:
        """The same schedule for exactly these layers, in their order.

        A bound schedule must have been made for them. The names of a published file are mapped
        onto them; layers that no name covers are always computed.

        Args:
            layers: All layers of the model that can be reused.
            model: What the model is; compared if both sides know it.

        Raises:
            ScheduleMismatchError: If the schedule does not fit; lists all that does not.
        """
        if None not in (self.model, model) and self.model != model:
            raise ScheduleMismatchError(_other_model(self.model, model))
        rows = dict(self.rows)
        if self.layers is None:
            owners = map_names(rows, layers)
            always = Row((True,) * self.num_steps)
            rows = {x.path: rows[owners[x.path]] if x.path in owners else always for x in layers}
        else:
            known = {layer.path: layer for layer in self.layers}
            _check_same_layers(self.layers, layers)
            layers = [_with_costs_of(known[layer.path], layer) for layer in layers]
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
        given = None if timesteps is None else _resample.as_timesteps(timesteps, num_steps)
        if num_steps == self.num_steps and given in (None, self.timesteps):
            return self
        found = _resample.positions(self.timesteps, given, num_old=self.num_steps)
        begins = _resample.edges(found, self.num_steps, num_steps)
        rows = {
            name: Row(
                _resample.resample_row(row.computed, begins),
                row.predictor,
                row.gains and _resample.nearest(row.gains, begins),
            )
            for name, row in self.rows.items()
        }
        levels = self.noise_levels
        return replace(
            self,
            num_steps=num_steps,
            rows=rows,
            timesteps=given,
            noise_levels=levels and _resample.between(levels, found, num_steps),
            compute=self._compute_with(rows),
            quality={},
            provenance=_resample.told(self.provenance, self.num_steps, num_steps),
        )

    def _compute_with(self, rows: Mapping[str, Row]) -> float | None:
        """The expected compute of other rows; None if it does not follow from that of these."""
        before, after = (_saved_a_step(x, self.layers or ()) for x in (self.rows, rows))
        if self.compute is None or before is None or after is None:
            return None
        if before == after:
            return self.compute
        if before == 0 or self.compute == 1:
            return None
        compute = 1 - (1 - self.compute) * after / before
        return compute if 0 < compute <= 1 else None

    def table(self) -> npt.NDArray[np.bool_]:
        """True where a layer is computed; [layers, steps], or [names, steps] if unbound."""
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
        if _resample.CARRIED_OVER in self.provenance:
            lines.append(f"  {_resample.NOT_MEASURED}")
        for (name, row), count in groups.items():
            steps = "".join("#" if computed else "." for computed in row.computed)
            lines.append(f"  {name:12} x{count:<3} {row.predictor:8} {steps}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[type[Schedule], tuple[Any, ...]]:
        # A mapping proxy can be neither pickled nor deep-copied; the dict behind it can.
        values = (getattr(self, item.name) for item in fields(self))
        return type(self), tuple(dict(x) if isinstance(x, MappingProxyType) else x for x in values)


def _with_costs_of(known: CacheLayer, layer: CacheLayer) -> CacheLayer:
    """A layer with the costs that are known of it, where it was not observed itself."""
    macs = known.macs if layer.macs is None else layer.macs
    nbytes = known.nbytes if layer.nbytes is None else layer.nbytes
    return replace(layer, macs=macs, nbytes=nbytes)


def compute_fraction(
    rows: Mapping[str, Row], layers: Sequence[CacheLayer], total_macs: int
) -> float | None:
    """MACs of a run under a schedule, over those of the uncached run.

    What lies outside the layers is computed at every step; predicting counts as free.

    >>> half = CacheLayer("blocks.0.ff", kind="ffn", block="blocks.0", macs=50)
    >>> compute_fraction({"blocks.0.ff": Row((True, False))}, [half], total_macs=100)
    0.75

    Args:
        rows: Layer path -> row.
        layers: The layers with their MACs of one step.
        total_macs: MACs of one uncached step of the whole denoiser, layers included.

    Returns:
        A fraction in (0, 1]; None if the cost of a layer, or the total, is not known.
    """
    if total_macs <= 0:
        return None
    saved = steps = 0
    for layer in layers:
        if layer.macs is None:
            return None
        steps = len(rows[layer.path].computed)
        saved += layer.macs * rows[layer.path].computed.count(False)
    return 1 - saved / (total_macs * steps)


def _saved_a_step(rows: Mapping[str, Row], layers: Sequence[CacheLayer]) -> float | None:
    """MACs that reuse saves in a step, on average; None if not known."""
    saved = 0.0
    for layer in layers:
        if layer.macs is None:
            return None
        computed = rows[layer.path].computed
        saved += layer.macs * computed.count(False) / len(computed)
    return saved if layers else None


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


def _check_gains(gains: Sequence[float] | None, computed: Sequence[bool]) -> Any:
    if gains is None:
        return None
    if len(gains) != len(computed):
        raise InvalidArgumentError(f"{len(gains)} gains for {len(computed)} steps.")
    values = [check_number("a gain", gain) for gain in gains]
    values = [1.0 if done else gain for gain, done in zip(values, computed, strict=True)]
    return None if set(values) == {1.0} else tuple(values)


def _refuse_without_levels(rows: Mapping[str, Row]) -> None:
    for name, row in rows.items():
        if PREDICTORS[row.predictor].needs_noise_levels and False in row.computed:
            raise InvalidArgumentError(
                f"the predictor {row.predictor!r} of {name!r} runs over the noise level, which is "
                "not known here: calibrate a pipeline with a noise scheduler, give noise_levels, "
                "or take a predictor over the step, such as 'taylor'."
            )


def _other_model(planned: ModelIdentity | None, given: ModelIdentity | None) -> str:
    return (
        f"the schedule was planned for {_named(planned)}, but the model is {_named(given)}. "
        f"Load the model that it was planned for, or plan a schedule for this one."
    )


def _named(model: ModelIdentity | None) -> str:
    return f"{model.class_name} (configuration {model.fingerprint})" if model else "any model"


def _check_same_layers(planned: Sequence[CacheLayer], given: Sequence[CacheLayer]) -> None:
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
            f"the layers of the schedule are not those of the model; {'; '.join(found)}. "
            f"Load the model that it was planned for, or plan a schedule for this one."
        )
