"""Has a noise scheduler step over planned timesteps, whatever the pipeline asks it for."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidArgumentError
from ..planners.timesteps import TimestepGrid
from ..steps.noise_scheduler import levels_at

_ADVICE = (
    "switch off its own spacing (Karras, Lu, exponential or beta sigmas), or use another scheduler."
)
_TOLERANCE = 2e-2  # relative, because schedulers round timesteps to whole numbers


def scheduler_on_grid(scheduler: Any, grid: TimestepGrid) -> Any:
    """A copy of a noise scheduler that steps over the timesteps of a grid.

    Assign it to ``pipeline.scheduler`` and sample with ``num_inference_steps=len(grid)``. This also
    works for pipelines that take neither ``timesteps`` nor ``sigmas``.

    Args:
        scheduler: A noise scheduler of diffusers whose ``set_timesteps`` takes ``timesteps`` or
            ``sigmas`` (DPM-Solver++, Euler, UniPC, flow matching and others; DDIM does not, and
            DPM-Solver++ of order 1 is the same solver).
        grid: From ``plan_timesteps``.

    Returns:
        The copy; the given scheduler is left as it is.

    Raises:
        InvalidArgumentError: If the scheduler cannot step over a list, or places the steps
            elsewhere.

    Example:
        >>> from diffusers import DPMSolverMultistepScheduler
        >>> from smoothcache.planners import TimestepGrid
        >>> grid = TimestepGrid((999, 600, 100), None, (0, 4, 9), order=2, expected_state_error=0.1)
        >>> planned = scheduler_on_grid(DPMSolverMultistepScheduler(), grid)
        >>> planned.set_timesteps(3)
        >>> planned.timesteps.tolist()
        [999, 600, 100]
    """
    name = type(scheduler).__name__
    taken = inspect.signature(scheduler.set_timesteps).parameters
    is_flow = "FlowMatch" in name or bool(_config(scheduler).get("use_flow_sigmas"))
    takes_sigmas = "sigmas" in taken and grid.noise_levels is not None
    if takes_sigmas and (is_flow or "timesteps" not in taken):
        sigmas = list(grid.sigmas(flow=is_flow))
        if not all(map(math.isfinite, sigmas)):
            raise InvalidArgumentError(
                "the grid begins with pure noise, which has no finite sigma; use a scheduler that "
                "takes timesteps."
            )
        given: dict[str, Any] = {"sigmas": sigmas}
    elif "timesteps" in taken:
        given = {"timesteps": _listed_timesteps(scheduler, grid)}
    else:
        raise InvalidArgumentError(
            f"{name} takes neither timesteps nor sigmas, so it cannot step over a grid"
            f"{'' if 'sigmas' not in taken else ' without noise levels'}; use "
            "DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)."
        )
    planned = _without_shift(scheduler)
    set_timesteps = planned.set_timesteps

    def set_grid(
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: Any = None,
    ) -> None:
        asked = next((len(x) for x in (timesteps, sigmas) if x is not None), num_inference_steps)
        if asked != len(grid):
            raise InvalidArgumentError(
                f"the grid has {len(grid)} steps, but the pipeline asks for {asked}; pass "
                f"num_inference_steps={len(grid)}."
            )
        set_timesteps(device=device, **given)

    planned.set_timesteps = set_grid
    try:
        planned.set_timesteps(len(grid))
    except ValueError as error:  # from diffusers, which names the setting that is in the way
        message = f"{name} takes no list of timesteps: {error}; {_ADVICE}"
        raise InvalidArgumentError(message) from error
    _check(planned, grid, name)
    return planned


def _without_shift(scheduler: Any) -> Any:
    """A copy that takes sigmas as they are, because the grid's are shifted already."""
    shifted = {"shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False}
    config = _config(scheduler)
    changed = {key: value for key, value in shifted.items() if config.get(key, value) != value}
    if changed:
        return type(scheduler).from_config({**config, **changed})
    return copy.deepcopy(scheduler)


def _listed_timesteps(scheduler: Any, grid: TimestepGrid) -> list[int]:
    """The grid's timesteps as the scheduler lists them; many denoisers are given them over 1000."""
    trained = int(_config(scheduler).get("num_train_timesteps", 1000))
    factor = trained if max(map(abs, grid.timesteps)) <= 1 < trained else 1
    return [round(factor * t) for t in grid.timesteps]


def _check(planned: Any, grid: TimestepGrid, name: str) -> None:
    """Refuses a scheduler that places its steps elsewhere, by noise levels if they are known."""
    got: Sequence[float] | None = None
    if grid.noise_levels is not None:
        got = levels_at(planned, range(len(planned.timesteps)))
    wanted: Sequence[float] = grid.noise_levels or ()
    if got is None:
        got, wanted = planned.timesteps.tolist(), _listed_timesteps(planned, grid)
    full = max(*map(abs, wanted), *map(abs, got), 1e-9)
    far = (abs(a - b) > _TOLERANCE * full for a, b in zip(got, wanted, strict=False))
    if len(got) != len(grid) or any(far):
        raise InvalidArgumentError(
            f"{name} steps over {[round(x, 3) for x in got[:4]]}... instead of the grid's "
            f"{[round(x, 3) for x in wanted[:4]]}...; {_ADVICE}"
        )


def _config(scheduler: Any) -> Mapping[str, Any]:
    config = getattr(scheduler, "config", {})
    return config if isinstance(config, Mapping) else {}
