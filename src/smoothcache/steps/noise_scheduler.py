"""How noisy the latents are at every step, as the noise scheduler has it.

One number serves every kind of diffusion: sigma / (alpha + sigma), where the latents are alpha
times the sample plus sigma times noise. It is 1 for pure noise and 0 for none, and in rectified
flow it is the model's own time.
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
    """The noise level of each step when a noise scheduler is asked for so many.

    The scheduler itself is left as it is. None if it does not say, or asks for more to say it
    (a resolution, say).
    """
    if scheduler is None or not hasattr(scheduler, "set_timesteps"):
        return None
    asked = copy.deepcopy(scheduler)
    try:
        asked.set_timesteps(num_steps)
    except Exception:  # what it needs, and what it raises without, is its own affair
        return None
    return levels_at(asked, range(num_steps))


def levels_at(scheduler: Any | None, entries: Sequence[int]) -> tuple[float, ...] | None:
    """The noise levels of entries of a noise scheduler's list of timesteps.

    Args:
        scheduler: Of a pipeline, after it was told the number of steps; None if there is none.
        entries: Indices in its list, one for each step.

    Returns:
        [steps]; None if the scheduler does not say, or the levels neither only fall nor only rise.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not entries or max(entries) >= len(timesteps):
        return None
    levels = _from_sigmas(scheduler, entries, len(timesteps))
    if levels is None:
        levels = _from_alphas(scheduler, [timesteps[i] for i in entries])
    return None if levels is None or not _are_ordered(levels) else levels


def _from_sigmas(scheduler: Any, entries: Sequence[int], count: int) -> tuple[float, ...] | None:
    """From a list of sigma / alpha or, in rectified flow, of sigma alone."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) < count:
        return None
    values = [float(sigmas[i]) for i in entries]
    config = getattr(scheduler, "config", {})
    is_flow = "FlowMatch" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas"))
    return tuple(value if is_flow else value / (1 + value) for value in values)


def _from_alphas(scheduler: Any, timesteps: Sequence[Any]) -> tuple[float, ...] | None:
    """From the noise levels of the training, for a scheduler that steps through those."""
    trained = getattr(scheduler, "alphas_cumprod", None)
    if trained is None or any(int(t) != t or int(t) >= len(trained) for t in timesteps):
        return None
    kept = [float(trained[int(t)]) for t in timesteps]
    return tuple(math.sqrt(1 - a) / (math.sqrt(1 - a) + math.sqrt(a)) for a in kept)


def check_noise_levels(values: Iterable[float] | None, steps: int) -> tuple[float, ...] | None:
    """The noise levels of so many steps, if they are in [0, 1] and only fall or only rise.

    Raises:
        InvalidArgumentError: If they are not.
    """
    if values is None:
        return None
    levels = tuple(check_number("a noise level", value) for value in values)
    if len(levels) != steps:
        raise InvalidArgumentError(f"{len(levels)} noise levels for {steps} steps.")
    if not all(0 <= level <= 1 for level in levels) or not _are_ordered(levels):
        raise InvalidArgumentError(
            "noise levels are sigma / (alpha + sigma), in [0, 1], and only fall or only rise; got "
            f"{listed(levels)}."
        )
    return levels


def _are_ordered(levels: Sequence[float]) -> bool:
    """Whether numbers only fall or only rise."""
    pairs = list(pairwise(levels))
    return all(a > b for a, b in pairs) or all(a < b for a, b in pairs)


def announced_timesteps(scheduler: Any | None) -> Any | None:
    """A noise scheduler's tensor of timesteps, a new one for each generation; None before any."""
    timesteps = getattr(scheduler, "timesteps", None)
    is_told = getattr(scheduler, "num_inference_steps", None) is not None
    training = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if timesteps is None or (not is_told and len(timesteps) == training):
        return None  # until it is told a number of steps it lists those of the training
    return timesteps


def solver_position(scheduler: Any | None) -> int | None:
    """Index of the timestep at which a noise scheduler is; None if it does not count its steps."""
    if scheduler is None or not hasattr(scheduler, "_step_index"):
        return None
    if scheduler._step_index is None:  # before its first step
        return getattr(scheduler, "_begin_index", None) or 0
    return int(scheduler._step_index)


def solver_stages(scheduler: Any | None) -> int | None:
    """Calls of the denoiser that a noise scheduler makes in a step, if it says, for each branch."""
    order = getattr(scheduler, "order", None)
    return order if isinstance(order, int) else None
