"""Runs candidates for real, and keeps the books: what came out, what it cost, what is known.

A candidate is a way of sampling: under a schedule or without one, with the sampler's own solver and
number of steps or with others. The processes of a distributed run share the candidates out and
know all results; a journal on disk makes them known to a search that is taken up again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from ..errors import InvalidArgumentError
from ..model.denoisers import find_denoisers
from ..runtime.run import NEVER_SEEN, cached
from ..schedule.row import Row
from .gains import Recorder, Trajectory, fit_gains
from .journal import Journal
from .objectives import Objective, flattened, is_finite_sample, l2_norm, latent_l2, taken
from .processes import from_first, gather_from_all, rank_and_size
from .space import Candidate, last_reused_step


class Rollouts:
    """Samples as candidates say, and measures how far they end from a reference.

    Args:
        model: What the schedules are for.
        sample: ``sample(i, **options)`` runs generation number i.
        objective: Takes an output and its reference; smaller is better.
        solvers: Noise schedulers that candidates may name.
        journal: Where results are written as they come; None for nowhere.
        settings: What the results depend on; a journal of other settings is refused.
        spent: What has been run before, in uncached generations.
    """

    def __init__(
        self,
        model: Any,
        sample: Callable[..., Any],
        objective: Objective,
        solvers: Mapping[str, Any],
        journal: str | os.PathLike[str] | None,
        settings: Mapping[str, Any],
        spent: float = 0.0,
    ) -> None:
        self._model = model
        self._sample = sample
        self._objective = objective
        self._solvers = solvers
        self._references: dict[tuple[str, int], Any] = {}
        self._trajectories: dict[tuple[str, int], Trajectory] = {}
        self._journal = Journal(journal, settings)
        self._counted: set[tuple[str, str, int]] = set()  # also if the journal knew it
        self.rollouts = 0
        self.cost = spent

    def set_reference(self, name: str, i: int, candidate: Candidate, *, fitted_to: bool) -> Any:
        """Samples what outputs of generation i are to be compared with, under a name.

        Args:
            name: Of the reference.
            i: Number of the generation.
            candidate: How to sample.
            fitted_to: Whether gains will be fitted to it, for which its latents are kept.
        """
        if fitted_to and len(find_denoisers(self._model)) == 1:
            recorder = Recorder(self._model)
            output, trajectory = recorder.run(self._model, lambda: self._run(candidate, i))
            self._trajectories[name, i] = trajectory
        else:
            output = self._run(candidate, i)
        self._references[name, i] = output
        self.cost += candidate.compute
        if not is_finite_sample(output):
            steps = candidate.num_steps
            call = f"{i}" if steps is None else f"{i}, num_inference_steps={steps}"
            raise InvalidArgumentError(f"sample({call}) returned NaN or infinity")
        self._journal.confirm((name, "norm", i), l2_norm(output))
        return output

    def fitted(self, name: str, candidate: Candidate, samples: Sequence[int]) -> Row:
        """The row of a candidate for the whole denoiser, with gains fitted to a reference.

        Each sample costs as much as a rollout of the candidate up to its last reuse.
        """
        if candidate.schedule is None:
            raise InvalidArgumentError(f"{candidate.name!r} has no schedule to fit")
        (row,) = candidate.schedule.rows.values()
        at = (name, candidate.key)
        if at not in self._journal.gains:
            self._journal.put_gains(at, from_first(lambda: self._fit(name, candidate, samples)))
        if (*at, -1) not in self._counted:
            self._counted.add((*at, -1))
            run = sum(row.computed[: last_reused_step(row)]) / sum(row.computed)
            self.cost += candidate.compute * run * len(samples)
            self.rollouts += len(samples)
        return replace(row, gains=tuple(self._journal.gains[at]))

    def _fit(self, name: str, candidate: Candidate, samples: Sequence[int]) -> list[float]:
        wanted = {
            i: (self._trajectories[name, i], flattened(self._references[name, i])) for i in samples
        }
        options = self._options(candidate)
        schedule = candidate.schedule
        if schedule is None:
            return []
        row = fit_gains(self._model, lambda i: self._sample(i, **options), schedule, wanted)
        return list(row.gains or [1.0] * len(row.computed))

    def noise(self, name: str, i: int, candidate: Candidate) -> float:
        """How far apart two runs of a reference end, in relative L2, in the worst process."""
        output = self._run(candidate, i)
        self.rollouts += 1
        self.cost += candidate.compute
        noise = latent_l2(output, self._references[name, i])
        return float(max(gather_from_all(noise)))

    def distances(self, name: str, runs: Sequence[tuple[Candidate, int]]) -> list[float]:
        """How far candidates end from a reference, each in one generation; the ranks share them."""
        wanted = dict.fromkeys((candidate.key, i) for candidate, i in runs)
        ways = {candidate.key: candidate for candidate, _ in runs}
        seen = {(key, i): (name, key, i) in self._counted for key, i in wanted}
        new = [at for at in wanted if (name, *at) not in self._journal.known]
        rank, size = rank_and_size()
        mine: dict[tuple[str, str, int], float] = {}
        failure: Exception | None = None
        try:
            for key, i in new[rank::size]:
                output = self._run(ways[key], i)
                for told, reference in self._references_of(i).items():
                    mine[told, key, i] = self._judged(output, reference)
                    if size == 1:
                        self._journal.put((told, key, i), mine[told, key, i])
        except Exception as error:
            if size == 1:
                raise
            failure = error  # the other processes wait for this one
        for results, reason in gather_from_all((mine, failure)):
            if reason is not None:
                raise reason
            for at, value in results.items():
                self._journal.put(at, value)
        for key, i in (at for at, was_seen in seen.items() if not was_seen):
            self.rollouts += 1
            self.cost += ways[key].compute
            self._counted |= {(told, key, i) for told in self._references_of(i)}
        return [self._journal.known[name, candidate.key, i] for candidate, i in runs]

    def _judged(self, output: Any, reference: Any) -> float:
        """What the objective says; infinite if there is no output, or it is not finite."""
        if output is None or not is_finite_sample(output):
            return math.inf
        value = self._objective(output, reference)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if math.isnan(number):
            raise InvalidArgumentError(f"objective must give a number, got {value!r}")
        return number

    def _references_of(self, i: int) -> dict[str, Any]:
        return {name: value for (name, at), value in self._references.items() if at == i}

    def _options(self, candidate: Candidate) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if candidate.num_steps is not None:
            options["num_inference_steps"] = candidate.num_steps
        if candidate.solver is not None:
            options["scheduler"] = self._solvers[candidate.solver]
        return options

    def _run(self, candidate: Candidate, i: int) -> Any:
        """The output of a generation; None if a branch began at a step planned for reuse."""
        schedule = candidate.schedule
        with cached(self._model, schedule) if schedule else nullcontext() as run:
            output = self._sample(i, **self._options(candidate))
        if run is not None and (reasons := run.summary().recomputed):
            if set(reasons) == {NEVER_SEEN}:  # guidance began at a step that was to reuse
                return None
            raise InvalidArgumentError(
                f"under {candidate.name!r}, sample({i}) had to compute what was planned for reuse "
                f"({', '.join(reasons)}), so its cost cannot be promised; see run.summary()"
            )
        return taken(output, f"sample({i})")
