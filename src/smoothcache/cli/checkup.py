"""Whether a pipeline can be run under a schedule: tried with two steps, one check after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.observe import observe_layers
from ..diffusers_io.sampler import PipelineSampler
from ..errors import SmoothCacheError
from ..layers.layer import CacheLayer
from ..model.target import Target
from ..runtime.run import cached
from ..schedule.schedule import Schedule

STEPS = 2
FINE, BROKEN, ASIDE = "ok", "failed", "note"


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: What.
        state: "ok", "failed", or "note" for what was not tried or needs nothing.
        text: What was found.
    """

    name: str
    state: str
    text: str


def examine(pipeline: Any, sampler: PipelineSampler, *, compiling: bool = True) -> list[Check]:
    """Tries a pipeline: plain, watched, under schedules, compiled.

    Args:
        pipeline: What is examined; left as it was.
        sampler: Runs it with two steps.
        compiling: Whether to let torch.compile trace the denoiser too.

    Returns:
        The checks, in the order in which they were made; after one that failed come none that
        need it.
    """
    checks = [Check("pipeline", FINE, _named(pipeline))]
    plain = _tried(lambda: _timed(sampler), "two steps", checks)
    if plain is None:
        return checks
    samples, seconds, calls = plain
    checks.append(Check("two steps", FINE, f"{seconds:.2f} s, {_shape(samples)}"))
    layers = _tried(lambda: observe_layers(pipeline, sampler), "layers", checks)
    if layers is None:
        return checks
    checks.append(Check("layers", FINE, _kinds(layers)))
    everything, half = (
        Schedule.uniform(pipeline, STEPS, interval, layers=layers) for interval in (1, 2)
    )
    same = _tried(lambda: _under(pipeline, everything, sampler), "exactness", checks)
    if same is None:
        return checks
    checks.append(_exactness(same[0], samples, sampler))
    run = _tried(lambda: _under(pipeline, half, sampler), "reuse", checks)
    if run is None:
        return checks
    checks += [_reuse(run[1]), _guidance(pipeline, sampler, calls, run[1])]
    checks.append(_compiled(pipeline, half, sampler) if compiling else _not_compiled())
    checks.append(_offloading(pipeline))
    return checks


def is_fine(checks: list[Check]) -> bool:
    """Whether nothing failed."""
    return all(check.state != BROKEN for check in checks)


def _tried(action: Callable[[], Any], name: str, checks: list[Check]) -> Any:
    """What an action gives; None if it fails, and then the check is noted."""
    try:
        return action()
    except Exception as error:  # a pipeline can fail in any way
        told = str(error) if isinstance(error, SmoothCacheError) else _first_line(error)
        checks.append(Check(name, BROKEN, told))
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _named(pipeline: Any) -> str:
    denoisers = [type(module).__name__ for module in Target.of(pipeline).denoisers.values()]
    scheduler = type(getattr(pipeline, "scheduler", None)).__name__
    device, dtype = getattr(pipeline, "device", "cpu"), getattr(pipeline, "dtype", "")
    return (
        f"{type(pipeline).__name__} with {' and '.join(denoisers)} and {scheduler}, on {device} in "
        f"{str(dtype).removeprefix('torch.')}"
    )


def _shape(samples: Tensor) -> str:
    return f"gives {list(samples.shape)}"


def _kinds(layers: list[CacheLayer]) -> str:
    counts: dict[str, int] = {}
    for layer in layers:
        counts[layer.kind] = counts.get(layer.kind, 0) + 1
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"{listed} in {len({layer.block for layer in layers})} blocks can be reused"


@dataclass
class _Calls:
    """How often denoisers were called, and with which batches."""

    count: int = 0
    batches: tuple[int, ...] = ()

    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count += 1
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1]
        if tensors:
            self.batches = tuple(dict.fromkeys((*self.batches, len(tensors[0]))))


