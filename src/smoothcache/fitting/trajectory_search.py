"""Chooses among plans from trajectories by what their fitted runs really leave.

The costs of dynamic programming are those of single segments on the uncached trajectory. How the
model carries errors on, and how they add up, differs between models; so several plans are fitted in
closed loop on a few samples and judged by their final states, and steps of the best one are moved.
Fits that begin with the same steps share the model calls of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..calibration.curves import Calibration
from ..checks import check_count, check_number
from ..errors import InvalidArgumentError
from ..planners.trajectory import (
    MAX_LAG,
    Segments,
    choose_steps,
    open_loop_weights,
    steps_to_compute,
    trajectories_of,
    whole_model_schedule,
)
from ..schedule.schedule import Schedule
from .closed_loop import ClosedLoopFit, ComputedOutputs, fit, recorded_again

PLANS = ((1e-4, 3.0), (1e-5, 3.0), (1e-5, 1.0), (1e-4, 1.0))


"""Noise and early weight of the plans that are tried, beside even spacing."""


JUDGED_ON = 2
_GOLDEN = 0.618
_WORTH = 0.005  # of the logarithm of the error, by which a move must be better


def search_trajectory(
    model: Any,
    sample: Callable[[int], Any],
    calibration: Calibration,
    *,
    speedup: float | None = None,
    compute: float | None = None,
    steps_computed: int | None = None,
    max_lag: int = MAX_LAG,
    per_branch: bool = False,
    max_cost: float = 10.0,
    num_samples: int | None = None,
    held_out: int | None = None,
    progress: bool = True,
) -> Schedule:
    """Plans steps from trajectories, keeps what fitted runs confirm, and fits the weights.

    Args:
        model: A diffusers pipeline or a module, the one that was calibrated.
        sample: ``sample(i)`` runs generation number i, as for ``calibrate``.
        calibration: With trajectories.
        speedup: As for ``plan_trajectory``, like the next two.
        compute: See there.
        steps_computed: See there.
        max_lag: How many of the last computed outputs are combined in a reuse.
        per_branch: Whether each branch of guidance gets weights of its own, as for ``fit``.
        max_cost: What may be spent on choosing, in uncached generations; the fit comes on top.
        num_samples: Of the final fit, as for ``fit``.
        held_out: See there.
        progress: Whether to show progress bars.

    Returns:
        The best schedule found, with weights fitted to ``num_samples`` samples.

    Raises:
        InvalidArgumentError: If there are no trajectories, or an argument makes no sense.
        CalibrationError: If ``sample`` does not run the generations that were calibrated.

    Example:
        >>> import torch
        >>> from smoothcache import calibrate
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
        >>> search_trajectory(
        ...     model, sample, calibration, speedup=2, max_cost=4, progress=False
        ... ).compute
        0.5
    """
    trajectories = trajectories_of(calibration)
    count = steps_to_compute(trajectories, speedup, compute, steps_computed)
    max_lag = check_count("max_lag", max_lag, least=1)
    if check_number("max_cost", max_cost) <= 0:
        raise InvalidArgumentError(f"max_cost must be positive, got {max_cost:g}.")
    if not trajectories.has_latents:
        trajectories = recorded_again(model, sample, trajectories.num_samples, trajectories)
    judged = min(JUDGED_ON, trajectories.num_samples)
    outputs = ComputedOutputs()

    def judge(steps: Sequence[int]) -> float:
        computed = tuple(t in steps for t in range(trajectories.num_steps))
        run = ClosedLoopFit(
            model,
            sample,
            trajectories,
            calibration.timesteps,
            computed,
            max_lag=max_lag,
            per_branch=per_branch,
            outputs=outputs,
        )
        _, errors = run.fitted(judged, 0, progress=False)
        return float(np.mean(np.log(np.maximum(errors, 1e-12))))

    def spent() -> float:
        return outputs.calls / trajectories.num_steps

    plans = []
    for noise, early_weight in PLANS:
        segments = Segments.of(trajectories, early_weight)
        plans.append(tuple(choose_steps(segments, count, noise=noise)[0]))
    plans.append(_even(trajectories.num_steps, count, trajectories.first_steps()))
    best, error = plans[0], math.inf
    tried: set[tuple[int, ...]] = set()
    with tqdm(total=round(max_cost, 1), desc="choosing steps", disable=not progress) as bar:
        proposals = iter(plans)
        moves = _Moves(trajectories.num_steps, trajectories.first_steps())
        while spent() < max_cost:
            steps = next(proposals, None)
            if steps is None:
                steps = moves.propose(best, tried)
                if steps is None:
                    break
            if steps in tried:
                continue
            tried.add(steps)
            found = judge(steps)
            if found < error - (_WORTH if math.isfinite(error) else 0):
                best, error = steps, found
            outputs.keep(best)
            bar.update(round(spent(), 1) - bar.n)
    segments = Segments.of(trajectories)
    computed = tuple(t in best for t in range(trajectories.num_steps))
    settings = {
        "planner": "trajectory search",
        "steps_computed": count,
        "plans_tried": len(tried),
        "search_cost": f"{spent():.1f}",
    }
    weights = open_loop_weights(segments, best, max_lag)
    planned = whole_model_schedule(calibration, computed, weights, settings)
    return fit(
        model,
        sample,
        planned,
        calibration,
        num_samples=num_samples,
        held_out=held_out,
        max_lag=max_lag,
        per_branch=per_branch,
        progress=progress,
    )


def _even(num_steps: int, count: int, fixed: Sequence[int]) -> tuple[int, ...]:
    """Steps as far apart as can be; those at which a denoiser begins are among them."""
    spaced = [round(x) for x in np.linspace(0, num_steps, count, endpoint=False)]
    for first in fixed:
        if first not in spaced:
            spaced[min(range(count), key=lambda i: abs(spaced[i] - first))] = first
    return tuple(sorted(spaced))


class _Moves:
    """Proposes moves of one computed step, in an order that soon has been everywhere."""

    def __init__(self, num_steps: int, fixed: Sequence[int]) -> None:
        self._num_steps, self._fixed = num_steps, set(fixed)
        self._at = 0

    def propose(self, best: tuple[int, ...], tried: set[tuple[int, ...]]) -> tuple[int, ...] | None:
        """The next untried neighbour; None if there is none."""
        every = list(self._neighbours(best))
        left = [steps for steps in every if steps not in tried]
        self._at += 1
        return left[int(len(left) * (self._at * _GOLDEN % 1))] if left else None

    def _neighbours(self, best: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for index in range(len(best) - 1, 0, -1):
            for by in (-1, 1):
                moved = best[index] + by
                if best[index] in self._fixed or moved in best or moved >= self._num_steps:
                    continue
                yield tuple(sorted({*best[:index], moved, *best[index + 1 :]}))
