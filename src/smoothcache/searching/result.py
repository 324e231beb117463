"""What a search measured, and the schedule that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..schedule.schedule import Schedule


@dataclass(frozen=True)
class Measured:
    """One way of sampling and what came of it.

    Attributes:
        name: How it was made.
        compute: MACs over those of the uncached run.
        error: Objective against the uncached run, mean over the samples it was measured on.
        converged_error: The same against the converged sample, with ten times the steps; None if
            that was not sampled.
        schedule: What it ran under; None for plain sampling.
        num_steps: Solver steps, if other than the uncached run's.
        solver: Class name of the noise scheduler, if another.
    """

    name: str
    compute: float
    error: float
    converged_error: float | None = None
    schedule: Schedule | None = field(default=None, repr=False)
    num_steps: int | None = None
    solver: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search found. Printed, it is a short text.

    Attributes:
        best: The winner, measured on samples that the search did not see.
        honest: Ways without a cache at no more cost, measured on the same samples.
        front: The best that was found at every cost, on the samples of the search.
        rollouts: Generations that were run to compare candidates.
        cost: All that was run, in uncached generations.
        verdict: Whether the cache pays, in a sentence.
        scheduler: The noise scheduler to sample with; None for the sampler's own.
        num_steps: Solver steps to sample with.
    """

    best: Measured
    honest: tuple[Measured, ...]
    front: tuple[Measured, ...]
    rollouts: int
    cost: float
    verdict: str
    scheduler: Any = field(default=None, repr=False)
    num_steps: int = 0

    def __str__(self) -> str:
        lines = [f"{'':32} compute   error" + "   to converged" * self._knows_converged]
        for row in (self.best, *self.honest):
            told = f"{row.name[:32]:32} {row.compute:7.1%} {row.error:7.4f}"
            if row.converged_error is not None:
                told += f"   {row.converged_error:.4f}"
            lines.append(told)
        lines.append(f"{self.rollouts} rollouts, as much as {self.cost:.1f} uncached generations")
        lines.append(self.verdict)
        return "\n".join(lines)

    @property
    def _knows_converged(self) -> bool:
        return self.best.converged_error is not None


@dataclass(frozen=True, eq=False)
class SearchedSchedule(Schedule):
    """A schedule that a search found, with all that it measured.

    Attributes:
        result: The search's result; not written to the schedule's file, which keeps the quality.
    """

    result: SearchResult | None = field(default=None, repr=False)


def joint_error(row: Measured) -> float:
    """What a joint search goes by: the distance to the converged sample."""
    return row.error if row.converged_error is None else row.converged_error


def verdict_of(best: Measured, honest: Sequence[Measured], joint: bool) -> str:
    """Whether the cache pays, in a sentence."""

    def quality(row: Measured) -> float:
        return joint_error(row) if joint else row.error

    if best.schedule is None:
        return f"no cache is needed: {best.name} came out best of all that was tried"
    if not honest:
        return (
            "not compared with fewer steps: sample takes no num_inference_steps, so whether the "
            "cache pays is not known"
        )
    rival = min(honest, key=quality)
    target = "converged sample" if joint else "uncached run"
    if quality(rival) <= quality(best):
        closer = "closer" if quality(rival) < quality(best) else "as close"
        return (
            f"NO CACHE IS BETTER: {rival.name} costs {rival.compute:.1%} and ends {closer} to the "
            f"{target} ({quality(rival):.4f} against {quality(best):.4f})"
        )
    cost = "at no less cost"
    if rival.compute < best.compute - 1e-9:
        cost = f"for {best.compute:.1%} of the uncached MACs instead of {rival.compute:.1%}"
    told = (
        f"the schedule pays: it ends closer to the {target} than {rival.name} {cost} "
        f"({quality(best):.4f} against {quality(rival):.4f})"
    )
    closest = min(honest, key=joint_error)
    if joint or joint_error(closest) >= joint_error(best):
        return told
    return (
        f"{told}; BUT TO THE CONVERGED SAMPLE {closest.name} ends closer "
        f"({joint_error(closest):.4f} against {joint_error(best):.4f})"
    )
