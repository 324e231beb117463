"""Calibrates, plans, searches, measures on unseen samples and enables: all of it in one call."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..calibration.calibrate import calibrate
from ..calibration.curves import Calibration
from ..checks import check_count, check_number, takes_keyword
from ..comparison.compare import fewer_steps
from ..comparison.result import mean_with_interval
from ..diffusers_io.sampler import PipelineSampler
from ..diffusers_io.solvers import suitable_solvers
from ..errors import CalibrationError, InvalidArgumentError, ScheduleMismatchError
from ..processes import rank_and_size
from ..runtime.run import enable
from ..searching.options import SearchOptions
from ..searching.plans import FITTED_ON
from ..searching.result import SearchedSchedule, SearchResult
from ..searching.search import search
from ..tracking.playback import Playback
from ..version import __version__
from .cache import CalibrationCache
from .identity import key_of
from .measure import UNCACHED, Measurement, measure
from .report import AccelerationReport

if TYPE_CHECKING:
    from ..runtime.run import Run, Store

SPEEDUP = 3.0
CALIBRATED, MEASURED = 4, 3  # generations
VALIDATED = 1  # generations, on which the search measures its winner
MAX_COST = 20.0
MAX_GAP = 3


def accelerate(
    model: Any,
    sample: Callable[..., Any] | None = None,
    *,
    prompts: Sequence[str] = (),
    class_labels: Sequence[int] = (),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    speedup: float | None = None,
    compute: float | None = None,
    num_samples: int = CALIBRATED,
    num_measured: int = MEASURED,
    max_cost: float = MAX_COST,
    cache: bool | str | os.PathLike[str] | CalibrationCache = True,
    check_finite: bool = False,
    store: Store = "device",
    verbose: bool = True,
    progress: bool = True,
) -> Run:
    """Accelerates a pipeline or a module, and says what that gained and lost.

    Calibrates on a few generations (or takes a calibration that was kept on disk), searches for the
    best schedule within the budget, plans from trajectories first, measures it on other generations
    beside the uncached run and beside fewer steps of the same cost, and enables it. If anything
    raises, nothing is left altered.

    Args:
        model: A diffusers pipeline or any module.
        sample: ``sample(i)`` runs generation number i with its own prompt and fixed seed, as for
            ``search``. If it also takes the keyword ``num_inference_steps`` (and ``scheduler``),
            fewer steps (of better solvers) are measured beside. None to run the pipeline as the
            next five arguments say.
        prompts: Texts, for a pipeline that takes a prompt: generation i takes prompt i, in turn.
        class_labels: Indices of classes, for a class-conditional pipeline, likewise.
        num_inference_steps: Solver steps; None for the pipeline's own default.
        guidance_scale: None for the pipeline's own default.
        seed: Generation i starts from the noise of seed + i.
        speedup: Budget: at most 1 / speedup of the uncached multiply-accumulates; 3 if neither
            this nor ``compute`` is given.
        compute: The same budget as a fraction, in (0, 1].
        num_samples: Generations to calibrate on, 0, 1, ...; those measured come after them.
        num_measured: Generations to measure on.
        max_cost: Limit for calibrating and searching, in uncached generations; measuring comes on
            top. The least that a search needs is run in any case.
        cache: Whether calibrations are kept on disk, or the folder for them. By default it is
            the one that ``SMOOTHCACHE_CACHE`` names, or ``smoothcache`` in the user's cache.
        check_finite: As for ``enable``.
        store: See there.
        verbose: Whether to print the report.
        progress: Whether to show progress bars.

    Returns:
        The handle of ``enable``: ``disable()`` ends the acceleration. Its ``report`` has what was
        measured.

    Raises:
        InvalidArgumentError: If an argument makes no sense, no schedule is as cheap as the budget,
            or ``sample`` returns nothing usable, or not the same when it is called again.
        CalibrationError: If the model cannot be calibrated.
        LayersNotFoundError: If the model has no layer that could be reused.
        AlreadyCachedError: If the model runs under a schedule already.

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
        ...         x = x - model(x, t, torch.tensor([0])).sample[:, :4] / num_inference_steps
        ...     return x
        >>> handle = accelerate(
        ...     model, sample, speedup=2, cache=False, verbose=False, progress=False
        ... )
        >>> handle.report.cached.compute <= 0.5
        True
        >>> handle.disable()
    """
    budget = _budget(speedup, compute)
    check_count("num_samples", num_samples, least=1)
    check_count("num_measured", num_measured, least=1)
    if check_number("max_cost", max_cost) <= 0:
        raise InvalidArgumentError(f"max_cost must be positive, got {max_cost:g}.")
    arguments = (tuple(prompts), tuple(class_labels), num_inference_steps, guidance_scale, seed)
    sampler = _sampler(model, sample, *arguments)
    _refuse_if_cached(model)
    solvers = suitable_solvers(model) if takes_keyword(sampler, "scheduler") else {}
    with _quiet(model):
        found, cost, is_cached = _searched(
            model,
            sampler,
            budget,
            num_samples=num_samples,
            max_cost=max_cost,
            cache=_cache_of(cache),
            more={"arguments": arguments[2:4]},
            solvers=solvers,
            progress=progress,
        )
        # Behind what was calibrated on, compared on, fitted to, and validated on.
        first = max(num_samples, len(SearchOptions().training_samples) + FITTED_ON) + VALIDATED
        report = _measured(
            model,
            sampler,
            found,
            range(first, first + num_measured),
            solvers=solvers,
            cost=cost,
            is_cached=is_cached,
            progress=progress,
        )
    handle = enable(model, found, check_finite=check_finite, store=store)
    handle.report = report
    if verbose and rank_and_size()[0] == 0:
        tqdm.write(str(report))
    return handle


def _budget(speedup: float | None, compute: float | None) -> float:
    """The budget as a fraction of the uncached multiply-accumulates."""
    if speedup is not None and compute is not None:
        raise InvalidArgumentError("give speedup or compute, not both.")
    if compute is not None:
        if not 0 < check_number("compute", compute) <= 1:
            raise InvalidArgumentError(f"compute must be in (0, 1], got {compute:g}.")
        return compute
    factor = SPEEDUP if speedup is None else check_number("speedup", speedup)
    if factor < 1:
        raise InvalidArgumentError(f"speedup must be at least 1, got {factor:g}.")
    return 1 / factor


def _sampler(
    model: Any,
    sample: Callable[..., Any] | None,
    prompts: tuple[str, ...],
    class_labels: tuple[int, ...],
    num_steps: int | None,
    guidance_scale: float | None,
    seed: int,
) -> Callable[..., Any]:
    """The user's function, or one that runs the pipeline as the arguments say."""
    others = (prompts, class_labels, num_steps, guidance_scale, seed)
    if sample is not None:
        if not callable(sample):
            raise InvalidArgumentError(
                f"sample must be a function of the sample's number, got {type(sample).__name__}; "
                "prompts are given as prompts=[...]"
            )
        if others != ((), (), None, None, 0):
            raise InvalidArgumentError(
                "sample says itself what it runs; leave out prompts, class_labels, "
                "num_inference_steps, guidance_scale and seed, or leave out sample"
            )
        return sample
    if not hasattr(model, "components") or not callable(model):
        raise InvalidArgumentError(
            f"{type(model).__name__} is no pipeline of diffusers; give a function sample(i) that "
            "runs generation number i and returns its tensor"
        )
    return PipelineSampler(model, *others).sample


