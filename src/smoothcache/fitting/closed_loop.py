"""Fits the weights of reused outputs along the run that they themselves make.

A run under a schedule leaves the uncached trajectory. Its weights are fitted one segment after the
other, from a computed step to the next, each with the run's own outputs and from where the run has
come to by then: so a segment makes up for what earlier segments left behind, and nothing drifts.
With s a computed step, l the next one, and c the outputs computed so far,

    min_d || x*_l - b - sum_m d_m c_(k-m) ||^2 + ridge ||d||^2

where x*_l is the state of the uncached run and b the state that the weights so far lead to; what d
adds is spread over the segment's reused steps. Because the solver is linear in the outputs, all
states follow from outputs and the solver's measured responses. The user's sampler is only needed to
call the model at the right state: it runs once for every computed step and sample, up to that step,
with everything before played back, so the model is called once for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..calibration.curves import Calibration
from ..calibration.recording import TrajectoryRecorder
from ..calibration.trajectory import Trajectories
from ..checks import check_count, check_number
from ..errors import CalibrationError, InvalidArgumentError, ScheduleMismatchError
from ..model.target import Target
from ..planners.open_loop import LARGEST_NORM, open_loop_weights
from ..planners.segments import Aim, Segments
from ..planners.trajectory import MAX_LAG, trajectories_of, whole_model_schedule
from ..runtime.combine import combined_by_part
from ..schedule.schedule import Schedule
from ..tracking.playback import Place, Playback, Tape

FloatArray = npt.NDArray[np.float64]
RIDGE = 1e-6  # of the mean diagonal
FEWEST_NUMBERS = 30  # of the latents, for each weight of a segment
_TOLERANCE = 0.02  # relative, of latents that are to be the recorded ones


def fit(
    model: Any,
    sample: Callable[[int], Any],
    schedule: Schedule,
    calibration: Calibration,
    *,
    num_samples: int | None = None,
    held_out: int | None = None,
    max_lag: int = MAX_LAG,
    ridge: float = RIDGE,
    per_branch: bool = False,
    target: Aim = "uncached",
    progress: bool = True,
) -> Schedule:
    """Fits the weights of a schedule's reused outputs in closed loop.

    Only computed steps call the model, so this costs about ``num_samples`` generations under the
    schedule. If the calibration holds inner products alone, the samples are generated uncached
    before.

    Args:
        model: A diffusers pipeline or a module, the one that was calibrated.
        sample: ``sample(i)`` runs generation number i, as for ``calibrate``: the same prompts,
            seeds, solver and number of steps.
        schedule: Which steps are computed. It must reuse the whole denoiser's output, as
            ``plan_trajectory`` and ``Schedule.uniform(..., granularity="model")`` plan it.
        calibration: With trajectories.
        num_samples: How many of the calibration's samples are used; None for all.
        held_out: How many of these, the last ones, run under the weights without being fitted to,
            for an error that is not flattered; None for a fifth of them, at least one.
        max_lag: How many of the last computed outputs are combined.
        ridge: Of the least squares, as a fraction of the mean square of what is combined.
        per_branch: Whether each branch of guidance gets weights of its own. They hold for the
            guidance that they were fitted to alone then; on the demo's images, runs ended no
            nearer for it.
        target: States that the weights are fitted to: those of the "uncached" run, or of the
            "converged" one, which ``calibrate(converged_steps=...)`` records.
        progress: Whether to show a progress bar.

    Returns:
        The schedule with weights. Its quality has "state_error" and "held_out_state_error": the
        distance of the final latents from those of the target, relative L2, over the samples that
        were fitted to and the others.

    Raises:
        InvalidArgumentError: If there are no trajectories, too few samples, or an argument makes
            no sense.
        ScheduleMismatchError: If the schedule is not of the whole denoiser or of other steps.
        CalibrationError: If ``sample`` does not run the generations that were calibrated.

    Example:
        >>> from smoothcache import calibrate, plan_trajectory
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(
        ...     num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
        ...     sample_size=8,
        ... ).eval()
        >>> @torch.no_grad()
        ... def sample(i):
        ...     x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        ...     for t in range(8, 0, -1):
        ...         x = x - 0.1 * model(x, torch.tensor([t]), torch.tensor([1])).sample[:, :4]
        ...     return x
        >>> calibration = calibrate(model, sample, 3, trajectory=True, progress=False)
        >>> plan = plan_trajectory(calibration, speedup=2)
        >>> fit(model, sample, plan, calibration, progress=False).rows[""].predictor
        'fitted'
    """
    if not callable(sample):
        raise InvalidArgumentError(
            f"sample must be a function of the sample's number, got {type(sample).__name__}"
        )
    model = Target.of(model)
    trajectories = trajectories_of(calibration)
    computed = computed_steps(schedule, trajectories)
    if ridge < 0 or not math.isfinite(check_number("ridge", ridge)):
        raise InvalidArgumentError(f"ridge must not be negative, got {ridge:g}.")
    count = trajectories.num_samples if num_samples is None else num_samples
    count = check_count("num_samples", count, least=1)
    aside = max(1, count // 5) if held_out is None else check_count("held_out", held_out, least=0)
    if count > trajectories.num_samples:
        raise InvalidArgumentError(
            f"num_samples is {count}, but the calibration has {trajectories.num_samples} samples; "
            "calibrate on more."
        )
    if count - aside < 1:
        raise InvalidArgumentError(
            f"of {count} samples {aside} are held out, so none is left to fit to; use more."
        )
    max_lag = check_count("max_lag", max_lag, least=1)
    if all(computed):
        return schedule
    if target not in get_args(Aim):
        raise InvalidArgumentError(f"target must be 'uncached' or 'converged', got {target!r}.")
    if target == "converged" and not trajectories.offsets:
        raise InvalidArgumentError(
            "the calibration has no converged trajectories; calibrate with converged_steps=..., "
            'or fit with target="uncached".'
        )
    if not trajectories.has_latents:
        trajectories = recorded_again(model, sample, count, trajectories)
    run = ClosedLoopFit(
        model,
        sample,
        trajectories,
        calibration.timesteps,
        computed,
        max_lag=max_lag,
        ridge=ridge,
        per_branch=per_branch,
        targets=None if target == "uncached" else [x.float() for x in trajectories.offsets],
    )
    run.refuse_few_numbers(count - aside)
    tables, errors = run.fitted(count, aside, progress)
    provenance = {
        **{"planner": schedule.provenance.get("planner", "unknown"), "weights": "closed loop"},
        **{"fit_samples": count - aside, "fit_held_out": aside, "max_lag": max_lag},
        **{"fit_fallbacks": run.fallbacks, "target": target},
    }
    told = {x: y for x, y in schedule.provenance.items() if x not in provenance}
    settings: dict[str, object] = {**told, **provenance}
    fitted = whole_model_schedule(calibration, computed, tables[0], settings, tables[1:])
    quality = {"state_error": float(np.exp(np.mean(np.log(errors[: count - aside]))))}
    if aside:
        quality["held_out_state_error"] = float(np.exp(np.mean(np.log(errors[count - aside :]))))
    return replace(fitted, quality={**schedule.quality, **quality})


def computed_steps(schedule: Schedule, trajectories: Trajectories) -> tuple[bool, ...]:
    """The steps at which a schedule of the whole denoiser runs it.

    Raises:
        ScheduleMismatchError: If it is not such a schedule, or of another number of steps.
    """
    if not isinstance(schedule, Schedule):
        raise InvalidArgumentError(
            f"expected a Schedule, got {type(schedule).__name__}; plan one with plan_trajectory"
        )
    if schedule.num_steps != trajectories.num_steps:
        raise ScheduleMismatchError(
            f"the schedule is of {schedule.num_steps} steps, the trajectories of "
            f"{trajectories.num_steps}; calibrate at {schedule.num_steps} steps, or plan for "
            f"{trajectories.num_steps}"
        )
    names = set(trajectories.denoisers)
    if schedule.layers is None or set(schedule.rows) != names:
        raise ScheduleMismatchError(
            "weights are fitted for the whole denoiser's output, but the schedule reuses "
            f"{', '.join(repr(x) for x in list(schedule.rows)[:3])}; plan with plan_trajectory, or "
            "Schedule.uniform(..., granularity='model')"
        )
    return tuple(
        schedule.rows[name].computed[step] or step in trajectories.first_steps()
        for step, name in enumerate(trajectories.denoisers)
    )


def recorded_again(
    model: Any, sample: Callable[[int], Any], count: int, known: Trajectories
) -> Trajectories:
    recorder = TrajectoryRecorder(model, responses=known.responses)
    for i in range(count):
        recorder.record(partial(sample, i))
    return recorder.result()


class ComputedOutputs:
    """What the model said at computed steps, shared by fits that begin with the same steps.

    Attributes:
        calls: Computed steps that ran the model, all branches of a step counted once.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[int, ...]], tuple[Tape, Tensor]] = {}
        self.calls = 0

    def get(
        self, i: int, steps: tuple[int, ...], run: Callable[[], tuple[Tape, Tensor]]
    ) -> tuple[Tape, Tensor]:
        """The outputs at the last of these steps of sample i, as calls returned and combined."""
        if (i, steps) not in self._known:
            self._known[i, steps] = run()
            self.calls += 1
        return self._known[i, steps]

    def missing(self, samples: int, steps: Sequence[int], num_steps: int) -> int:
        """How many calls a fit of so many samples to these steps would add."""
        runs = [tuple(steps[:count]) for count, t in enumerate(steps, 1) if t < num_steps - 1]
        return sum((i, run) not in self._known for i in range(samples) for run in runs)

    def keep(self, steps: Sequence[int]) -> None:
        """Drops what is of no use to fits that begin as these steps do."""
        kept = {tuple(steps[:count]) for count in range(1, len(steps) + 1)}
        self._known = {at: value for at, value in self._known.items() if at[1] in kept}


