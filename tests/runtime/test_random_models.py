"""The invariants over random architectures; SMOOTHCACHE_EXAMPLES sets how many (default 12)."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.random_models import Plan, RandomModel, model_of, plans
from support.reference import same, sample
from torch import nn

import smoothcache as sc

EXAMPLES = int(os.environ.get("SMOOTHCACHE_EXAMPLES", "12"))
STEPS = 5


@contextmanager
def counted(model: nn.Module, paths: Any) -> Iterator[Counter[str]]:
    """How often each module really ran, by its first projection."""
    runs: Counter[str] = Counter()
    hooks = [
        next(
            x for x in model.get_submodule(path).modules() if isinstance(x, nn.Linear)
        ).register_forward_hook(
            lambda *_, path=path: runs.update([path])  # type: ignore[misc]
        )
        for path in paths
    ]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


def state(model: nn.Module) -> dict[str, Any]:
    """Class and attributes of every module, containers by what they hold."""
    return {
        path: (
            type(module),
            {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()},
        )
        for path, module in model.named_modules()
    }


def schedules(model: RandomModel, granularity: Any, interval: int) -> sc.Schedule | None:
    try:
        return sc.Schedule.uniform(model, STEPS, interval, granularity=granularity)
    except sc.LayersNotFoundError:
        assert granularity not in ("auto", "model"), "there is always something to reuse"
        return None


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 12,
    phases=[Phase.explicit, Phase.generate],  # plans are small, and shrinking takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(
    plan=plans,
    granularity=st.sampled_from(["auto", "block", "model"]),
    interval=st.integers(2, STEPS),
    calls=st.integers(1, 2),
)
def test_the_invariants_hold(plan: Plan, granularity: Any, interval: int, calls: int) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model_of(plan), granularity, interval, calls)


def check(model: RandomModel, granularity: Any, interval: int, calls: int) -> None:
    plain, found = sample(model, STEPS, calls=calls), state(model)
    everything = schedules(model, granularity, 1)
    schedule = schedules(model, granularity, interval)
    if everything is None or schedule is None:
        return
    with sc.cached(model, everything) as run:
        assert same(sample(model, STEPS, calls=calls), plain)
    assert run.summary().reused == 0 and run.summary().peak_bytes == 0

    with counted(model, schedule.rows) as per_generation:
        sample(model, STEPS, calls=calls)
    with counted(model, schedule.rows) as runs, sc.cached(model, schedule) as run:
        first = sample(model, STEPS, calls=calls)
        once = Counter(runs)
        assert same(sample(model, STEPS, calls=calls), first)
        other = sample(model, STEPS, seed=1, batch=2, tokens=8, calls=calls)
        sample(model, STEPS, calls=calls, timesteps=[1000, 800, 600])
        run.reset()
        assert same(sample(model, STEPS, calls=calls), first)
    for path, row in schedule.rows.items():
        expected = per_generation[path] * row.computed.count(True) / STEPS
        assert once[path] == expected, (path, once[path], expected)
    assert not run.summary().recomputed
    with sc.cached(model, schedule):
        assert same(sample(model, STEPS, seed=1, batch=2, tokens=8, calls=calls), other)

    after = state(model)
    assert after.keys() == found.keys()
    for path, (kind, attributes) in found.items():
        assert after[path][0] is kind, path
        assert after[path][1].keys() == attributes.keys(), path
        for name, value in attributes.items():
            now = after[path][1][name]
            assert now is value or isinstance(value, dict | bool | int), (path, name)
            if isinstance(value, dict):
                assert list(now) == list(value)
                assert all(now[key] is value[key] for key in value), (path, name)
    assert same(sample(model, STEPS, calls=calls), plain)
