"""Finds the best schedule for a budget by trying: every family, measured in real runs."""

from __future__ import annotations

import inspect
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..calibration.calibrate import calibrate
from ..calibration.curves import Calibration
from ..checks import check_count, check_number
from ..errors import InvalidArgumentError, ScheduleMismatchError
from ..layers.modules import identify
from ..schedule.schedule import Schedule
from ..steps.noise_scheduler import noise_scheduler, solver_stages
from .hunt import Hunt
from .objectives import OBJECTIVES, Objective
from .processes import join_processes
from .result import SearchedSchedule
from .rollouts import Rollouts
from .space import SearchSpace

FEWEST_STEPS = 4


def search(
    model: Any,
    sample: Callable[..., Any],
    calibration: Calibration | None = None,
    *,
    speedup: float | None = None,
    compute: float | None = None,
    max_error: float | None = None,
    seconds: float | None = None,
    objective: str | Objective = "latent_l2",
    joint: bool = False,
    num_samples: int | None = None,
    num_validation: int | None = None,
    max_cost: float = 60.0,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    solvers: Mapping[str, Any] | None = None,
    proposals: Sequence[Schedule] = (),
    progress: bool = True,
) -> SearchedSchedule:
    """Finds the schedule that ends closest to the uncached run within a budget, by measuring.

    Schedules of every family (even and uneven spacings, thresholds, weighted dynamic programming)
    with every predictor, of the layers and of the whole denoiser's output, are run for real and
    compared with the uncached outputs; the best are improved by fitting how much of a predicted
    change to take in each gap, and by moving computed steps; and the winner is measured again on
    samples that the search has not seen, beside what needs no cache: plain fewer steps and, where
    ``sample`` takes a ``scheduler``, better solvers.

    Args:
        model: A diffusers pipeline or any module.
        sample: ``sample(i)`` runs generation number i and returns its final tensor (or tensors).
            If it also takes ``num_inference_steps`` (and ``scheduler``), the alternatives without
            a cache are measured, and quality is also told against the converged sample.
        calibration: What ``calibrate`` measured; measured here on the samples if None. It says
            what is reused beside the whole denoiser's output: calibrate with
            ``granularity="block"`` to search over blocks instead of layers.
        speedup: The budget: at most 1 / speedup of the uncached multiply-accumulates.
        compute: The same budget as a fraction, in (0, 1].
        max_error: Instead of a budget: the cheapest schedule whose error on unseen samples is at
            most this.
        seconds: Stop improving after so long.
        objective: "latent_l2", the relative L2 distance of the outputs; "typical_l2", its
            geometric mean over the samples of a batch, which no single sample that comes out
            differently decides; or a function of an output and its reference that gives a number,
            smaller for better.
        joint: Look for solver, number of steps and schedule together, by the distance to the
            converged sample.
        num_samples: Generations that candidates are compared on: sample(0), sample(1), ...; None
            for 2, or for 1 in a joint search, where each also needs its converged sample.
        num_validation: Further ones that only the winners are measured on; None for as many.
        max_cost: Stop improving when all that was run costs as much as so many uncached
            generations. The references and a first round of candidates are run in any case.
        seed: Of the order in which moves are tried. The same seed gives the same schedule.
        journal: A file for the results; a search that was interrupted goes on from it.
        solvers: Noise schedulers by name, for the alternatives; None for those that suit the
            pipeline's own (multistep ones of diffusers), if ``sample`` takes a ``scheduler``.
        proposals: Further schedules to try, of whatever origin, as ``plan_learned``; those beyond
            the budget are passed over. What it took to make them is not in the search's cost.
        progress: Whether to show a progress bar.

    Returns:
        The schedule, with its measured quality, and with everything else in ``result``.

    Raises:
        InvalidArgumentError: If not exactly one target is given or it makes no sense, no schedule
            meets it, ``sample`` returns nothing or something else each time, or the journal is of
            another search.
        CalibrationError: If the model cannot be calibrated.
        ScheduleMismatchError: If the calibration, or a proposal, is of another model.

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
        >>> schedule = search(model, sample, speedup=2.0, max_cost=20, progress=False)
        >>> schedule.compute <= 0.5
        True
    """
    if sum(x is not None for x in (speedup, compute, max_error)) != 1:
        raise InvalidArgumentError("give exactly one of speedup, compute and max_error.")
    budget = _budget(speedup, compute)
    if max_error is not None and check_number("max_error", max_error) < 0:
        raise InvalidArgumentError(f"max_error must not be negative, got {max_error}.")
    if seconds is not None and check_number("seconds", seconds) <= 0:
        raise InvalidArgumentError(f"seconds must be positive, got {seconds}.")
    if not callable(sample):
        raise InvalidArgumentError(f"sample must be a function, got {type(sample).__name__}.")
    measure = OBJECTIVES.get(objective) if isinstance(objective, str) else objective
    if not callable(measure):
        raise InvalidArgumentError(
            f"objective must be a function or one of {', '.join(OBJECTIVES)}, got {objective!r}."
        )
    num_samples = 2 - joint if num_samples is None else num_samples
    num_samples = check_count("num_samples", num_samples, least=1)
    num_validation = num_samples if num_validation is None else num_validation
    num_validation = check_count("num_validation", num_validation, least=1)
    check_count("seed", seed, least=0)
    if check_number("max_cost", max_cost) <= 0:
        raise InvalidArgumentError(f"max_cost must be positive, got {max_cost}.")
    takes = _keywords(sample)
    if joint and not {"num_inference_steps", "scheduler"} <= takes:
        raise InvalidArgumentError(
            "a joint search asks the sampler for other solvers and numbers of steps: sample must "
            "take the keywords num_inference_steps and scheduler"
        )
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    for name, solver in (solvers or {}).items():
        if solver_stages(solver) not in (None, 1):
            raise InvalidArgumentError(
                f"the solver {name!r} asks the model {solver_stages(solver)} times in a step, and "
                "costs are told in steps here; leave it out"
            )
    join_processes()
    spent = 0.0
    if calibration is None:
        calibration = _calibrated(model, sample, num_samples, progress)
        spent = float(num_samples)
    elif calibration.model not in (None, identify(model)):
        raise ScheduleMismatchError(
            "the calibration is of another model; calibrate this one, or leave it out"
        )
    if calibration.num_steps < FEWEST_STEPS:
        raise InvalidArgumentError(
            f"a generation of {calibration.num_steps} steps leaves nothing to plan; "
            f"{FEWEST_STEPS} are the fewest"
        )
    for proposal in proposals:
        _check_proposal(proposal, calibration)
    if solvers is None:
        solvers = _suitable_solvers(model) if "scheduler" in takes else {}
    solvers = dict(sorted(solvers.items()))
    settings = {
        "model": identify(model).fingerprint,
        "steps": calibration.num_steps,
        "objective": objective if isinstance(objective, str) else _name(objective),
        "solvers": sorted(solvers),
    }
    rollouts = Rollouts(model, sample, measure, solvers, journal, settings, spent)
    with tqdm(desc="searching", unit="rollout", disable=not progress) as bar:
        hunt = Hunt(
            SearchSpace(model, calibration, solvers),
            rollouts,
            bar,
            takes=takes,
            solvers=solvers,
            joint=joint,
            train=range(num_samples),
            unseen=range(num_samples, num_samples + num_validation),
            max_cost=max_cost,
            deadline=deadline,
            rng=random.Random(seed),
            given=proposals,
        )
        return hunt.cheapest(max_error) if max_error is not None else hunt.best_within(budget)


