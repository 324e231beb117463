"""Calibration: the error of reusing each layer, measured on a few samples."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checks import check_count, check_number, check_texts, listed
from ..errors import InvalidArgumentError
from ..files.document import Value, check_version
from ..files.markup import fragment, paragraph
from ..files.table import load_tables, save_table
from ..hub.card import Card, Details
from ..hub.shared import Shared
from ..layers.layer import (
    CacheLayer,
    ModelIdentity,
    identity_from_json,
    identity_to_json,
    layer_from_json,
    layer_to_json,
)
from ..steps.noise_scheduler import check_noise_levels
from ..steps.resample import (
    CARRIED_OVER,
    NOT_MEASURED,
    as_timesteps,
    between,
    largest_gap,
    positions,
    resample_errors,
    resampled_provenance,
    steps_within,
)
from . import card
from .html import curve_figures
from .statistics import FloatArray, mean_of_known, student_t_95
from .trajectory import Trajectories
from .trajectory_file import from_file, to_file

FORMAT, VERSION = "smoothcache.calibration", 1
TIMESTEPS, INTERPOLATED = "timesteps", "interpolated"  # provenance of timesteps not from a solver


@dataclass(frozen=True, eq=False)
class Curve:
    """Relative L1 error of reusing an output with one gap, at every step.

    Attributes:
        mean: Mean over layers, then over samples; [steps], NaN where the gap reaches before step 0.
        low: Lower end of the 95 % confidence interval over samples; NaN with one sample.
        high: Upper end of that interval.
    """

    mean: FloatArray
    low: FloatArray
    high: FloatArray


# A long class, half of which is documentation of public methods.
@dataclass(frozen=True, eq=False)
class Calibration(Shared):
    """Error curves and costs of every layer, from which any threshold is planned without the model.

    Source: Liu et al., "SmoothCache", arXiv 2411.10510, section 3. E(t, k) is the relative L1
    error at step t of the output kept from step t - k.

    >>> layer = CacheLayer("blocks.0.attn", kind="self_attn", block="blocks.0", macs=50)
    >>> errors = np.array([[[[np.nan, 0.5, 0.25]]]])
    >>> calibration = Calibration((layer,), errors, total_macs=100, timesteps=(9.0, 5.0, 1.0))
    >>> calibration.curve(gap=1, kind="self_attn").mean
    array([ nan, 0.5 , 0.25])

    Attributes:
        layers: The layers, with their MACs where known.
        errors: errors[i, l, k - 1, t] is E(t, k) of sample i and layer l, dimensionless;
            [samples, layers, max_gap, steps]. NaN exactly where the layer did not run at t or at
            t - k: if t < k, or if another denoiser runs at that step. Read-only.
        total_macs: MACs of one uncached step, all denoiser calls and layers included (the mean
            over steps, if they differ); 0 if unknown.
        timesteps: The model's own timestep at every step, in running order; [steps].
        model: The calibrated model; None if unknown.
        solver: Class name of the noise scheduler; None if there was none.
        peak_bytes: Peak bytes of kept outputs during calibration.
        tokens: Number of tokens compared per output; None for all.
        provenance: How, when and with which settings it was made.
        noise_levels: sigma / (alpha + sigma) of the noise scheduler at every step, in [0, 1];
            [steps], None if unknown.
        trajectories: Trajectories of the samples, for ``plan_trajectory``; None if not recorded.

    Raises:
        InvalidArgumentError: If fields are invalid or contradict each other.
    """

    _file_kind = card.FILE_KIND  # without annotation, so that it is no field

    layers: tuple[CacheLayer, ...]
    errors: FloatArray
    total_macs: int
    timesteps: tuple[float, ...]
    model: ModelIdentity | None = None
    solver: str | None = None
    peak_bytes: int = 0
    tokens: int | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    noise_levels: tuple[float, ...] | None = None
    trajectories: Trajectories | None = None

    def __post_init__(self) -> None:
        layers = tuple(self.layers)
        timesteps = tuple(check_number("a timestep", t) for t in self.timesteps)
        checked = {
            "layers": layers,
            "errors": _check_errors(self.errors, len(layers), len(timesteps)),
            "total_macs": check_count("total_macs", self.total_macs, least=0),
            "timesteps": timesteps,
            "peak_bytes": check_count("peak_bytes", self.peak_bytes, least=0),
            "provenance": check_texts("provenance", self.provenance.items()),
            "noise_levels": check_noise_levels(self.noise_levels, len(timesteps)),
        }
        if self.tokens is not None:
            checked["tokens"] = check_count("tokens", self.tokens, least=1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        _check_layers(layers, self.total_macs, self.num_steps, self.steps_run)
        if self.trajectories is not None and self.trajectories.num_steps != self.num_steps:
            raise InvalidArgumentError(
                f"the trajectories have {self.trajectories.num_steps} steps, but the errors have "
                f"{self.num_steps}."
            )

    @property
    def num_samples(self) -> int:
        """Number of measured generations."""
        return int(self.errors.shape[0])

    @property
    def max_gap(self) -> int:
        """Largest measured gap, in steps: the most consecutive reuses that can be planned."""
        return int(self.errors.shape[2])

    @property
    def num_steps(self) -> int:
        """Number of solver steps of each generation."""
        return int(self.errors.shape[3])

    @property
    def steps_run(self) -> tuple[range, ...]:
        """Steps at which each layer ran: all, unless several denoisers share a generation."""
        return tuple(_steps_run(gaps) for gaps in self.errors[0])

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layers, in order of first appearance."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks, in order of first appearance."""
        return tuple(dict.fromkeys(layer.block for layer in self.layers))

    def curve(
        self,
        *,
        gap: int,
        layer: str | None = None,
        kind: str | None = None,
        block: str | None = None,
    ) -> Curve:
        """Returns the mean error curve of one layer, of a kind, of a block, or of all layers.

        Errors are averaged over the chosen layers within each sample, then over samples. The
        interval is Student's t over samples.

        Args:
            gap: Steps since the reused output was computed, 1 to ``max_gap``.
            layer: Path of one layer; cannot be combined with ``kind`` or ``block``.
            kind: Restricts the curve to layers of this kind.
            block: Restricts the curve to layers of this block.

        Returns:
            Mean and 95 % confidence interval, dimensionless; [steps] each.

        Raises:
            InvalidArgumentError: If the gap was not measured or no layer matches.
        """
        if check_count("gap", gap, least=1) > self.max_gap:
            raise InvalidArgumentError(
                f"gap {gap} was not measured; the largest is {self.max_gap}."
            )
        chosen = self._choose(layer, kind, block)
        per_sample = mean_of_known(self.errors[:, chosen, gap - 1, :])
        mean = per_sample.mean(axis=0)
        half_width = np.full_like(mean, np.nan)
        if self.num_samples > 1:
            standard_error = per_sample.std(axis=0, ddof=1) / np.sqrt(self.num_samples)
            half_width = student_t_95(self.num_samples - 1) * standard_error
        return Curve(mean=mean, low=mean - half_width, high=mean + half_width)

    def resample(self, num_steps: int, *, timesteps: Iterable[float] | None = None) -> Calibration:
        """Interpolates the error curves to another number of steps, by position in the noise level.

        With fewer steps, a gap of one new step spans several old steps; with more steps, a fraction
        of one. Errors are interpolated linearly between measured gaps, with 0 at gap 0, so fewer
        steps leave fewer gaps. This assumes that samplers with different steps pass through similar
        states; the result is not measured. With the same number of steps and no or the same
        timesteps, the calibration itself is returned.

        Source: ours.

        >>> layer = CacheLayer("blocks.0.attn", kind="self_attn", block="blocks.0", macs=50)
        >>> errors = np.array([[[[np.nan, 0.2, 0.2, 0.4, 0.4]]]])
        >>> calibration = Calibration((layer,), errors, total_macs=50, timesteps=(9, 7, 5, 3, 1))
        >>> calibration.resample(9).curve(gap=1).mean
        array([ nan, 0.1 , 0.1 , 0.1 , 0.1 , 0.15, 0.2 , 0.2 , 0.2 ])

        Args:
            num_steps: New number of solver steps.
            timesteps: The model's own timestep at each new step, in running order [num_steps]. By
                default, positions are spaced evenly and timesteps are interpolated.

        Returns:
            A calibration of num_steps steps. Its max_gap is the largest gap, up to the current
            max_gap, that lies within the measured gaps.

        Raises:
            InvalidArgumentError: If num_steps is not an integer of at least 1; if the timesteps
                are not num_steps finite monotonic numbers with the direction and unit of the
                calibration's; if the new steps are farther apart than the largest measured gap; or
                if fewer than two steps remain for a layer that runs in part of the generation.
        """
        num_steps = check_count("num_steps", num_steps, least=1)
        given = None if timesteps is None else as_timesteps(timesteps, num_steps)
        if num_steps == self.num_steps and given in (None, self.timesteps):
            return self
        found = positions(self.timesteps, given, num_old=self.num_steps)
        if found is None:
            found = np.linspace(0, self.num_steps - 1, num_steps)
        max_gap = self._gap_within_reach(found)
        runs = self._runs_at(found)
        provenance = resampled_provenance(self.provenance, self.num_steps, num_steps)
        provenance.pop(TIMESTEPS, None)
        if given is None:
            given = tuple(np.interp(found, np.arange(self.num_steps), self.timesteps).tolist())
            provenance[TIMESTEPS] = INTERPOLATED
        outside = self.total_macs - _macs_per_step(self.layers, self.steps_run, self.num_steps)
        inside = _macs_per_step(self.layers, runs, num_steps)
        return replace(
            self,
            errors=resample_errors(
                self.errors, list(zip(self.steps_run, runs, strict=True)), found, max_gap
            ),
            total_macs=outside + inside if self.total_macs else 0,
            timesteps=given,
            noise_levels=self.noise_levels and between(self.noise_levels, found, num_steps),
            provenance=provenance,
            trajectories=None,
        )

    def _gap_within_reach(self, found: FloatArray) -> int:
        """Returns the largest gap, in steps at these positions, with a known error."""
        if len(found) > 1 and self.num_steps == 1:
            raise InvalidArgumentError(
                f"a calibration of one step has no errors to interpolate; calibrate with about "
                f"{len(found)} steps."
            )
        reach = min(self.max_gap, self.num_steps - 1)
        if not (max_gap := largest_gap(found, self.max_gap, reach)):
            apart = np.diff(found).max()
            raise InvalidArgumentError(
                f"the error curves cover gaps up to {reach} of {self.num_steps} steps, but "
                f"{len(found)} steps lie up to {apart:.1f} of these apart; calibrate with about "
                f"{len(found)} steps, or with a max_gap of at least {int(np.ceil(apart))}."
            )
        return max_gap

    def _runs_at(self, found: FloatArray) -> list[range]:
        """Returns the new steps at which each layer runs."""
        runs = [steps_within(found, run, self.num_steps) for run in self.steps_run]
        for layer, run in zip(self.layers, runs, strict=True):
            if len(run) < min(2, len(found)):
                raise InvalidArgumentError(
                    f"'{layer.path}' runs in a part of the generation that contains {len(run)} of "
                    f"the {len(found)} steps, too few for an error curve; calibrate with "
                    f"{len(found)} steps, or use more steps."
                )
        return runs

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, from which ``load`` restores the calibration exactly.

        Args:
            path: The file; an existing one is replaced.

        Raises:
            FileNotFoundError: If the folder does not exist.
        """
        document = {
            "format": FORMAT,
            "version": VERSION,
            "layers": [layer_to_json(layer) for layer in self.layers],
            "total_macs": self.total_macs,
            "timesteps": self.timesteps,
            "model": identity_to_json(self.model),
            "solver": self.solver,
            "peak_bytes": self.peak_bytes,
            "tokens": self.tokens,
            "provenance": self.provenance,
            "noise_levels": self.noise_levels,
        }
        more: dict[str, npt.NDArray[Any]] = {}
        if self.trajectories is not None:
            document["trajectories"], more = to_file(self.trajectories)
        save_table(path, "errors", self.errors, document, more)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads a file written by ``save``.

        Args:
            path: The file to read.

        Returns:
            The calibration, equal in all fields to the saved one.

        Raises:
            FileNotFoundError: If there is no such file.
            FileFormatError: If the file is damaged or was written by a newer version.
        """
        tables, document = load_tables(Path(path), "errors", "calibration")
        check_version(document, FORMAT, VERSION)
        fields = document.fields(
            *("format", "version", "layers", "total_macs", "timesteps", "model", "solver"),
            *("peak_bytes", "tokens", "provenance"),
            optional=("noise_levels", "trajectories"),
        )
        try:
            return cls(
                layers=tuple(fields["layers"].list_of(layer_from_json)),
                errors=tables.pop("errors"),
                total_macs=fields["total_macs"].integer(),
                timesteps=tuple(fields["timesteps"].list_of(Value.number)),
                model=fields["model"].or_none(identity_from_json),
                solver=fields["solver"].or_none(Value.text),
                peak_bytes=fields["peak_bytes"].integer(),
                tokens=fields["tokens"].or_none(lambda value: value.integer(least=1)),
                provenance=fields["provenance"].dict_of(Value.text),
                noise_levels=fields["noise_levels"].or_none(
                    lambda value: tuple(value.list_of(Value.number))
                ),
                trajectories=from_file(fields["trajectories"], tables),
            )
        except InvalidArgumentError as error:  # inconsistent fields, such as a wrong shape
            raise document.error(str(error).rstrip(".")) from error

    def _card(self, name: str, details: Details) -> Card:
        return card.calibration_card(self, name, details)

    def _repr_html_(self) -> str:
        """What a notebook shows: error curves of each kind, and the costs."""
        model = self.model.class_name if self.model else "an unknown model"
        title = (
            f"Calibration of {model}: {self.num_samples} samples, {self.num_steps} steps, gaps up "
            f"to {self.max_gap}"
        )
        notes = [NOT_MEASURED] if CARRIED_OVER in self.provenance else []
        return fragment(title, *map(paragraph, notes), curve_figures(self))

    def __str__(self) -> str:
        model = self.model.class_name if self.model else "an unknown model"
        lines = [
            f"Calibration of {model}: {self.num_samples} samples, {self.num_steps} steps, "
            f"gaps up to {self.max_gap}"
        ]
        if CARRIED_OVER in self.provenance:
            lines.append(f"  {NOT_MEASURED}")
        for kind in self.kinds:
            macs = [layer.macs for layer in self.layers if layer.kind == kind]
            line = f"  {kind}: {len(macs)} layers"
            if self.total_macs and None not in macs:
                line += f", {self._mac_fraction(kind):.1%} of the MACs"
            if self.num_steps > 1:
                errors = self.curve(gap=1, kind=kind).mean
                least, most = np.nanmin(errors), np.nanmax(errors)
                line += f", error after one step {least:.3g} to {most:.3g}"
            lines.append(line)
        return "\n".join(lines)

    def _mac_fraction(self, kind: str) -> float:
        """Returns the fraction of a run's MACs that a kind accounts for."""
        layers = zip(self.layers, self.steps_run, strict=True)
        macs = sum((x.macs or 0) * len(steps) for x, steps in layers if x.kind == kind)
        return macs / (self.total_macs * self.num_steps)

    def _choose(self, layer: str | None, kind: str | None, block: str | None) -> list[int]:
        if layer is not None and (kind is not None or block is not None):
            raise InvalidArgumentError("layer cannot be combined with kind or block.")
        known = {
            "layer": (layer, [x.path for x in self.layers]),
            "kind": (kind, self.kinds),
            "block": (block, self.blocks),
        }
        for name, (wanted, existing) in known.items():
            if wanted is not None and wanted not in existing:
                raise InvalidArgumentError(
                    f"there is no {name} {wanted!r}; there are {listed(existing, 20)}."
                )
        chosen = [
            index
            for index, x in enumerate(self.layers)
            if layer in (None, x.path) and kind in (None, x.kind) and block in (None, x.block)
        ]
        if not chosen:
            kinds = dict.fromkeys(x.kind for x in self.layers if x.block == block)
            raise InvalidArgumentError(
                f"the block {block!r} has no layer of kind {kind!r}, only {listed(kinds)}."
            )
        return chosen


