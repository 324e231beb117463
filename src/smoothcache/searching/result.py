"""What a search measured, and the schedule that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..schedule.sampling import SamplingConfig
from ..schedule.schedule import Schedule
from .space import ROUNDING, Candidate

NAME_WIDTH = 32  # characters of a name in the printed table


@dataclass(frozen=True)
class Measured(SamplingConfig):
    """One way of sampling, with its cost and its measured errors.

    Attributes:
        compute: MACs as a fraction of those of the uncached run.
        error: Objective against the uncached run, a mean over the samples it was measured on.
        converged_error: The same against the converged sample, which takes ten times the steps;
            None if there is no converged sample.
        name: How the way of sampling was made.
        schedule: The schedule it ran under; None for sampling without a cache.
        num_steps: Number of solver steps, if not that of the uncached run.
        solver: Name of the noise scheduler, if not the sampler's own.
    """

    compute: float
    error: float
    converged_error: float | None = None

    @classmethod
    def of(
        cls, candidate: Candidate, error: float, converged_error: float | None = None
    ) -> Measured:
        """A candidate with its errors.

        Args:
            candidate: What was measured.
            error: Distance to the uncached run.
            converged_error: Distance to the converged run; None if that was not measured.

        Returns:
            The record of both.
        """
        return cls(
            candidate.name,
            candidate.compute,
            error,
            converged_error,
            schedule=candidate.schedule,
            num_steps=candidate.num_steps,
            solver=candidate.solver,
        )


@dataclass(frozen=True)
class SearchResult:
    """The result of a search. ``str()`` gives a short text of it.

    Attributes:
        best: The winner, measured on the validation samples.
        baselines: Sampling without a cache at no higher cost, measured on the same samples.
        front: The Pareto front of cost and error, measured on the training samples.
        rollouts: Number of generations that were run to compare candidates.
        cost: Cost of everything that was run, in uncached generations.
        verdict: Whether the cache pays off, in a sentence.
        scheduler: The noise scheduler to sample with; None for the sampler's own.
        num_steps: Number of solver steps to sample with.
    """

    best: Measured
    baselines: tuple[Measured, ...]
    front: tuple[Measured, ...]
    rollouts: int
    cost: float
    verdict: str
    scheduler: Any = field(default=None, repr=False)
    num_steps: int = 0

    @property
    def honest(self) -> tuple[Measured, ...]:
        """The former name of ``baselines``."""
        return self.baselines

    def __str__(self) -> str:
        has_converged = self.best.converged_error is not None
        lines = [f"{'':{NAME_WIDTH}} compute   error" + "   to converged" * has_converged]
        for row in (self.best, *self.baselines):
            name = row.name[:NAME_WIDTH]
            line = f"{name:{NAME_WIDTH}} {row.compute:7.1%} {row.error:7.4f}"
            if row.converged_error is not None:
                line += f"   {row.converged_error:.4f}"
            lines.append(line)
        lines.append(f"{self.rollouts} rollouts, as much as {self.cost:.1f} uncached generations")
        lines.append(self.verdict)
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class SearchedSchedule(Schedule):
    """A schedule that a search found, with everything that the search measured.

    Attributes:
        result: Result of the search. It is not written to the schedule's file, which keeps the
            quality.
    """

    result: SearchResult | None = field(default=None, repr=False)

    def measurements(self) -> list[list[str]]:
        """The winner, the baselines without a cache, and the front of the search.

        Returns:
            Rows of texts, the heading first; empty if the search's result is not known.
        """
        if self.result is None:
            return []
        rows = [["way of sampling", "measured on", "compute", "error", "error to converged"]]
        groups = {
            "validation samples": (self.result.best, *self.result.baselines),
            "training samples": self.result.front,
        }
        for where, measured in groups.items():
            for row in measured:
                converged = "" if row.converged_error is None else f"{row.converged_error:.4f}"
                rows.append([row.name, where, f"{row.compute:.1%}", f"{row.error:.4f}", converged])
        return rows


def deciding_error(row: Measured, *, joint: bool) -> float:
    """The error that a search minimises; in a joint search that to the converged sample."""
    if joint and row.converged_error is not None:
        return row.converged_error
    return row.error


def verdict_on(best: Measured, baselines: Sequence[Measured], *, joint: bool) -> str:
    """Whether the cache pays off, in a sentence."""

    def error(row: Measured) -> float:
        return deciding_error(row, joint=joint)

    def converged_error(row: Measured) -> float:
        return deciding_error(row, joint=True)

    if best.schedule is None:
        return f"no cache is needed: {best.name} has the smallest error of everything tried"
    if not baselines:
        return (
            "not compared with fewer steps, because sample takes no num_inference_steps: whether "
            "the cache pays off is not known"
        )
    rival = min(baselines, key=error)
    target = "converged sample" if joint else "uncached run"
    if error(rival) <= error(best):
        closer = "closer" if error(rival) < error(best) else "as close"
        return (
            f"SAMPLING WITHOUT A CACHE IS BETTER: {rival.name} costs {rival.compute:.1%} and ends "
            f"{closer} to the {target} ({error(rival):.4f} against {error(best):.4f})"
        )
    cost = "at no higher cost"
    if rival.compute < best.compute - ROUNDING:
        cost = f"at {best.compute:.1%} of the uncached MACs instead of {rival.compute:.1%}"
    pays = (
        f"the schedule pays off: it ends closer to the {target} than {rival.name} {cost} "
        f"({error(best):.4f} against {error(rival):.4f})"
    )
    closest = min(baselines, key=converged_error)
    if joint or converged_error(closest) >= converged_error(best):
        return pays
    return (
        f"{pays}; HOWEVER, {closest.name} ends closer to the converged sample "
        f"({converged_error(closest):.4f} against {converged_error(best):.4f})"
    )
