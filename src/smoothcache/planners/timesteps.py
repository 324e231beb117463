"""Places the steps of a sampler with few steps where the recorded trajectories bend least between.

Under a solver that is linear in the denoiser's outputs, a step from s to l on a coarse grid is the
same as the fine steps between, with the output at s (or its extrapolation) in place of theirs. So
the error of a coarse step follows from the inner products of the recorded outputs, and dynamic
programming finds the grid with the least sum of squared errors. Unlike a schedule, a grid needs no
cache: the sampler itself skips the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..calibration.curves import Calibration
from ..checks import check_count, check_number
from ..errors import InvalidArgumentError
from ..steps.predictors import axis_positions
from .segments import Segments, relative_error
from .trajectory import EARLY_WEIGHT, trajectories_of

FloatArray = npt.NDArray[np.float64]
MOST_ORDER = 2


@dataclass(frozen=True)
class TimestepGrid:
    """Timesteps of a sampler with few steps.

    Attributes:
        timesteps: As the denoiser is given them, in running order [num_steps]. A noise scheduler
            may list them in another unit; ``scheduler_on_grid`` converts them.
        noise_levels: sigma / (alpha + sigma) at each of them [num_steps]; None if not known.
        steps: The steps of the calibrated sampler that these are [num_steps].
        order: Order of the solver that the grid is for.
        expected_state_error: Estimated error of the final latents, relative, in closed form.
    """

    timesteps: tuple[float, ...]
    noise_levels: tuple[float, ...] | None
    steps: tuple[int, ...]
    order: int
    expected_state_error: float

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

    def sigmas(self, *, flow: bool) -> tuple[float, ...]:
        """The sigmas of the steps, as noise schedulers list them.

        Args:
            flow: Whether the model is a rectified flow, whose sigma is the noise level. Otherwise
                sigma is the standard deviation of the noise relative to the scale of the sample.

        Returns:
            One for each step, without the 0 that follows the last one.

        Raises:
            InvalidArgumentError: If the noise levels are not known.
        """
        if self.noise_levels is None:
            raise InvalidArgumentError(
                "the calibration has no noise levels, so the grid has no sigmas; calibrate a "
                "pipeline whose noise scheduler gives them."
            )
        if flow:
            return self.noise_levels
        return tuple(level / (1 - level) if level < 1 else np.inf for level in self.noise_levels)


def plan_timesteps(
    calibration: Calibration,
    num_steps: int,
    *,
    order: int = 2,
    early_weight: float = EARLY_WEIGHT,
) -> TimestepGrid:
    """Plans the timesteps of a sampler with fewer steps than the calibrated one.

    Needs no run of the model. Calibrate with many steps: the grid is chosen among those. Give the
    grid to a pipeline with ``scheduler_on_grid``, or pass ``grid.sigmas()`` as its ``sigmas``.

    Args:
        calibration: With trajectories, as ``calibrate`` records them.
        num_steps: Steps of the grid.
        order: Of the solver that will run on it: 1 for DDIM and Euler, 2 for DPM-Solver++(2M) and
            its like. Order 2 extrapolates over log-SNR, if the noise levels are known.
        early_weight: How many times as much an error of the first state counts as one of the last.

    Returns:
        The grid. It begins with the first step of the calibrated sampler.

    Raises:
        InvalidArgumentError: If the calibration has no trajectories, has several denoisers, or a
            number makes no sense.

    Source: the search for a grid by dynamic programming follows GITS (arXiv 2405.11326) and OSS
    (arXiv 2503.21774); the error of a step in closed form is ours.

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
        >>> grid = plan_timesteps(calibration, 4, order=1)
        >>> len(grid), grid.timesteps[0]
        (4, 8.0)
    """
    trajectories = trajectories_of(calibration)
    steps = trajectories.num_steps
    if not 1 <= check_count("num_steps", num_steps, least=1) <= steps:
        raise InvalidArgumentError(
            f"num_steps must be at most the {steps} steps that were calibrated, got {num_steps}."
        )
    if not 1 <= check_count("order", order, least=1) <= MOST_ORDER:
        raise InvalidArgumentError(f"order must be 1 or {MOST_ORDER}, got {order}.")
    if check_number("early_weight", early_weight) <= 0:
        raise InvalidArgumentError(f"early_weight must be positive, got {early_weight:g}.")
    if len(trajectories.first_steps()) > 1:
        raise InvalidArgumentError(
            "the pipeline has several denoisers that take turns, and a grid for one sampler cannot "
            "keep the step at which they change; plan a schedule with plan_trajectory instead."
        )
    segments = Segments.of(trajectories, early_weight)
    levels = calibration.noise_levels
    positions = axis_positions("log_snr", steps, levels)  # over the step if no levels are known
    costs = coarse_step_costs(segments, positions, order)
    chosen, cost = cheapest_grid(costs, num_steps)
    return TimestepGrid(
        timesteps=tuple(calibration.timesteps[s] for s in chosen),
        noise_levels=None if levels is None else tuple(levels[s] for s in chosen),
        steps=tuple(chosen),
        order=order,
        expected_state_error=relative_error(segments, cost),
    )


def coarse_step_costs(segments: Segments, positions: Sequence[float], order: int) -> FloatArray:
    """Squared errors of the states that coarse steps lead to.

    Args:
        segments: Of the trajectories.
        positions: Where each step lies on the axis of the extrapolation, [steps].
        order: 1 holds the output at the step's beginning; 2 draws a line through the last two.

    Returns:
        [before, begin, end]: the error of a step from ``begin`` to ``end`` after one that began at
        ``before``, which is ``begin`` itself for the first step; infinite where there is none.
    """
    steps, gram = segments.num_steps, segments.gram
    at = np.asarray(positions, dtype=float)
    costs = np.full((steps, steps, steps + 1), np.inf)
    for begin in range(steps):
        befores = np.arange(begin) if begin else np.array([0])
        # Weight of the output at ``before`` in what a line predicts, [before, t]; the output at
        # ``begin`` has the rest to 1. Positions that coincide give no line.
        distance = at[begin] - at[befores]
        is_line = (distance != 0) & (order > 1)
        slopes = (at - at[begin]) / np.where(is_line, distance, 1.0)[:, None]
        older = -slopes * is_line[:, None]
        effects = segments.effects[begin]  # [end, t]
        weight_older = older @ effects.T  # [before, end]
        weight_newer = (1 - older) @ effects.T
        product_older = segments.products[begin][:, befores].T
        product_newer = segments.products[begin][:, begin]
        cost = (
            segments.squares[begin]
            - 2 * (weight_older * product_older + weight_newer * product_newer)
            + weight_older**2 * gram[befores, befores][:, None]
            + 2 * weight_older * weight_newer * gram[befores, begin][:, None]
            + weight_newer**2 * gram[begin, begin]
        )
        costs[befores, begin, begin + 1 :] = np.maximum(cost, 0.0)[:, begin + 1 :]
    return costs


def cheapest_grid(costs: FloatArray, count: int) -> tuple[list[int], float]:
    """The grid of so many steps with the least sum of costs, and that sum.

    Args:
        costs: Of steps, as ``coarse_step_costs`` gives them.
        count: Steps of the grid.
    """
    steps = len(costs)
    value = np.full((steps, steps), np.inf)  # [before, begin]
    value[0, 0] = 0.0
    choices = []
    for _ in range(count - 1):
        total = value[:, :, None] + costs[:, :, :steps]  # [before, begin, next]
        choices.append(total.argmin(axis=0))
        value = total.min(axis=0)
    last = value + costs[:, :, steps]
    before, begin = (int(x) for x in np.unravel_index(int(last.argmin()), last.shape))
    chosen = [begin]
    for choice in reversed(choices):
        chosen.append(before)
        before, begin = int(choice[before, begin]), before
    return chosen[::-1], float(last.min())