def _refuse_if_cached(model: Any) -> None:
    """Refuses a model that runs under a schedule, before a generation is run."""
    Playback(model).run(lambda: None, lambda place, run: run())


def _cache_of(cache: object) -> CalibrationCache | None:
    if cache is True:
        return CalibrationCache()
    if cache is False:
        return None
    if isinstance(cache, CalibrationCache):
        return cache
    if isinstance(cache, str | os.PathLike):
        return CalibrationCache(cache)
    raise InvalidArgumentError(
        f"cache must be True, False or a folder, got {type(cache).__name__}."
    )


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """Turns off a pipeline's own progress bars, and then has them as they were."""
    configure = getattr(model, "set_progress_bar_config", None)
    if configure is None:
        yield
        return
    name = "_progress_bar_config"
    before = vars(model).get(name)
    configure(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            vars(model).pop(name, None)
        else:
            setattr(model, name, before)


def _searched(
    model: Any,
    sample: Callable[..., Any],
    budget: float,
    *,
    num_samples: int,
    max_cost: float,
    cache: CalibrationCache | None,
    more: dict[str, Any],
    solvers: Mapping[str, Any],
    progress: bool,
) -> tuple[SearchedSchedule, float, bool]:
    """The best schedule, what it took to find it, and whether its calibration was on disk."""
    settings = {**more, "gap": MAX_GAP, "smoothcache": __version__}
    key = None if cache is None else key_of(model, sample, range(num_samples), settings)
    calibration = None if cache is None or key is None else cache.load(key)

    def searched(calibration: Calibration, spent: float) -> tuple[SearchedSchedule, float]:
        found = search(
            model,
            sample,
            calibration,
            compute=budget,
            max_cost=max(max_cost - spent, 1.0),
            num_validation=VALIDATED,
            solvers=solvers,
            progress=progress,
        )
        return found, spent + _result(found).cost

    if calibration is not None:
        try:
            return *searched(calibration, 0.0), True
        except (CalibrationError, ScheduleMismatchError):
            pass  # it is of another sampler after all, or the model is at fault, which shows again
    calibration = calibrate(
        model,
        sample,
        num_samples,
        max_gap=MAX_GAP,
        trajectory=True,
        progress=progress,
    )
    if cache is not None and key is not None:
        cache.save(key, calibration)
    return *searched(calibration, float(num_samples)), False


def _result(found: SearchedSchedule) -> SearchResult:
    if found.result is None:
        raise InvalidArgumentError("the search returned no result.")
    return found.result


def _measured(
    model: Any,
    sample: Callable[..., Any],
    found: SearchedSchedule,
    numbers: range,
    *,
    solvers: Mapping[str, Any],
    cost: float,
    is_cached: bool,
    progress: bool,
) -> AccelerationReport:
    """Measures a schedule beside the uncached run and fewer steps, on unseen samples."""
    result = _result(found)
    own = Measurement(result.best.name, sample, found)
    uncached = Measurement(UNCACHED, sample)
    takes_steps = takes_keyword(sample, "num_inference_steps")
    others = _alternatives(sample, found, result, solvers) if takes_steps else []
    ways = [uncached, own, *others]
    runs = len(numbers) + (len(numbers) == 1)
    with tqdm(total=len(ways) * runs, desc="measuring", unit="run", disable=not progress) as bar:
        measure(model, ways, numbers, bar.update)
    cached, *alternatives = (way.against(uncached) for way in (own, *others))
    gain = low = high = math.nan
    if others:
        rival = max(others, key=lambda way: way.against(uncached).psnr)
        gains = torch.cat(own.decibels) - torch.cat(rival.decibels)
        gain, low, high = mean_with_interval(gains)
    computes = (1.0, cached.compute, *(way.compute for way in alternatives))
    return AccelerationReport(
        cached=cached,
        alternatives=tuple(alternatives),
        seconds=statistics.median(uncached.seconds),
        num_samples=len(numbers),
        gain=gain,
        gain_low=low,
        gain_high=high,
        cost=cost + runs * sum(computes),
        is_calibration_cached=is_cached,
        notes=_notes(found),
    )


def _notes(found: SearchedSchedule) -> tuple[str, ...]:
    """What the user may want to change."""
    why = found.provenance.get("calibration no_trajectories")
    return () if why is None else (f"nothing was planned from trajectories: {why}",)


def _alternatives(
    sample: Callable[..., Any],
    found: SearchedSchedule,
    result: SearchResult,
    solvers: Mapping[str, Any],
) -> list[Measurement]:
    """Fewer steps of the same cost: of the sampler's own solver, and of the best other one."""
    count = fewer_steps(1.0 if found.compute is None else found.compute, found.num_steps)
    ways = [Measurement(f"{count} steps", partial(sample, num_inference_steps=count))]
    others = [way for way in result.baselines if way.solver in solvers]
    if others:
        name = min(others, key=lambda way: way.error).solver or ""
        options = {"num_inference_steps": count, "scheduler": solvers[name]}
        ways.append(Measurement(f"{count} steps of {name}", partial(sample, **options)))
    return ways