def _check_errors(errors: FloatArray, num_layers: int, num_steps: int) -> FloatArray:
    """Returns the validated errors as a read-only copy in float64."""
    try:
        checked = np.array(errors, dtype=np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"errors is not an array of numbers: {error}.") from error
    if checked.ndim != 4 or 0 in checked.shape or checked.shape[1::2] != (num_layers, num_steps):
        raise InvalidArgumentError(
            f"errors has the shape {checked.shape}, expected [samples, layers, max_gap, steps] "
            f"with {num_layers} layers and {num_steps} steps, none of them 0."
        )
    gaps, steps = np.arange(1, checked.shape[2] + 1)[:, None], np.arange(num_steps)
    for layer in range(num_layers):
        run = _steps_run(checked[0, layer])
        known = (steps >= run.start + gaps) & (steps < run.stop)
        values = checked[:, layer]
        wrong = np.where(known, ~(np.isfinite(values) & (values >= 0)), ~np.isnan(values))
        if wrong.any():
            sample, gap, step = (int(index) for index in np.argwhere(wrong)[0])
            raise InvalidArgumentError(
                f"errors[{sample}, {layer}, {gap}, {step}] is {checked[sample, layer, gap, step]}, "
                f"expected NaN where the layer had not run at the step that lies the gap "
                f"(index + 1) earlier, and a finite non-negative number elsewhere."
            )
    checked.flags.writeable = False
    return checked


def _steps_run(gaps: FloatArray) -> range:
    """Returns the steps at which a layer ran, from its errors [max_gap, steps] of one sample."""
    known = np.flatnonzero(~np.isnan(gaps[0]))
    return range(int(known[0]) - 1, int(known[-1]) + 1) if len(known) else range(gaps.shape[1])


def _check_layers(
    layers: Sequence[CacheLayer], total_macs: int, num_steps: int, steps_run: Sequence[range]
) -> None:
    paths = [layer.path for layer in layers]
    if len(set(paths)) < len(paths):
        twice = {path for path in paths if paths.count(path) > 1}
        raise InvalidArgumentError(f"layers are repeated: {listed(sorted(twice))}.")
    in_layers = _macs_per_step(layers, steps_run, num_steps)
    if 0 < total_macs < in_layers:
        raise InvalidArgumentError(
            f"the layers have {in_layers} MACs together, more than total_macs = {total_macs}."
        )


def _macs_per_step(layers: Sequence[CacheLayer], steps_run: Sequence[range], num_steps: int) -> int:
    """Returns the mean MACs of the layers per step."""
    of_run = sum((x.macs or 0) * len(run) for x, run in zip(layers, steps_run, strict=True))
    return of_run // num_steps
