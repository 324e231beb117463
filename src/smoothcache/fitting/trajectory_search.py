"""Chooses among plans from trajectories by what their fitted runs really leave.

The costs of dynamic programming are those of single segments on the uncached trajectory. How the
model carries errors on, and how they add up, differs between models; so several plans are fitted in
closed loop on a few samples and judged by their final states, and steps of the best one are moved.
Fits that begin with the same steps share the model calls of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from ..calibration.curves import Calibration
from ..checks import check_count, check_number
from ..errors import InvalidArgumentError
from ..model.target import Target
from ..planners.open_loop import open_loop_weights
from ..planners.segments import Segments
from ..planners.trajectory import MAX_LAG, steps_to_compute, trajectories_of, whole_model_schedule
from ..schedule.schedule import Schedule
from .closed_loop import fit, recorded_again
from .step_search import JUDGED_ON, StepSearch


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
    model = Target.of(model)
    trajectories = trajectories_of(calibration)
    count = steps_to_compute(trajectories, speedup, compute, steps_computed)
    max_lag = check_count("max_lag", max_lag, least=1)
    if check_number("max_cost", max_cost) <= 0:
        raise InvalidArgumentError(f"max_cost must be positive, got {max_cost:g}.")
    if not trajectories.has_latents:
        trajectories = recorded_again(model, sample, trajectories.num_samples, trajectories)
    search = StepSearch(
        model,
        sample,
        trajectories.of_samples(range(min(JUDGED_ON, trajectories.num_samples))),
        calibration.timesteps,
        max_lag=max_lag,
        per_branch=per_branch,
    )
    with tqdm(total=round(max_cost, 1), desc="choosing steps", disable=not progress) as bar:
        found = search.run(count, max_cost, lambda spent: bar.update(round(spent, 1) - bar.n))
    if found is None:
        raise InvalidArgumentError(f"{count} of {trajectories.num_steps} steps cannot be chosen.")
    computed = tuple(t in found.steps for t in range(trajectories.num_steps))
    settings = {
        "planner": "trajectory search",
        "steps_computed": count,
        "plans_tried": len(search.tried(count)),
        "search_cost": f"{search.spent:.1f}",
    }
    weights = open_loop_weights(Segments.of(trajectories), found.steps, max_lag)
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
