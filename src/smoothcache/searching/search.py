"""Finds the best schedule for a budget by measuring candidates of every family in real runs."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..calibration.calibrate import calibrate
from ..calibration.curves import Calibration
from ..checks import check_number
from ..diffusers_io.solvers import suitable_solvers
from ..errors import InvalidArgumentError, ScheduleMismatchError
from ..layers.modules import identify
from ..processes import join_processes
from ..schedule.schedule import Schedule
from .options import SearchOptions, options_of
from .result import SearchedSchedule
from .rollouts import Rollouts
from .space import SearchSpace
from .stages import SearchRun

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import SearchKeywords

FEWEST_STEPS = 4


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
    2. It runs candidates of every family (even spacings, thresholds) with every predictor, on the
       layers and on the output of the whole denoiser, and compares their outputs with the
       references.
    3. It improves the best candidates: it tries uneven spacings, fits the gains on predicted
       changes, and moves computed steps.
    4. It measures the winner on samples that were not used before, beside baselines without a
       cache: fewer steps and, where ``sample`` takes a ``scheduler``, better solvers.

    Exactly one of ``speedup``, ``compute`` and ``max_error`` is the target.

    Args:
        model: A diffusers pipeline or any module.
        sample: ``sample(i)`` runs generation number i with its own fixed seed and returns the final
            tensor or tensors, of any shape and of the same shapes each time. If it also takes the
            keyword ``num_inference_steps`` (and ``scheduler``), the baselines without a cache are
            measured, and the errors to the converged sample are reported.
        calibration: Result of ``calibrate``. It determines what is reused beside the output of the
            whole denoiser: calibrate with ``granularity="block"`` to search over blocks instead of
            layers. None to calibrate on the training samples.
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
    takes_num_steps, takes_solver = _sampler_takes(sample)
    if options.joint and not (takes_num_steps and takes_solver):
        raise InvalidArgumentError(
            "a joint search changes the solver and the number of steps, so sample must take the "
            "keywords num_inference_steps and scheduler"
        )
    deadline = math.inf if options.seconds is None else time.monotonic() + options.seconds
    join_processes()
    cost_so_far = 0.0
    if calibration is None:
        num_samples = len(options.training_samples)
        calibration = calibrate(
            model,
            sample,
            num_samples,
            max_gap=3,
            trajectory=False,
            over_ranks=True,
            progress=options.progress,
        )
        cost_so_far = float(num_samples)
    _check_calibration(calibration, model, options)
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
    rollouts = Rollouts(
        model, sample, options.measure, solvers, options.journal, settings, cost_so_far
    )
    with tqdm(desc="searching", unit="rollout", disable=not options.progress) as bar:
        run = SearchRun(
            SearchSpace(model, calibration, solvers),
            rollouts,
            options,
            solvers=solvers,
            takes_num_steps=takes_num_steps,
            deadline=deadline,
            bar=bar,
        )
        return run.best_within(budget) if max_error is None else run.cheapest(max_error)


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


def _sampler_takes(sample: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether ``sample`` takes ``num_inference_steps`` and ``scheduler`` by name."""
    try:
        parameters = inspect.signature(sample).parameters
    except (TypeError, ValueError):
        return False, False
    return "num_inference_steps" in parameters, "scheduler" in parameters


def _check_calibration(calibration: Calibration, model: Any, options: SearchOptions) -> None:
    """Refuses a calibration or proposals that do not belong to the model.

    Raises:
        ScheduleMismatchError: If one is for another model.
        InvalidArgumentError: If the numbers of steps do not fit.
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
    for i, proposal in enumerate(options.proposals):
        _check_proposal(i, proposal, calibration)


def _check_proposal(i: int, proposal: Schedule, calibration: Calibration) -> None:
    if proposal.num_steps != calibration.num_steps:
        raise InvalidArgumentError(
            f"proposal {i} has {proposal.num_steps} steps, but a generation has "
            f"{calibration.num_steps}"
        )
    proposal.bind(calibration.layers, calibration.model)
