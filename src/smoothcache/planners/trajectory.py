"""Chooses the steps to compute by dynamic programming over the resulting state errors.

Between two computed steps, the denoiser's outputs are replaced by combinations of the last computed
outputs. The effect of a segment j < t < l on the state at its end is

    r(j, l) = sum_{j < t < l} h[t, l] e_t

and its cost is the squared residual after the best combination of the last computed outputs:

    cost(h, i, j, l) = min_a || r(j, l) - a_0 e_j - a_1 e_i - a_2 e_h ||^2

summed over all samples. Costs follow from the inner products of the e_t, independent of the model
and of the size of its output. For a fixed number of computed steps, dynamic programming minimises
the sum of costs exactly; its state is the last two (or three) computed steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np

from ..calibration.curves import Calibration
from ..calibration.trajectory import Trajectories
from ..checks import check_count, check_number
from ..errors import InvalidArgumentError
from ..layers.layer import CacheLayer
from ..schedule.row import Row
from ..schedule.schedule import Schedule
from ._assemble import assemble
from .open_loop import open_loop_weights
from .segments import Aim, Segments, relative_error
from .step_choice import choose_steps

MAX_LAG = 3
NOISE, EARLY_WEIGHT = 5e-5, 3.0


def plan_trajectory(
    calibration: Calibration,
    *,
    speedup: float | None = None,
    compute: float | None = None,
    steps_computed: int | None = None,
    max_lag: int = MAX_LAG,
    memory: int = 2,
    noise: float = NOISE,
    early_weight: float = EARLY_WEIGHT,
    target: Aim = "uncached",
) -> Schedule:
    """Plans from recorded trajectories which steps run the denoiser and how the others reuse it.

    The model does not run. The whole denoiser's output is reused, so a reused step has almost no
    cost and ``max_lag`` outputs are kept. The weights minimise the distance between combinations of
    *uncached* outputs and the uncached states; ``fit`` refines them in closed loop.

    Args:
        calibration: Calibration with trajectories, as ``calibrate`` records them.
        speedup: Ratio of all steps to computed steps. Exactly one of ``speedup``, ``compute`` and
            ``steps_computed`` is required.
        compute: Largest fraction of computed steps, in (0, 1].
        steps_computed: Exact number of computed steps.
        max_lag: Number of last computed outputs that a reuse combines.
        memory: Number of last computed steps in the state of the dynamic program, 2 or 3.
        noise: Expected mean squared deviation of the run's computed outputs from uncached outputs,
            relative to their mean square. Larger values favour choices with small weights.
        early_weight: Weight of an error in the first state relative to the last. Early errors
            propagate through later steps, by an amount that differs between models.

        target: States that the plan comes close to: those of the "uncached" run, or of the
            "converged" one, which ``calibrate(converged_steps=...)`` records. Fit with the same
            target.

    Returns:
        A schedule of granularity "model" with fitted weights.

    Raises:
        InvalidArgumentError: If the calibration has no trajectories, or an argument is invalid.

    Source: ours; arXiv 2602.22654 also chooses steps by dynamic programming.

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
        >>> plan_trajectory(calibration, speedup=2).compute
        0.5
    """
    trajectories = trajectories_of(calibration)
    max_lag = check_count("max_lag", max_lag, least=1)
    if memory not in (2, 3):
        raise InvalidArgumentError(f"memory must be 2 or 3, got {memory!r}.")
    if check_number("early_weight", early_weight) <= 0:
        raise InvalidArgumentError(f"early_weight must be positive, got {early_weight:g}.")
    if check_number("noise", noise) < 0:
        raise InvalidArgumentError(f"noise must not be negative, got {noise:g}.")
    count = steps_to_compute(trajectories, speedup, compute, steps_computed)
    if target not in get_args(Aim):
        raise InvalidArgumentError(f"target must be 'uncached' or 'converged', got {target!r}.")
    segments = Segments.of(trajectories, early_weight, target)
    chosen, cost = choose_steps(segments, count, memory=memory, noise=noise)
    steps = trajectories.num_steps
    computed = tuple(step in chosen for step in range(steps))
    weights = open_loop_weights(segments, chosen, max_lag)
    settings = {
        "planner": "trajectory",
        "steps_computed": count,
        "max_lag": max_lag,
        "memory": memory,
        "noise": f"{noise:g}",
        "early_weight": f"{early_weight:g}",
        "target": target,
        "weights": "open loop",
        "expected_state_error": f"{relative_error(segments, cost):.3g}",
    }
    return whole_model_schedule(calibration, computed, weights, settings)


def trajectories_of(calibration: Calibration) -> Trajectories:
    """Returns the trajectories of a calibration.

    Raises:
        InvalidArgumentError: If it has none.
    """
    if not isinstance(calibration, Calibration):
        raise InvalidArgumentError(
            f"expected a Calibration, got {type(calibration).__name__}; calibrate the model first"
        )
    if calibration.trajectories is None:
        why = calibration.provenance.get("no_trajectories", "")
        raise InvalidArgumentError(
            "the calibration has no trajectories, which planning requires"
            + (f" ({why})" if why else "")
            + "; calibrate with trajectory=True."
        )
    return calibration.trajectories


def steps_to_compute(
    trajectories: Trajectories,
    speedup: float | None,
    compute: float | None,
    steps_computed: int | None,
) -> int:
    """Returns the number of computed steps within a budget.

    Raises:
        InvalidArgumentError: If not exactly one budget is given, or it is invalid.
    """
    given = [x for x in (speedup, compute, steps_computed) if x is not None]
    if len(given) != 1:
        raise InvalidArgumentError("pass exactly one of speedup, compute and steps_computed.")
    steps, least = trajectories.num_steps, len(trajectories.first_steps())
    if steps_computed is not None:
        count = check_count("steps_computed", steps_computed, least=1)
    elif compute is not None:
        fraction = check_number("compute", compute)
        if not 0 < fraction <= 1:
            raise InvalidArgumentError(f"compute must be in (0, 1], got {fraction:g}.")
        count = int(steps * fraction + 1e-9)
    else:
        factor = check_number("speedup", speedup)
        if factor < 1:
            raise InvalidArgumentError(f"speedup must be at least 1, got {factor:g}.")
        count = int(steps / factor + 1e-9)
    if not least <= count <= steps:
        raise InvalidArgumentError(
            f"the budget allows computing {count} of {steps} steps, expected {least} to {steps}."
        )
    return count


def whole_model_schedule(
    calibration: Calibration,
    computed: Sequence[bool],
    weights: Sequence[Sequence[float]],
    settings: dict[str, object],
    branch_weights: Sequence[Sequence[Sequence[float]]] = (),
) -> Schedule:
    """Returns a schedule that reuses the whole denoiser's output with these weights.

    Args:
        calibration: Calibration with trajectories.
        computed: Whether each step is computed.
        weights: Weights of the last computed outputs at every step, the newest first; empty at
            computed steps.
        settings: Settings for the provenance.
        branch_weights: Weights of further guidance branches, if branches have separate weights.
    """
    trajectories = trajectories_of(calibration)
    names = tuple(dict.fromkeys(trajectories.denoisers))
    steps = trajectories.num_steps
    layers, rows = [], {}
    errors = np.full((1, len(names), 1, steps), np.nan)
    for number, name in enumerate(names):
        run = [t for t in range(steps) if trajectories.denoisers[t] == name]
        errors[0, number, 0, run[1:]] = 0.0
        layers.append(
            CacheLayer(
                name,
                kind="model",
                block=name,
                macs=calibration.total_macs or None,
                nbytes=trajectories.output_bytes or None,
            )
        )
        runs = [trajectories.denoisers[t] == name for t in range(steps)]
        flags = tuple(x or not is_run for x, is_run in zip(computed, runs, strict=True))
        tables = [
            tuple(tuple(w) if not flag else () for w, flag in zip(table, flags, strict=True))
            for table in (weights, *branch_weights)
        ]
        parts = trajectories.responses.guidance.parts if branch_weights else 1
        if all(flags):
            rows[name] = Row(flags)
        else:
            rows[name] = Row(
                flags,
                "fitted",
                weights=tables[0],
                branch_weights=tuple(tables[1:]),
                batch_parts=parts,
            )
    whole = replace(
        calibration, layers=tuple(layers), errors=errors, trajectories=None, tokens=None
    )
    return assemble(whole, rows, settings)
