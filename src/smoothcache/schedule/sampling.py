"""One way of sampling: with which schedule, how many steps, and which solver."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from .schedule import Schedule


@dataclass(frozen=True)
class SamplingConfig:
    """One way of sampling.

    Attributes:
        name: What tables and messages call it.
        schedule: The schedule to run under; None to sample without a cache.
        num_steps: Number of solver steps; None for the sampler's own.
        solver: Name of the noise scheduler; None for the sampler's own.
    """

    name: str
    _: KW_ONLY
    schedule: Schedule | None = field(default=None, repr=False)
    num_steps: int | None = None
    solver: str | None = None
