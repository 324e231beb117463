"""Runs candidates, measures their distances from a reference, and counts what that costs.

In a distributed run each process runs a share of the candidates, and all of them know all results.
A journal keeps the results on disk for a search that is interrupted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from ..calibration.recording import record_generation
from ..errors import CalibrationError, InvalidArgumentError
from ..model.target import Target
from ..processes import from_rank_zero, gather_from_all, rank_and_size
from ..runtime.run import NEVER_SEEN, cached
from ..schedule.row import Row
from ..steps.predictors import FITTED
from ..tracking.playback import Playback
from .gains import Recorder, Trajectory, fit_gains
from .journal import DistanceKey, Journal
from .objectives import Objective, flattened, is_finite, l2_norm, latent_l2, output_tensors
from .space import Candidate, last_reused_step
from .weights import Weights, fit_weights


# A long class, because every measure of a candidate shares one store of references and distances.
class Rollouts:
    """Samples as candidates say, and measures how far they end from a reference.

    Args:
        model: The pipeline or module that ``sample`` runs.
        sample: ``sample(i, **options)`` runs generation number i.
        objective: Distance of an output from its reference; smaller is better.
        solvers: Noise schedulers by name that candidates may use.
        journal: File for the results; None for none.
        settings: What the results depend on; a journal with other settings is refused.
        cost: What was spent before, in uncached generations.

    Attributes:
        rollouts: Number of generations that were run to compare candidates.
        cost: Cost of everything that was run, in uncached generations. Results from the journal
            count as if they had been run, so that a continued search takes the same decisions.
    """

    def __init__(
        self,
        model: Any,
        sample: Callable[..., Any],
        objective: Objective,
        solvers: Mapping[str, Any],
        journal: str | os.PathLike[str] | None,
        settings: Mapping[str, Any],
        cost: float = 0.0,
    ) -> None:
        self._model = model
        self._sample = sample
        self._objective = objective
        self._solvers = solvers
        self._num_steps = int(settings["steps"])
        self._references: dict[tuple[str, int], Any] = {}
        self._trajectories: dict[tuple[str, int], Trajectory] = {}
        self._journal = Journal(journal, settings)
        self._counted: set[DistanceKey] = set()
        self.rollouts = 0
        self.cost = cost

    def set_reference(
        self,
        name: str,
        i: int,
        candidate: Candidate,
        *,
        with_trajectory: bool,
        known: Any = None,
    ) -> None:
        """Samples a reference for generation i.

        Args:
            name: Name of the reference.
            i: Number of the generation.
            candidate: How to sample.
            with_trajectory: Whether to keep the latents of every step, which gains are fitted to.
            known: What the generation returned when it ran before; None to run it.

        Raises:
            InvalidArgumentError: If the output is not finite.
        """
        if known is not None:
            output = output_tensors(known, f"sample({i})")
            self._keep_reference(name, i, candidate, output, cost=0.0)
            return
        if with_trajectory and len(Target.of(self._model).denoisers) == 1:
            recorder = Recorder(self._model)
            output, trajectory = recorder.run(self._model, lambda: self._run(candidate, i))
            self._trajectories[name, i] = trajectory
        else:
            output = self._run(candidate, i)
        self._keep_reference(name, i, candidate, output, cost=candidate.compute)

    def replay_reference(self, name: str, i: int) -> float:
        """Samples the uncached reference of a generation, and then again without the model.

        Returns:
            Relative L2 distance of the two, in the worst process: of all that is random but the
            model.

        Raises:
            InvalidArgumentError: If the output is not finite.
        """
        outputs: list[Any] = []

        def run() -> None:
            outputs.append(output_tensors(self._sample(i), f"sample({i})"))

        tape, generation = record_generation(self._model, run)
        latents = [x.cpu() for x in generation.latents]
        self._trajectories[name, i] = Trajectory(generation.timesteps, latents)
        self._keep_reference(name, i, Candidate(name, 1.0), outputs[0], cost=1.0)
        playback = Playback(self._model, generation.timesteps)
        playback.run(run, lambda place, _: tape.played(place))
        return float(max(gather_from_all(latent_l2(outputs[1], outputs[0]))))

    def _keep_reference(
        self, name: str, i: int, candidate: Candidate, output: Any, *, cost: float
    ) -> None:
        self._references[name, i] = output
        self.cost += cost
        if not is_finite(output):
            steps = candidate.num_steps
            arguments = f"{i}" if steps is None else f"{i}, num_inference_steps={steps}"
            raise InvalidArgumentError(f"sample({arguments}) returned NaN or infinity")
        self._journal.confirm((name, "norm", i), l2_norm(output))

    def trajectory(self, name: str, i: int) -> Trajectory | None:
        """The latents of a reference; None if they were not kept."""
        return self._trajectories.get((name, i))

    def deviation(self, name: str, i: int, candidate: Candidate) -> float:
        """Relative L2 distance between a reference and another run of it, in the worst process."""
        output = self._run(candidate, i)
        self.rollouts += 1
        self.cost += candidate.compute
        return float(max(gather_from_all(latent_l2(output, self._references[name, i]))))

    def fit(self, name: str, candidate: Candidate, samples: Sequence[int]) -> Row:
        """The row of a candidate for the whole denoiser, with gains fitted to a reference.

        Each sample costs as much as a run of the candidate up to its last reused step.

        Args:
            name: Name of the reference.
            candidate: Reuses the output of the whole denoiser.
            samples: Numbers of the generations to fit to.
        """
        if candidate.schedule is None:
            raise InvalidArgumentError(f"{candidate.name!r} has no schedule to fit gains for")
        (row,) = candidate.schedule.rows.values()
        key = (name, candidate.key)
        if key not in self._journal.gains:
            gains = from_rank_zero(lambda: self._fit(name, candidate, samples))
            self._journal.record_gains(key, gains)
        if (*key, -1) not in self._counted:
            self._counted.add((*key, -1))
            share = sum(row.computed[: last_reused_step(row)]) / sum(row.computed)
            self.cost += candidate.compute * share * len(samples)
            self.rollouts += len(samples)
        return replace(row, gains=tuple(self._journal.gains[key]))

    def _fit(self, name: str, candidate: Candidate, samples: Sequence[int]) -> list[float]:
        references = {
            i: (self._trajectories[name, i], flattened(self._references[name, i])) for i in samples
        }
        options = self._options(candidate)
        schedule = candidate.schedule
        if schedule is None:
            return []
        row = fit_gains(self._model, lambda i: self._sample(i, **options), schedule, references)
        return list(row.gains or [1.0] * len(row.computed))

    def fit_weights(self, name: str, candidate: Candidate, samples: Sequence[int]) -> Row | None:
        """The row of a candidate for the whole denoiser, with weights fitted to a reference.

        Each sample costs an uncached run as the candidate samples, and one under the candidate.

        Args:
            name: Name of the reference.
            candidate: Reuses the output of the whole denoiser.
            samples: Numbers of the generations to fit to.

        Returns:
            The row; None if its generations cannot be recorded.
        """
        row = candidate.common_row
        if row is None or candidate.schedule is None:
            return None
        steps = candidate.schedule.num_steps / self._num_steps
        self.cost += (steps + candidate.compute) * len(samples)
        weights = from_rank_zero(lambda: self._fit_weights(name, candidate, row, samples))
        return None if weights is None else Row(row.computed, FITTED, weights=weights)

    def _fit_weights(
        self, name: str, candidate: Candidate, row: Row, samples: Sequence[int]
    ) -> Weights | None:
        references = {i: (self._trajectories[name, i], self._references[name, i]) for i in samples}
        options = self._options(candidate)
        try:
            return fit_weights(
                self._model, lambda i: self._sample(i, **options), row.computed, references
            )
        except CalibrationError:  # not linear, say; the other candidates are enough
            return None

    def distances(self, name: str, runs: Sequence[tuple[Candidate, int]]) -> list[float]:
        """Distances from a reference, of candidates in one generation each.

        Known results are not measured again. The processes share the others, and an exception in
        one of them is raised in all.

        Args:
            name: Name of the reference.
            runs: Candidates and the numbers of the generations to run.
        """
        wanted = dict.fromkeys((candidate.key, i) for candidate, i in runs)
        candidates = {candidate.key: candidate for candidate, _ in runs}
        uncounted = [(key, i) for key, i in wanted if (name, key, i) not in self._counted]
        unknown = [(key, i) for key, i in wanted if (name, key, i) not in self._journal.distances]
        rank, size = rank_and_size()
        measured: dict[DistanceKey, float] = {}
        failure: Exception | None = None
        try:
            for key, i in unknown[rank::size]:
                output = self._run(candidates[key], i)
                for reference_name, reference in self._references_of(i).items():
                    distance = self._distance(output, reference)
                    measured[reference_name, key, i] = distance
                    if size == 1:  # written at once; an interruption loses one run at most
                        self._journal.record((reference_name, key, i), distance)
        except Exception as error:
            if size == 1:
                raise
            failure = error  # raised below, in all processes, because the others wait for this one
        for results, reason in gather_from_all((measured, failure)):
            if reason is not None:
                raise reason
            for at, value in results.items():
                self._journal.record(at, value)
        for key, i in uncounted:
            self.rollouts += 1
            self.cost += candidates[key].compute
            self._counted |= {(reference, key, i) for reference in self._references_of(i)}
        return [self._journal.distances[name, candidate.key, i] for candidate, i in runs]

    def _distance(self, output: Any, reference: Any) -> float:
        """The objective; infinite if there is no output, or it is not finite."""
        if output is None or not is_finite(output):
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
        """The references of a generation by name."""
        return {name: value for (name, number), value in self._references.items() if number == i}

    def _options(self, candidate: Candidate) -> dict[str, Any]:
        """The keywords that a candidate needs ``sample`` to be called with."""
        options: dict[str, Any] = {}
        if candidate.num_steps is not None:
            options["num_inference_steps"] = candidate.num_steps
        if candidate.solver is not None:
            options["scheduler"] = self._solvers[candidate.solver]
        return options

    def _run(self, candidate: Candidate, i: int) -> Any:
        """The tensors of generation i; None if a branch began at a step planned for reuse.

        Raises:
            InvalidArgumentError: If the run computed what the schedule reuses.
        """
        schedule = candidate.schedule
        with cached(self._model, schedule) if schedule else nullcontext() as run:
            output = self._sample(i, **self._options(candidate))
        if run is not None and (reasons := run.summary().recomputed):
            if set(reasons) == {NEVER_SEEN}:  # guidance began at a step that was to reuse
                return None
            raise InvalidArgumentError(
                f"under {candidate.name!r}, sample({i}) had to compute what was planned for reuse "
                f"({', '.join(reasons)}), so the cost of the schedule is not known; see "
                "run.summary()"
            )
        return output_tensors(output, f"sample({i})")
