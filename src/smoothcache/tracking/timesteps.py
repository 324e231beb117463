"""Reads timesteps and the list of timesteps that a noise scheduler announces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ScheduleMismatchError

MOST_TIMES = 4  # one per modality; more values are an embedding or one time per frame


@dataclass(frozen=True)
class TimestepUnit:
    """Conversion of a denoiser's timestep to a listed one: scaled to [0, 1] or reversed."""

    factor: float
    offset: float

    def listed(self, timestep: float) -> float:
        """Converts a denoiser's timestep to a listed timestep."""
        return self.offset + self.factor * timestep

    def has(self, timestep: float, listed: float) -> bool:
        """Whether both are equal up to rounding to a low-precision dtype or an integer."""
        wanted = (listed - self.offset) / self.factor
        is_whole = abs(self.factor) == 1 and self.offset in (0, 1000) and timestep == int(timestep)
        return are_close(timestep, wanted) or (is_whole and abs(timestep - wanted) < 1 < listed)


class AnnouncedTimesteps:
    """The timesteps that a noise scheduler announced.

    Args:
        values: The listed timesteps.
        merges: Whether equal neighbours are calls of one step.
    """

    def __init__(self, values: Sequence[float], merges: bool) -> None:
        starts = [i == 0 or not merges or t != values[i - 1] for i, t in enumerate(values)]
        self._steps = list(itertools.accumulate(starts, initial=-1))[1:]
        self._distinct = [t for t, begins in zip(values, starts, strict=True) if begins]
        self._full = 1.0 if max(values, default=0.0) <= 1 else 1000.0
        self._units: list[TimestepUnit] = []

    @classmethod
    def of(cls, announced: Any, merges: bool) -> AnnouncedTimesteps:
        values = torch.as_tensor(announced).detach().to("cpu", torch.float64).tolist()
        return cls(values, merges)

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._distinct)

    def entry_of(self, step: int) -> int:
        """Returns the index of a step's first entry."""
        return self._steps.index(step)

    def step_at(self, position: int) -> int:
        """Returns the step of the entry at a position."""
        return self._steps[position] if position < len(self._steps) else len(self)

    def entries(self, step: int) -> int:
        """Returns the number of entries of a step."""
        return self._steps.count(step)

    def are_over_at(self, position: int | None) -> bool:
        """Whether a scheduler at this position has finished its last step."""
        return position is not None and position >= len(self._steps)

    def find(self, timestep: float, position: int | None) -> int | None:
        """Returns the first step of an announced generation; None if none was announced.

        Args:
            timestep: The denoiser's timestep, possibly in another unit than the list's.
            position: Position of the scheduler, if it keeps one; 0 may mean not started.
        """
        if not self._distinct or self.are_over_at(position):
            return None
        units = [TimestepUnit(1.0, 0.0), TimestepUnit(-1.0, self._full)]
        if timestep <= 1 < self._full:
            units = [TimestepUnit(1000.0, 0.0), TimestepUnit(-1000.0, 1000.0), *units]
        found = {unit: self._index(unit, timestep) for unit in units}
        steps = [step for step in found.values() if step is not None]
        if position:
            step: int | None = self.step_at(position)
        else:  # prefer the first step, where most generations begin
            step = 0 if 0 in steps else steps[0] if steps else None if position is None else 0
        self._units = [unit for unit in units if found[unit] is not None and found[unit] == step]
        return step

    def has(self, timestep: float, steps: Sequence[int], *, keep: bool = False) -> bool:
        """Whether a timestep belongs to one of these steps, in a unit consistent with all before.

        Args:
            keep: Leave the possible units unchanged; returns False if no unit is known.
        """
        if not self._units:
            return not keep  # the unit is unknown, so only the position is informative
        units = [u for u in self._units if any(u.has(timestep, self._distinct[s]) for s in steps)]
        self._units = self._units if keep else units or self._units
        return bool(units)

    def _index(self, unit: TimestepUnit, timestep: float) -> int | None:
        nearest = min(
            range(len(self)), key=lambda i: abs(self._distinct[i] - unit.listed(timestep))
        )
        return nearest if unit.has(timestep, self._distinct[nearest]) else None


def timestep_value(timestep: Any, batch: int | None = None) -> float:
    """Returns the timestep of a call, in the model's own unit.

    Args:
        timestep: A number or a tensor of shape [] or [batch]. A tensor of shape [batch, tokens] or
            [tokens] has a timestep per token or modality; the largest is returned. Reading a
            tensor on an accelerator costs one host sync.
        batch: Number of samples; None if unknown.

    Raises:
        ScheduleMismatchError: If the samples of a batch, or many frames or tokens of a sample, are
            at different timesteps, or if the tensor is a timestep embedding.
    """
    if isinstance(timestep, Real):
        return float(timestep)
    if not isinstance(timestep, Tensor) or timestep.numel() == 0:
        raise ScheduleMismatchError(
            f"the denoiser's timestep is a {type(timestep).__name__} that holds no number, so "
            "the solver step is unknown; pass a number or a tensor"
        )
    if timestep.device.type == "meta":
        raise ScheduleMismatchError(
            "the denoiser's timestep is on the meta device and has no value, so the solver step "
            "is unknown; pass a number or a CPU tensor"
        )
    values = timestep.detach().to("cpu", torch.float64).numpy()
    distinct = len(np.unique(values))
    is_embedded = distinct > 1 and bool((values < 0).any())
    is_per_sample = values.ndim == 1 and (batch is None or len(values) == batch)
    if is_embedded or (distinct > MOST_TIMES and not is_per_sample):
        raise ScheduleMismatchError(
            f"the denoiser's timestep is a tensor of shape {tuple(timestep.shape)} with "
            f"{distinct} values{', some of them negative' * is_embedded}, so the solver step is "
            "unknown. If it is a timestep embedding, pass the module that computes the embedding, "
            "or wrap the denoiser in a module whose forward also takes `timestep`. If frames or "
            "tokens are at different timesteps, one schedule cannot apply to them"
        )
    if is_per_sample and (values != values[0]).any():
        raise ScheduleMismatchError(
            "the samples of one batch are at different timesteps "
            f"({values.min():g} to {values.max():g}); one schedule cannot apply to all of them"
        )
    return float(values.max())


def are_close(a: float, b: float) -> bool:
    """Whether two timesteps are equal up to the rounding of a low-precision dtype."""
    return math.isclose(a, b, rel_tol=4e-3, abs_tol=1e-6)  # bfloat16 has 8 bits
