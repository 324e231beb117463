"""A sampler for toys, searches over them, and what their schedules really cost and change."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from support.toys import CLASSES, TOKENS, WIDTH, Toy, build
from torch import Tensor

import smoothcache as sc
from smoothcache.model.costs import MacCounter

STEPS = 8


class Adams:
    """A solver of second order; as ``Euler``, it asks the model once in a step."""


class Euler:
    """The sampler's own solver under another name."""


class Sampler:
    """Samples with a toy, as far as each method lets a search choose, and notes every call."""

    def __init__(self, toy: Toy, num_steps: int = STEPS, branches: int = 1) -> None:
        self.toy, self.num_steps, self.branches = toy, num_steps, branches
        self.calls: list[tuple[int, int]] = []
        self.stop_after: int | None = None

    def alone(self, i: int) -> Tensor:
        return self._run(i, None, None)

    def stepped(self, i: int, num_inference_steps: int | None = None) -> Tensor:
        return self._run(i, num_inference_steps, None)

    def full(self, i: int, num_inference_steps: int | None = None, scheduler: Any = None) -> Tensor:
        return self._run(i, num_inference_steps, scheduler)

    def shaken(self, i: int, num_inference_steps: int | None = None) -> Tensor:
        """Gives the model one of four very different inputs in turn, which a cache cannot know."""
        return self._run(i, num_inference_steps, None, shake=3.0)

    def _run(self, i: int, num_steps: int | None, scheduler: Any, shake: float = 0.0) -> Tensor:
        num_steps = num_steps or self.num_steps
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((i, num_steps))
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(1, TOKENS, WIDTH, generator=generator)
        shakes = shake * torch.randn(4, TOKENS, WIDTH, generator=generator)
        before = None
        for step in range(num_steps):
            t = torch.tensor([1000 * (1 - step / num_steps)])
            given = x + shakes[step % 4]
            outputs = [
                self.toy.denoise(given, t, torch.tensor([(i + branch) % CLASSES]))
                for branch in range(self.branches)
            ]
            output = slope = sum(outputs) / self.branches
            if isinstance(scheduler, Adams) and before is not None:
                slope = 1.5 * output - 0.5 * before
            x, before = x - slope / num_steps, output
        return x


SOLVERS = {"adams": Adams(), "euler": Euler()}


def state_of(model: Any) -> list[Any]:
    toys = [model] if isinstance(model, Toy) else model.components.values()
    modules = [module for toy in toys for module in toy.modules()]
    return [
        (type(x), sorted(vars(x)), len(x._forward_hooks), len(x._forward_pre_hooks))
        for x in modules
    ]


def search(
    model: Any, sample: Any, *args: Any, max_cost: float | None = 25.0, **options: Any
) -> sc.SearchedSchedule:
    """A search that may spend a little; None stands for the limit of its own."""
    return sc.search(model, sample, *args, max_cost=max_cost, progress=False, **options)


@cache
def calibrated(toy_name: str = "single", num_steps: int = STEPS) -> sc.Calibration:
    toy = build(toy_name, depth=2)
    return sc.calibrate(toy, Sampler(toy, num_steps).alone, 2, progress=False)


@cache
def found(way: str, **options: Any) -> tuple[sc.SearchedSchedule, list[tuple[int, int]]]:
    """What a search finds for the toy, and the calls that it made."""
    toy = build("single", depth=2)
    sampler = Sampler(toy)
    return search(toy, getattr(sampler, way), **options), sampler.calls


def result_of(schedule: sc.SearchedSchedule) -> sc.SearchResult:
    assert schedule.result is not None
    return schedule.result


def distance(output: Tensor, reference: Tensor) -> float:
    return float((output.double() - reference.double()).norm() / reference.double().norm())


def errors_of(
    model: Any,
    sample: Callable[[int], Tensor],
    schedule: sc.Schedule,
    samples: range,
    references: list[Tensor] | None = None,
) -> list[float]:
    """The error of each sample, run by hand."""
    references = references or [sample(i) for i in samples]
    errors = []
    for i, reference in zip(samples, references, strict=True):
        with sc.cached(model, schedule) as run:
            output = sample(i)
        assert run.summary().recomputed == {}
        errors.append(distance(output, reference))
    return errors


def error_of(*arguments: Any) -> float:
    """The mean over the samples."""
    return float(np.mean(errors_of(*arguments)))


def macs_of(run: Callable[[], Any]) -> int:
    with MacCounter() as counter:
        run()
    return counter.total


def real_compute(
    model: Any, sample: Callable[[int], Any], schedule: sc.Schedule, **options: Any
) -> float:
    """MACs of a run under a schedule, with these options, over those of an uncached one."""
    with sc.cached(model, schedule) as run:
        macs = macs_of(lambda: sample(0, **options))
    assert run.summary().recomputed == {} and run.summary().never_ran == ()
    return macs / macs_of(lambda: sample(0))


def same(a: sc.SearchedSchedule, b: sc.SearchedSchedule) -> bool:
    """Whether two searches came to the same in every way."""
    ours, theirs = result_of(a), result_of(b)
    return (
        a == b
        and str(ours) == str(theirs)
        and (ours.best, ours.baselines, ours.front) == (theirs.best, theirs.baselines, theirs.front)
        and (ours.rollouts, ours.cost) == (theirs.rollouts, theirs.cost)
    )


def two_denoisers() -> tuple[Any, Callable[[int], Tensor]]:
    """A pipeline of which each half of the steps has a denoiser of its own."""
    toys = [build("single", seed, depth=2) for seed in range(2)]
    pipe = SimpleNamespace(components={"transformer": toys[0], "transformer_2": toys[1]})

    def sample(i: int) -> Tensor:
        x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(i))
        for step in range(STEPS):
            t = torch.tensor([1000 * (1 - step / STEPS)])
            x = x - toys[step >= STEPS // 2](x, t, torch.tensor([i % CLASSES])) / STEPS
        return x

    return pipe, sample


@cache
def uniform_runs(toy_name: str, num_steps: int) -> list[tuple[float, list[float]]]:
    """Compute, and error on each sample of a search, seen and unseen, of every uniform schedule."""
    toy = build(toy_name, depth=2)
    sample = Sampler(toy, num_steps).alone
    references = [sample(i) for i in range(4)]
    runs = []
    for granularity in ("auto", "model"):
        for interval in range(1, num_steps + 1):
            compute = None
            for predictor in (name for name, x in sc.PREDICTORS.items() if x.axis == "step"):
                schedule = sc.Schedule.uniform(
                    toy, num_steps, interval, predictor=predictor, granularity=granularity
                )
                compute = compute or real_compute(toy, sample, schedule)
                errors = errors_of(toy, sample, schedule, range(4), references)
                runs.append((compute, errors))
    return runs