@contextmanager
def _watched(pipeline: Any) -> Iterator[_Calls]:
    calls = _Calls()
    handles = [
        module.register_forward_pre_hook(calls.see, with_kwargs=True)
        for module in Target.of(pipeline).denoisers.values()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _timed(sampler: PipelineSampler) -> tuple[Tensor, float, _Calls]:
    with _watched(sampler.pipeline) as calls:
        started = time.perf_counter()
        samples = sampler(0)
        return samples, time.perf_counter() - started, calls


def _under(pipeline: Any, schedule: Schedule, sampler: PipelineSampler) -> tuple[Tensor, Any]:
    with cached(pipeline, schedule) as run:
        samples = sampler(0)
    return samples, run.summary()


def _exactness(samples: Tensor, plain: Tensor, sampler: PipelineSampler) -> Check:
    """A schedule that computes everything must change nothing."""
    if torch.equal(samples, plain):
        return Check("exactness", FINE, "a schedule that computes everything changes no bit")
    if not torch.equal(sampler(0), plain):
        return Check("exactness", ASIDE, "two plain runs of one seed already differ")
    return Check(
        "exactness", BROKEN, "a schedule that computes everything gives another result than none"
    )


def _reuse(summary: Any) -> Check:
    if not summary.reused or not summary.finished:
        return Check("reuse", BROKEN, f"nothing was reused in {summary.finished} generations")
    if summary.recomputed:
        reasons = "; ".join(summary.recomputed)
        return Check("reuse", BROKEN, f"layers had to compute where they were to reuse: {reasons}")
    return Check("reuse", FINE, f"{summary.reused} layer calls of the second step were reused")


def _guidance(pipeline: Any, sampler: PipelineSampler, calls: _Calls, summary: Any) -> Check:
    name = "guidance"
    denoisers = len(Target.of(pipeline).denoisers)
    per_step = calls.count / STEPS
    if summary.recomputed:
        return Check(name, BROKEN, "the calls of a step were not told apart")
    if per_step > 1 and denoisers == 1:
        return Check(name, FINE, f"{per_step:g} calls of the denoiser a step, told apart")
    if calls.batches and min(calls.batches) > 1:
        return Check(name, FINE, f"in one call a step, as a batch of {min(calls.batches)}")
    return Check(name, ASIDE, "one call a step for one sample: distilled, or without guidance")


def _compiled(pipeline: Any, schedule: Schedule, sampler: PipelineSampler) -> Check:
    """Traces the denoisers as one graph each; the backend generates no code, so this is quick."""
    denoisers = list(Target.of(pipeline).denoisers.values())
    if any(module._compiled_call_impl is not None for module in denoisers):
        return Check("compile", ASIDE, "the denoiser is compiled already")
    try:
        for module in denoisers:
            module.compile(fullgraph=True, backend="eager")
        with cached(pipeline, schedule) as run:
            for _ in range(2):  # the first call of all runs uncompiled
                sampler(0)
        summary = run.summary()
    except Exception as error:  # what a compiler cannot trace
        return Check("compile", BROKEN, f"not as one graph: {_first_line(error)}")
    finally:
        for module in denoisers:
            vars(module).pop("_compiled_call_impl", None)
        torch.compiler.reset()
    if not summary.reused:
        return Check("compile", BROKEN, "traced, but nothing was reused")
    return Check("compile", FINE, "traced without graph breaks under a schedule")


def _not_compiled() -> Check:
    return Check("compile", ASIDE, "not tried")


def _offloading(pipeline: Any) -> Check:
    """Who moves weights, by the hooks that are on the denoisers."""
    owners = set()
    for module in Target.of(pipeline).denoisers.values():
        for part in module.modules():
            if hasattr(part, "_hf_hook"):
                owners.add("accelerate")
            registry = getattr(part, "_diffusers_hook", None)
            if registry is not None and "group_offloading" in getattr(registry, "hooks", {}):
                owners.add("diffusers, by group")
    if owners:
        return Check("offload", FINE, f"{' and '.join(sorted(owners))}; reuse loads no weights")
    return Check("offload", ASIDE, "none is on; with --offload it is examined too")
