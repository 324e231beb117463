"""Reads timesteps, and the list of them that a noise scheduler announces."""

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

MOST_TIMES = 4  # of the modalities in one call; more values are an embedding, or a time a frame


@dataclass(frozen=True)
class TimestepUnit:
    """How a denoiser's timestep is read as a listed one: in [0, 1], or from the other end."""

    factor: float
    offset: float

    def listed(self, timestep: float) -> float:
        """The listed timestep that a denoiser's own stands for."""
        return self.offset + self.factor * timestep

    def has(self, timestep: float, listed: float) -> bool:
        """Whether the two are the same, but for rounding to a short dtype or to an integer."""
        wanted = (listed - self.offset) / self.factor
        is_whole = abs(self.factor) == 1 and self.offset in (0, 1000) and timestep == int(timestep)
        return are_close(timestep, wanted) or (is_whole and abs(timestep - wanted) < 1 < listed)


class AnnouncedTimesteps:
    """The timesteps that a noise scheduler announced.

    Args:
        values: As they are listed.
        merges: Whether two equal neighbours are two calls of one step.
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
        """How many steps there are."""
        return len(self._distinct)

    def entry_of(self, step: int) -> int:
        """The first entry of a step."""
        return self._steps.index(step)

    def step_at(self, position: int) -> int:
        """The step that the entry at a position belongs to."""
        return self._steps[position] if position < len(self._steps) else len(self)

    def entries(self, step: int) -> int:
        """How many entries a step has."""
        return self._steps.count(step)

    def are_over_at(self, position: int | None) -> bool:
        """Whether a scheduler at this position has made its last step."""
        return position is not None and position >= len(self._steps)

    def find(self, timestep: float, position: int | None) -> int | None:
        """The step at which a generation begins that the scheduler announced; None if it did not.

        Args:
            timestep: What the denoiser is given, perhaps in another unit than the list's.
            position: Where the scheduler is, if it counts; 0 may also mean that it has not begun.
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
        else:  # most generations begin at the beginning
            step = 0 if 0 in steps else steps[0] if steps else None if position is None else 0
        self._units = [unit for unit in units if found[unit] is not None and found[unit] == step]
        return step

    def has(self, timestep: float, steps: Sequence[int], *, keep: bool = False) -> bool:
        """Whether a timestep is that of one of these steps, in a unit that all before were in.

        Args:
            keep: Only ask, and settle no unit; not so in a unit that is not known.
        """
        if not self._units:
            return not keep  # in a unit that is not known, so all that tells is the position
        units = [u for u in self._units if any(u.has(timestep, self._distinct[s]) for s in steps)]
        self._units = self._units if keep else units or self._units
        return bool(units)

    def _index(self, unit: TimestepUnit, timestep: float) -> int | None:
        nearest = min(
            range(len(self)), key=lambda i: abs(self._distinct[i] - unit.listed(timestep))
        )
        return nearest if unit.has(timestep, self._distinct[nearest]) else None


def timestep_value(timestep: Any, batch: int | None = None) -> float:
    """The one timestep of a call, in the model's own unit.

    Args:
        timestep: A number, or a tensor of shape [], [batch] or, with a timestep for every token
            or modality, [batch, tokens] or [tokens], of which the largest counts. A tensor in the
            memory of an accelerator costs one read by the host.
        batch: How many samples there are; None if it is not known.

    Raises:
        ScheduleMismatchError: If the samples of a batch, or many frames or tokens of a sample, are
            at different timesteps, or it is an embedding of a time.
    """
    if isinstance(timestep, Real):
        return float(timestep)
    if not isinstance(timestep, Tensor) or timestep.numel() == 0:
        raise ScheduleMismatchError(
            f"the denoiser's timestep is a {type(timestep).__name__} that holds no number, so "
            "the step cannot be told"
        )
    if timestep.device.type == "meta":
        raise ScheduleMismatchError(
            "the denoiser's timestep is on the meta device, where it has no value, so the step "
            "cannot be told; pass it as a number or on the CPU"
        )
    values = timestep.detach().to("cpu", torch.float64).numpy()
    distinct = len(np.unique(values))
    is_embedded = distinct > 1 and bool((values < 0).any())
    is_per_sample = values.ndim == 1 and (batch is None or len(values) == batch)
    if is_embedded or (distinct > MOST_TIMES and not is_per_sample):
        raise ScheduleMismatchError(
            f"the denoiser's timestep is a tensor of shape {tuple(timestep.shape)} with "
            f"{distinct} values{', some of them negative' * is_embedded}, so the step cannot be "
            "told. If it is an embedding of a time, pass the module that embeds the time itself, "
            "or wrap the denoiser in a module whose forward is also given `timestep`. If frames or "
            "tokens are at different timesteps, one schedule cannot serve them together"
        )
    if is_per_sample and (values != values[0]).any():
        raise ScheduleMismatchError(
            "the samples of one batch are at different timesteps "
            f"({values.min():g} to {values.max():g}); one schedule cannot serve them together"
        )
    return float(values.max())


def are_close(a: float, b: float) -> bool:
    """Whether two timesteps are the same but for the rounding of a short dtype."""
    return math.isclose(a, b, rel_tol=4e-3, abs_tol=1e-6)  # bfloat16 has 8 bits