# A long class, because the run and the least squares alternate at every computed step.
class ClosedLoopFit:
    """A fit under way.

    Args:
        model: Pipeline or module.
        sample: Runs generation number i.
        trajectories: With latents and outputs.
        timesteps: Of the recorded generations.
        computed: Whether each step is computed.
        max_lag: How many of the last computed outputs are combined.
        ridge: Of the least squares.
        per_branch: Whether each branch of guidance gets weights of its own.
        outputs: What earlier fits to the same samples know; None for nothing.
        numbers: Of the generations that the trajectories are of; None for 0, 1, ...
        targets: For each sample, how far from the uncached states those lie that are to be met,
            [steps + 1, *latents]; None for the uncached ones themselves.

    Attributes:
        fallbacks: Segments that had to do with fewer lags, because weights came out too large.
    """

    def __init__(
        self,
        model: Any,
        sample: Callable[[int], Any],
        trajectories: Trajectories,
        timesteps: Sequence[float],
        computed: Sequence[bool],
        *,
        max_lag: int = MAX_LAG,
        ridge: float = RIDGE,
        per_branch: bool = False,
        outputs: ComputedOutputs | None = None,
        numbers: Sequence[int] | None = None,
        targets: Sequence[Tensor] | None = None,
    ) -> None:
        self._sample = sample
        self._numbers = range(trajectories.num_samples) if numbers is None else numbers
        self._computed_outputs = ComputedOutputs() if outputs is None else outputs
        self._known = trajectories
        self._targets = targets
        self._timesteps = timesteps
        self._outputs = [x.float() for x in trajectories.outputs]
        self._table = trajectories.responses.table
        self._computed = computed
        self._max_lag, self._ridge = max_lag, ridge
        self._playback = Playback(model, timesteps)
        self._segments = Segments.of(trajectories)
        self._steps = [t for t, x in enumerate(computed) if x]
        guidance = trajectories.responses.guidance
        branches = len(guidance.weights) * guidance.parts
        self._tables = branches if per_branch else 1
        # At every step, weights by branch that has its own, and by lag.
        self._weights: list[FloatArray] = [
            np.array([given] * self._tables)
            for given in open_loop_weights(self._segments, self._steps, max_lag)
        ]
        self.fallbacks = 0

    def refuse_few_numbers(self, count: int) -> None:
        """Refuses a fit to fewer numbers than a few for each weight."""
        numbers = sum(x[0].numel() for x in self._known.latents[:count])
        wanted = self._max_lag * self._tables
        if numbers < FEWEST_NUMBERS * wanted:
            raise InvalidArgumentError(
                f"{count} samples have {numbers} numbers at a step, too few to fit {wanted} "
                f"weights to (at least {FEWEST_NUMBERS} for each); calibrate on more samples."
            )

    def fitted(
        self, count: int, aside: int, progress: bool
    ) -> tuple[list[list[tuple[float, ...]]], list[float]]:
        """The weights of every step by branch, and the final state error of every sample."""
        tapes = [Tape() for _ in range(count)]
        # By sample, the outputs of the run as its solver sees them, less the uncached ones.
        strays = [torch.zeros_like(x) for x in self._outputs[:count]]
        own: list[dict[int, Tensor]] = [{} for _ in range(count)]
        steps = self._known.num_steps
        ends = [*self._steps[1:], steps]
        total = len(self._steps) * count
        with tqdm(total=total, desc="fitting", unit="run", disable=not progress) as bar:
            for number, (step, end) in enumerate(zip(self._steps, ends, strict=True)):
                is_over = step == steps - 1
                for i in range(count):
                    if not is_over:
                        prefix = tuple(self._steps[: number + 1])
                        tape, own[i][step] = self._computed_outputs.get(
                            i, prefix, partial(self._run, i, step, tapes[i], strays[i])
                        )
                        tapes[i].outputs.update(tape.outputs)
                        strays[i][step] = own[i][step].sum(dim=0) - self._outputs[i][step]
                    bar.update()
                if end > step + 1:
                    known = self._segments.regressors(self._steps[: number + 1], self._max_lag)
                    self._fit_segment(range(step + 1, end), known, own, strays, count - aside)
        tables = [
            [tuple(weights[table].tolist()) for weights in self._weights]
            for table in range(self._tables)
        ]
        return tables, [self._error(i, strays[i]) for i in range(count)]

    # ---------------------------------------------------------------------------- the user's run

    def _run(self, i: int, step: int, tape: Tape, stray: Tensor) -> tuple[Tape, Tensor]:
        """What the model says at a computed step, and what each branch adds to it."""
        new = Tape()

        def answer(place: Place, run: Callable[[], Any]) -> Any:
            if place.step == step:
                output = run()
                new.record(place, output)
                return output
            if self._computed[place.step]:
                return tape.played(place)
            return self._reused(place, tape)

        def check(at: int, latents: Tensor) -> None:
            if at in (0, step):
                self._refuse_other_latents(i, at, latents, stray)

        generation = self._playback.run(
            partial(self._sample, self._numbers[i]), answer, until=step, seen=check
        )
        self._refuse_other_timesteps(i, generation.timesteps)
        places = sorted(new.outputs, key=lambda x: x.branch)
        guidance = self._known.responses.guidance
        if len(places) != len(guidance.weights):
            raise CalibrationError(
                f"{self._named(i)} called the denoiser {len(places)} times at step {step}, and "
                f"{len(guidance.weights)} times when it was calibrated; it must run the same "
                "generations with the same number of steps"
            )
        output = guidance.components([new.main(place) for place in places]).cpu()
        if not bool(torch.isfinite(output).all()):
            raise CalibrationError(
                f"the denoiser's output is not finite at step {step} of {self._named(i)} under the "
                "schedule; plan with more computed steps"
            )
        return new, output

    def _reused(self, place: Place, tape: Tape) -> Any:
        """The combination of the last computed outputs that stands in for one."""
        weights = self._weights[place.step]
        if self._tables > 1:
            parts = self._known.responses.guidance.parts
            weights = weights[place.branch * parts : (place.branch + 1) * parts]
        before = [s for s in self._steps if s < place.step][-weights.shape[1] :][::-1]
        sources = [tape.outputs[place._replace(step=s)] for s in before]
        leaves, rebuild = sources[0]
        # As a run under the schedule does it, so that nothing differs from it.
        by_part = [list(row[::-1]) for row in weights.tolist()]
        values = [
            combined_by_part([x[n] for x, _ in sources[::-1]], by_part, consume=False)
            for n in range(len(leaves))
        ]
        return rebuild(values)

    def _named(self, i: int) -> str:
        return f"sample({self._numbers[i]})"

    def _refuse_other_latents(self, i: int, step: int, latents: Tensor, stray: Tensor) -> None:
        """Refuses a run that does not begin, or is not carried on, as the recorded one was."""
        given = self._known.responses.guidance.latents(latents).cpu()
        wanted = self._known.latents[i][step].float() + self._moved(stray, step, step)
        norm = float(wanted.norm())
        if given.shape != wanted.shape or float((given - wanted).norm()) > _TOLERANCE * norm:
            raise CalibrationError(
                f"{self._named(i)} {'has' if step else 'begins with'} other latents at step {step} "
                "than follow from those that were calibrated; fit with the same prompts, seeds, "
                "resolution, noise scheduler and number of steps"
            )

    def _refuse_other_timesteps(self, i: int, timesteps: Sequence[float]) -> None:
        for step, (given, wanted) in enumerate(zip(timesteps, self._timesteps, strict=False)):
            if not math.isclose(given, wanted, rel_tol=1e-3, abs_tol=1e-6):
                raise CalibrationError(
                    f"{self._named(i)} is at timestep {given:g} at step {step}, where the "
                    f"calibrated ones were at {wanted:g}; fit with the same noise scheduler and as "
                    "many steps"
                )

    # ----------------------------------------------------------------------------- least squares

    def _fit_segment(
        self,
        reused: range,
        known: Sequence[int],
        own: Sequence[dict[int, Tensor]],
        strays: Sequence[Tensor],
        count: int,
    ) -> None:
        """Fits the weights of a segment, and notes what its outputs become under them."""
        base = np.zeros((len(reused), self._tables, len(known)))
        for row, t in enumerate(reused):
            base[row, :, : self._weights[t].shape[1]] = self._weights[t]
        found = self._solved(reused, known, base, own, strays, count)
        for outputs, stray, recorded in zip(own, strays, self._outputs, strict=False):
            for row, t in enumerate(reused):
                stray[t] = self._combined(outputs, known, found[row]) - recorded[t]
        for row, t in enumerate(reused):
            self._weights[t] = found[row]

    def _solved(
        self,
        reused: range,
        known: Sequence[int],
        base: FloatArray,
        own: Sequence[dict[int, Tensor]],
        strays: Sequence[Tensor],
        count: int,
    ) -> FloatArray:
        """Weights [reused, branches, lags] that lead to the uncached state behind them."""
        end = reused.stop
        responses = self._table[reused.start : end, end]
        size = float(responses @ responses)
        if size == 0:
            return base
        lags, tables = len(known), self._tables
        matrix, right = np.zeros((lags * tables,) * 2), np.zeros(lags * tables)
        for i, outputs, stray, recorded in zip(
            range(count), own, strays, self._outputs, strict=False
        ):
            columns = torch.cat([self._by_table(outputs[s]) for s in known]).double().flatten(1)
            left = -self._moved(stray, reused.start, end)
            if self._targets is not None:
                left += self._targets[i][end]
            for row, t in enumerate(reused):
                change = self._combined(outputs, known, base[row]) - recorded[t]
                left -= float(self._table[t, end]) * change
            matrix += (columns @ columns.T).numpy()
            right += (columns @ left.double().flatten()).numpy()
        for used in range(lags, 0, -1):
            number = used * tables
            part = matrix[:number, :number]
            ridge = self._ridge * np.trace(part) / number
            found = np.linalg.lstsq(part + ridge * np.eye(number), right[:number], rcond=None)[0]
            weights: FloatArray = base.copy()
            added = found.reshape(used, tables).T
            weights[:, :, :used] += (responses / size)[:, None, None] * added
            if np.abs(weights).sum(axis=-1).max() <= LARGEST_NORM:
                return weights
            self.fallbacks += 1
        return base

    def _by_table(self, components: Tensor) -> Tensor:
        """What each branch that has its own weights adds to an output, [tables, *latents]."""
        return components if self._tables > 1 else components.sum(dim=0, keepdim=True)

    def _moved(self, stray: Tensor, steps: int, end: int) -> Tensor:
        """How far the state at a step has come off the uncached one, by the outputs so far."""
        total = torch.zeros_like(stray[0])
        for t in range(steps):
            total += float(self._table[t, end]) * stray[t]
        return total

    def _combined(
        self, outputs: dict[int, Tensor], known: Sequence[int], weights: FloatArray
    ) -> Tensor:
        total = torch.zeros_like(outputs[known[0]][0])
        for lag, s in enumerate(known):
            for table, component in enumerate(self._by_table(outputs[s])):
                total += component * float(weights[table, lag])
        return total

    def _error(self, i: int, stray: Tensor) -> float:
        """Distance of the final latents from those to be met, relative to the last latents."""
        last = self._known.latents[i][-1].float()
        moved = self._moved(stray, len(stray), len(stray))
        if self._targets is not None:
            moved = moved - self._targets[i][-1]
        parts = moved.flatten(1).norm(dim=1) / last.flatten(1).norm(dim=1)
        return float(parts.log().mean().exp())
