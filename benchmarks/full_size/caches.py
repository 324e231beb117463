"""What is compared: schedules of smoothcache, and the caches of diffusers and cache-dit.

Rivals are set to compute about the same share of the MACs as a row of ours: TaylorSeer and
cache-dit at fixed steps, FirstBlockCache by a threshold that is looked for. A rival that is not
installed, or does not take a model, raises when it is enabled, and its row says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import hooks
from diffusers.models.cache_utils import CacheMixin

import smoothcache as sc

from .cases import Case
from .sampling import Sampler

PUBLISHED = Path(__file__).parents[2] / "tests" / "data" / "published_schedules"
NO_CACHE, ALL = "no cache", "all computed"

LAYERS = r".*blocks\.\d+\.(attn\d?|cross_attn|ffn?|ff_context|mlp|proj_mlp|proj_out)"
BLOCKS, LAST = r"[^.]*blocks\.\d+", r"proj_out(_2)?|final_layer\.linear"
TRIALS, NEAR = 6, 0.02  # of a threshold, and of a share of the MACs


@dataclass(frozen=True)
class Cache:
    """One row of a table.

    Attributes:
        enable: Enables it on the model of a sampler; gives the handle, if it is ours.
        is_rival: Whether it is another package's.
    """

    enable: Callable[[Sampler], Any]
    is_rival: bool = False


def every(n: int) -> str:
    """Name of FORA's schedule."""
    return f"every {n}. step (FORA)"


def caches(case: Case) -> Mapping[str, Cache]:
    """Gives all that is compared on a case, by name, the plain model first."""
    found = {NO_CACHE: Cache(lambda sampler: None), ALL: Cache(partial(_uniform, interval=1))}
    for n in (2, 3):
        found[every(n)] = Cache(partial(_uniform, interval=n, last=True))
    for name, file in case.published.items():
        found[name] = Cache(partial(_published, file))
    for n in (3, 5):
        enable = partial(_uniform, interval=n, granularity="model")
        found[f"model, every {n}. step"] = Cache(enable)
    return {**found, **rivals()}


def rivals() -> Mapping[str, Cache]:
    """Those that compute about half and a third of the MACs."""
    found: dict[str, Callable[[Sampler], None]] = {}
    for n in (2, 3):
        found[f"cache-dit DBCache, every {n}."] = partial(_cache_dit, n)
        found[f"diffusers FirstBlockCache, about 1/{n}"] = partial(_first_block_cache, 1 / n)
        found[f"diffusers TaylorSeer, layers, every {n}."] = partial(
            _taylor_seer, n, cache_identifiers=[LAYERS]
        )
        found[f"diffusers TaylorSeer, output, every {n}."] = partial(
            _taylor_seer, n, cache_identifiers=[LAST], skip_predict_identifiers=[BLOCKS]
        )
    return {name: Cache(enable, is_rival=True) for name, enable in found.items()}


# ------------------------------------------------------------------------------------------ ours


def _uniform(sampler: Sampler, **settings: Any) -> Any:
    schedule = sc.Schedule.uniform(sampler.model, sampler.steps, **settings)
    return sc.enable(sampler.pipeline, schedule)


def _published(file: str, sampler: Sampler) -> Any:
    return sc.enable(sampler.pipeline, sc.Schedule.load(PUBLISHED / file))


# ----------------------------------------------------------------------------------- of diffusers


def _make_cacheable(sampler: Sampler) -> None:
    """Gives the model ``CacheMixin`` if it has none, and resets its caches before every sample."""
    model = sampler.model
    if not isinstance(model, CacheMixin):
        own = type(model)
        model.__class__ = type(own.__name__, (own, CacheMixin), {})
    sampler.prepare = model._reset_stateful_cache


def _taylor_seer(interval: int, sampler: Sampler, **names: Any) -> None:
    _make_cacheable(sampler)
    sampler.model.enable_cache(
        hooks.TaylorSeerCacheConfig(
            cache_interval=interval, disable_cache_before_step=1, max_order=1, **names
        )
    )


def _first_block_cache(share: float, sampler: Sampler) -> None:
    """Halves the range of thresholds until one computes about so much of the MACs."""
    whole, low, high = sampler.macs(), 1e-5, 1.0
    _make_cacheable(sampler)
    distances: dict[float, float] = {}
    for _ in range(TRIALS):
        threshold = (low * high) ** 0.5
        _set_threshold(sampler, threshold)
        ran = sampler.macs() / whole
        distances[threshold] = abs(ran - share)
        if distances[threshold] < NEAR:
            break
        low, high = (threshold, high) if ran > share else (low, threshold)
    _set_threshold(sampler, min(distances, key=lambda threshold: distances[threshold]))


def _set_threshold(sampler: Sampler, threshold: float) -> None:
    if sampler.model.is_cache_enabled:
        sampler.model.disable_cache()
    sampler.model.enable_cache(hooks.FirstBlockCacheConfig(threshold))
    sampler.note = f"threshold {threshold:.2g}"


# ------------------------------------------------------------------------------------ of cache-dit


def _cache_dit(interval: int, sampler: Sampler) -> None:
    """DBCache at fixed steps; it computes the first block at all of them."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
    import cache_dit  # the extra "rivals"

    config = partial(
        cache_dit.DBCacheConfig,
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=0,
        num_inference_steps=sampler.steps,
        enable_separate_cfg=False,  # one call a step, of Wan as well
        steps_computation_mask=[int(step % interval == 0) for step in range(sampler.steps)],
        steps_computation_policy="static",
    )
    model = cache_dit.enable_cache(sampler.model, cache_config=config())
    [sampler.model] = model if isinstance(model, list) else [model]
    # Left to itself it counts on from sample to sample, and computes other steps in some.
    sampler.prepare = lambda: cache_dit.refresh_context(sampler.model, cache_config=config())
