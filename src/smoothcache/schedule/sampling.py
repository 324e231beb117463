"""Sampling configurations: schedule, number of steps and solver."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from .schedule import Schedule


@dataclass(frozen=True)
class SamplingConfig:
    """One sampling configuration.

    Attributes:
        name: Name in tables and messages.
        schedule: The schedule to run under; None to sample without a cache.
        num_steps: Number of solver steps; None for the sampler's own.
        solver: Name of the noise scheduler; None for the sampler's own.
    """

    name: str
    _: KW_ONLY
    schedule: Schedule | None = field(default=None, repr=False)
    num_steps: int | None = None
    solver: str | None = None
