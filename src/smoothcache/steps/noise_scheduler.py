"""Noise levels of the steps, read from the noise scheduler.

The noise level is sigma / (alpha + sigma), where the latents are alpha times the sample plus sigma
times noise. It is 1 for pure noise and 0 without noise, and equals the time of rectified flow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from ..checks import check_number, listed
from ..errors import InvalidArgumentError


def levels_of_solver(scheduler: Any | None, num_steps: int) -> tuple[float, ...] | None:
    """Returns the noise levels of a noise scheduler for a number of steps.

    The scheduler is unchanged. Returns None if its noise levels are unknown or depend on further
    arguments, such as a resolution.
    """
    if scheduler is None or not hasattr(scheduler, "set_timesteps"):
        return None
    duplicate = copy.deepcopy(scheduler)
    try:
        duplicate.set_timesteps(num_steps)
    except Exception:  # schedulers raise various errors if an argument is missing
        return None
    return levels_at(duplicate, range(num_steps))


def levels_at(scheduler: Any | None, entries: Sequence[int]) -> tuple[float, ...] | None:
    """Returns the noise levels at entries of a noise scheduler's list of timesteps.

    Args:
        scheduler: A noise scheduler after ``set_timesteps``; None if there is none.
        entries: Indices into its list, one per step.

    Returns:
        Noise levels [steps]; None if they are unknown or not monotonic.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not entries or max(entries) >= len(timesteps):
        return None
    levels = _from_sigmas(scheduler, entries, len(timesteps))
    if levels is None:
        levels = _from_alphas(scheduler, [timesteps[i] for i in entries])
    return None if levels is None or not _are_ordered(levels) else levels


def _from_sigmas(scheduler: Any, entries: Sequence[int], count: int) -> tuple[float, ...] | None:
    """Returns the levels from the scheduler's sigmas: sigma / alpha, or sigma in rectified flow."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) < count:
        return None
    values = [float(sigmas[i]) for i in entries]
    config = getattr(scheduler, "config", {})
    is_flow = "FlowMatch" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas"))
    return tuple(value if is_flow else value / (1 + value) for value in values)


def _from_alphas(scheduler: Any, timesteps: Sequence[Any]) -> tuple[float, ...] | None:
    """Returns the levels from ``alphas_cumprod``, for a scheduler with training timesteps."""
    trained = getattr(scheduler, "alphas_cumprod", None)
    if trained is None or any(int(t) != t or int(t) >= len(trained) for t in timesteps):
        return None
    alphas = [float(trained[int(t)]) for t in timesteps]
    return tuple(math.sqrt(1 - a) / (math.sqrt(1 - a) + math.sqrt(a)) for a in alphas)


def check_noise_levels(values: Iterable[float] | None, steps: int) -> tuple[float, ...] | None:
    """Returns validated noise levels.

    Raises:
        InvalidArgumentError: If they are not one number in [0, 1] per step, or not monotonic.
    """
    if values is None:
        return None
    levels = tuple(check_number("a noise level", value) for value in values)
    if len(levels) != steps:
        raise InvalidArgumentError(f"{len(levels)} noise levels for {steps} steps.")
    if not all(0 <= level <= 1 for level in levels) or not _are_ordered(levels):
        raise InvalidArgumentError(
            "noise levels are sigma / (alpha + sigma); they must be in [0, 1] and only fall or "
            f"only rise, got {listed(levels)}."
        )
    return levels


def _are_ordered(levels: Sequence[float]) -> bool:
    """Whether numbers are strictly monotonic."""
    pairs = list(pairwise(levels))
    return all(a > b for a, b in pairs) or all(a < b for a, b in pairs)


def announced_timesteps(scheduler: Any | None) -> Any | None:
    """Returns a noise scheduler's timesteps, a new tensor per generation; None before any."""
    timesteps = getattr(scheduler, "timesteps", None)
    is_set = getattr(scheduler, "num_inference_steps", None) is not None
    training = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if timesteps is None or (not is_set and len(timesteps) == training):
        return None  # before set_timesteps, it lists the training timesteps
    return timesteps


def solver_position(scheduler: Any | None) -> int | None:
    """Returns the index of a noise scheduler's current timestep; None if it keeps none."""
    if scheduler is None or not hasattr(scheduler, "_step_index"):
        return None
    if scheduler._step_index is None:  # before its first step
        return getattr(scheduler, "_begin_index", None) or 0
    return int(scheduler._step_index)


def solver_stages(scheduler: Any | None) -> int | None:
    """Returns a noise scheduler's number of calls per step and branch; None if unknown."""
    order = getattr(scheduler, "order", None)
    return order if isinstance(order, int) else None
