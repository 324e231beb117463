"""Finds the best schedule for a budget by measuring candidates of every family in real runs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..calibration.calibrate import calibrate
from ..calibration.curves import Calibration
from ..checks import check_number, takes_keyword
from ..diffusers_io.solvers import suitable_solvers
from ..errors import (
    CalibrationError,
    InvalidArgumentError,
    ScheduleMismatchError,
    SmoothCacheWarning,
)
from ..layers.modules import identify
from ..model.target import Target
from ..processes import join_processes, rank_and_size
from ..schedule.schedule import Schedule
from .gains import Trajectory
from .options import SearchOptions, options_of
from .plans import FITTED_ON, TrajectoryPlans, is_recorded
from .result import SearchedSchedule
from .rollouts import Rollouts
from .space import SearchSpace
from .stages import SearchRun

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import SearchKeywords

FEWEST_STEPS = 4
MAX_COST, MAX_COST_WITHOUT_PLANS = 20.0, 60.0


def search(
    model: Any,
    sample: Callable[..., Any],
    calibration: Calibration | None = None,
    *,
    speedup: float | None = None,
    compute: float | None = None,
    max_error: float | None = None,
    options: SearchOptions | None = None,
    **keywords: Unpack[SearchKeywords],
) -> SearchedSchedule:
    """Find the schedule that ends closest to the uncached run within a budget, by measuring.

    The search works in stages:

    1. It samples the references: the uncached outputs and, where ``sample`` can take more steps,
       the converged outputs.
    2. Where the calibration has trajectories, it plans the computed steps from them and fits the
       weights of the reused outputs, on samples that nothing else uses.
    3. It runs candidates of every family (every n-th step, thresholds) with every predictor, on the
       layers and on the output of the whole denoiser, beside the fitted plans, and compares their
       outputs with the references. What it returns is no worse on these samples than any of them.
    4. It improves the best candidates: it tries further plans and fits them to more samples, or
       moves computed steps. Without trajectories, it also tries uneven spacings and fits the gains
       on predicted changes.
    5. It measures the winner on samples that were not used before, beside baselines without a
       cache: fewer steps and, where ``sample`` takes a ``scheduler``, better solvers.

    Exactly one of ``speedup``, ``compute`` and ``max_error`` is the target.

    Args:
        model: A diffusers pipeline or any module.
        sample: ``sample(i)`` runs generation number i with its own fixed seed and returns the final
            tensor or tensors, of any shape and of the same shapes each time. If it also takes the
            keyword ``num_inference_steps`` (and ``scheduler``), the baselines without a cache are
            measured. The errors to the converged sample are reported, too; where there are
            trajectories, only if sampling it takes no more than half of ``max_cost``.
        calibration: Result of ``calibrate``. It determines what is reused beside the output of the
            whole denoiser: calibrate with ``granularity="block"`` to search over blocks instead of
            layers. Its trajectories are used if they are of these samples (the same prompts,
            seeds, noise scheduler); otherwise some are recorded. None to calibrate on the training
            samples, with trajectories if ``model`` is a pipeline.
        speedup: Budget: at most 1 / speedup of the uncached multiply-accumulates. At least 1.
        compute: The same budget as a fraction of the uncached multiply-accumulates, in (0, 1].
        max_error: Instead of a budget, the largest error on the validation samples, in units of
            the objective (dimensionless for "latent_l2"); the cheapest schedule is returned.
        options: Further settings; None for the defaults.
        **keywords: Fields of ``SearchOptions``, such as ``max_cost=30`` or ``joint=True``.

    Returns:
        The schedule with its measured quality. ``result`` holds the baselines, the Pareto front,
        the cost of the search, and a verdict on whether the cache pays off.

    Raises:
        InvalidArgumentError: If not exactly one target is given, an argument is not as described
            or given twice, no schedule meets the target, ``sample`` returns nothing usable or
            different results for the same i, or the journal is of another search.
        CalibrationError: If the model cannot be calibrated.
        ScheduleMismatchError: If the calibration or a proposal is for another model.

    Example:
        >>> import torch
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(
        ...     num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
        ...     sample_size=8,
        ... ).eval().requires_grad_(False)
        >>> def sample(i, num_inference_steps=8):
        ...     x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        ...     for step in range(num_inference_steps):
        ...         t = torch.tensor([1000 - 1000 * step // num_inference_steps])
        ...         x = x - model(x, t, torch.tensor([0])).sample / num_inference_steps
        ...     return x
        >>> options = SearchOptions(max_cost=20, progress=False)
        >>> schedule = search(model, sample, speedup=2.0, options=options)
        >>> schedule.compute <= 0.5
        True
    """
    if sum(x is not None for x in (speedup, compute, max_error)) != 1:
        raise InvalidArgumentError("give exactly one of speedup, compute and max_error.")
    budget = _budget(speedup, compute)
    if max_error is not None and check_number("max_error", max_error) < 0:
        raise InvalidArgumentError(f"max_error must not be negative, got {max_error}.")
    options = options_of(options, keywords)
    if not callable(sample):
        raise InvalidArgumentError(f"sample must be a function, got {type(sample).__name__}.")
    takes_num_steps = takes_keyword(sample, "num_inference_steps")
    takes_solver = takes_keyword(sample, "scheduler")
    if options.joint and not (takes_num_steps and takes_solver):
        raise InvalidArgumentError(
            "a joint search changes the solver and the number of steps, so sample must take the "
            "keywords num_inference_steps and scheduler"
        )
    model = Target.of(model)
    deadline = math.inf if options.seconds is None else time.monotonic() + options.seconds
    join_processes()
    cost_so_far, known = 0.0, dict[int, Any]()
    if calibration is None:
        calibration, known = _calibrated(model, sample, options)
        cost_so_far = float(len(options.training_samples))
    _check_calibration(calibration, model)
    solvers = options.solvers
    if solvers is None:
        solvers = suitable_solvers(model) if takes_solver else {}
    settings = {
        "model": identify(model).fingerprint,
        "steps": calibration.num_steps,
        "objective": options.objective_name,
        "solvers": sorted(solvers),
    }
    solvers = dict(sorted(solvers.items())) if takes_solver else {}
    space = SearchSpace(model, calibration, solvers)
    for i, proposal in enumerate(options.proposals):
        _check_proposal(i, proposal, space)
    rollouts = Rollouts(
        model, sample, options.measure, solvers, options.journal, settings, cost_so_far
    )
    has_plans = calibration.trajectories is not None and not options.joint
    max_cost = options.max_cost
    if max_cost is None:
        max_cost = MAX_COST if has_plans and max_error is None else MAX_COST_WITHOUT_PLANS

    def plans(is_of_samples: bool) -> TrajectoryPlans | None:
        return _plans(model, sample, calibration, rollouts, options, is_of_samples)

    def first_is_recorded(trajectory: Trajectory | None) -> bool:
        return is_recorded(trajectory, calibration, options.training_samples[0])

    with tqdm(desc="searching", unit="rollout", disable=not options.progress) as bar:
        run = SearchRun(
            space,
            rollouts,
            options,
            solvers=solvers,
            max_cost=max_cost,
            takes_num_steps=takes_num_steps,
            known=known,
            plans=plans if has_plans else lambda is_of_samples: None,
            is_recorded=first_is_recorded if calibration.trajectories is not None else None,
            deadline=deadline,
            bar=bar,
        )
        return run.best_within(budget) if max_error is None else run.cheapest(max_error)


def _calibrated(
    model: Any, sample: Callable[..., Any], options: SearchOptions
) -> tuple[Calibration, dict[int, Any]]:
    """A calibration on the training samples, and what these returned if they repeat themselves."""
    known: dict[int, Any] = {}

    def remembered(i: int) -> Any:
        output = sample(i)
        known.setdefault(i, output)
        return output

    calibration = calibrate(
        model,
        remembered,
        len(options.training_samples),
        max_gap=3,
        over_ranks=True,
        progress=options.progress,
    )
    are_all_here = calibration.trajectories is not None and rank_and_size()[1] == 1
    return calibration, known if are_all_here else {}


def _plans(
    model: Any,
    sample: Callable[[int], Any],
    calibration: Calibration,
    rollouts: Rollouts,
    options: SearchOptions,
    is_of_samples: bool,
) -> TrajectoryPlans | None:
    """Plans from trajectories; None, with a warning, if those of the samples cannot be recorded."""
    first = len(options.training_samples)
    known = calibration.trajectories
    recorded = known.num_samples if known is not None and is_of_samples else 0
    plans = TrajectoryPlans(
        model,
        sample,
        calibration,
        rollouts,
        numbers=range(first, first + FITTED_ON),
        more=range(first + FITTED_ON, recorded),
        is_of_samples=is_of_samples,
    )
    try:
        plans.prepare()
    except CalibrationError as error:
        warnings.warn(
            f"the search goes on without plans from trajectories: {error}",
            SmoothCacheWarning,
            stacklevel=5,
        )
        return None
    return plans


def _budget(speedup: float | None, compute: float | None) -> float:
    """The budget as a fraction of the uncached MACs; 1 if there is none."""
    if speedup is not None:
        if check_number("speedup", speedup) < 1:
            raise InvalidArgumentError(f"speedup must be at least 1, got {speedup}.")
        return 1 / speedup
    if compute is not None:
        if not 0 < check_number("compute", compute) <= 1:
            raise InvalidArgumentError(f"compute must be in (0, 1], got {compute}.")
        return compute
    return 1.0


def _check_calibration(calibration: Calibration, model: Any) -> None:
    """Refuses a calibration that does not belong to the model.

    Raises:
        ScheduleMismatchError: If it is for another model.
        InvalidArgumentError: If it has too few steps.
    """
    if calibration.model not in (None, identify(model)):
        raise ScheduleMismatchError(
            "the calibration is of another model; calibrate this one, or leave it out"
        )
    if calibration.num_steps < FEWEST_STEPS:
        raise InvalidArgumentError(
            f"a generation of {calibration.num_steps} steps is too short to search for a "
            f"schedule; it takes at least {FEWEST_STEPS}"
        )


def _check_proposal(i: int, proposal: Schedule, space: SearchSpace) -> None:
    """Refuses a proposal for another model or another number of steps."""
    if proposal.num_steps != space.num_steps:
        raise InvalidArgumentError(
            f"proposal {i} has {proposal.num_steps} steps, but a generation has {space.num_steps}"
        )
    space.bind(proposal)