def _check_proposal(proposal: object, calibration: Calibration) -> None:
    """Refuses what could not run beside the search's own schedules.

    Raises:
        InvalidArgumentError: If it is no schedule of as many steps that knows its layers.
        ScheduleMismatchError: If it is for other layers, or another model.
    """
    if not isinstance(proposal, Schedule) or proposal.layers is None:
        raise InvalidArgumentError(
            f"proposals must be schedules that know their layers, got {type(proposal).__name__}; "
            "bind a published one to the layers first"
        )
    if proposal.num_steps != calibration.num_steps:
        raise InvalidArgumentError(
            f"a proposal has {proposal.num_steps} steps, but a generation {calibration.num_steps}"
        )
    proposal.bind(calibration.layers, calibration.model)


def _budget(speedup: float | None, compute: float | None) -> float:
    if speedup is not None:
        if check_number("speedup", speedup) < 1:
            raise InvalidArgumentError(f"speedup must be at least 1, got {speedup}.")
        return 1 / speedup
    if compute is not None:
        if not 0 < check_number("compute", compute) <= 1:
            raise InvalidArgumentError(f"compute must be in (0, 1], got {compute}.")
        return compute
    return 1.0


def _keywords(sample: Callable[..., Any]) -> set[str]:
    """Which of the options that a search may ask for ``sample`` takes by name."""
    try:
        parameters = inspect.signature(sample).parameters
    except (TypeError, ValueError):
        return set()
    return {"num_inference_steps", "scheduler"} & set(parameters)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _calibrated(
    model: Any, sample: Callable[..., Any], num_samples: int, progress: bool
) -> Calibration:
    return calibrate(model, sample, num_samples, max_gap=3, progress=progress)


def _suitable_solvers(model: Any) -> Mapping[str, Any]:
    scheduler = noise_scheduler(model)
    if scheduler is None or not hasattr(scheduler, "config"):
        return {}
    from ..diffusers_io.solvers import multistep_solvers  # imports diffusers

    solvers: Mapping[str, Any] = multistep_solvers(scheduler)
    return solvers
