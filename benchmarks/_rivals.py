"""Caches of other packages, as they are installed from PyPI, as methods of a benchmark.

Each setting runs on a copy of the pipeline, whose classes are its own, so that nothing of it is
left behind. What a rival needs and the pipeline does not offer is given to it, through what its
package documents: a transformer without ``CacheMixin`` gets it as a base class, each call enters a
``cache_context`` with the step, and thresholds, ratios and module names are set for this model.
"""

from __future__ import annotations

import ast
import copy
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from diffusers import hooks
from diffusers.models.cache_utils import CacheMixin

from smoothcache.comparison.benchmark import Case, Method
from smoothcache.comparison.trial import Way
from smoothcache.model.denoisers import find_denoisers

Setting = tuple[str, str, Callable[[Any], Any]]
"""Family, setting, and what makes a configuration for a pipeline whose transformer is a copy."""

LAYERS = r"transformer_blocks\.\d+\.(attn1|ff)"
BLOCKS, LAST = r"transformer_blocks\.\d+", "proj_out_2"


def rivals(case: Case, settings: int | None = None) -> list[Method]:
    """Every rival, with all its settings or the first few."""
    found = [
        *(_of_diffusers(case, *setting) for rival in OF_DIFFUSERS for setting in rival()),
        *(_of_cache_dit(case, *setting) for setting in CACHE_DIT),
    ]
    families: dict[str, list[Method]] = {}
    for method in found:
        families.setdefault(method.family, []).append(method)
    return [method for members in families.values() for method in members[:settings]]


# ----------------------------------------------------------------------------------- diffusers


def first_block_cache() -> Iterator[Setting]:
    for threshold in (0.05, 0.08, 0.12, 0.25):
        config = hooks.FirstBlockCacheConfig(threshold)
        yield "FirstBlockCache", f"threshold {threshold:g}", lambda _, config=config: config


def taylor_seer() -> Iterator[Setting]:
    """Of all layers, of the output alone, and with the defaults, which find no layer here."""
    layers = {"cache_identifiers": [LAYERS]}
    output = {"skip_predict_identifiers": [BLOCKS], "cache_identifiers": [LAST]}
    for where, names, order, warm_up, intervals in (
        ("layers", layers, 1, 3, (2, 4, 6)),
        ("layers", layers, 2, 3, (2, 3, 4, 6)),
        ("layers", layers, 2, 1, (2, 3, 4, 5, 6)),
        ("output", output, 2, 1, (2, 3, 4, 5, 6)),
        ("defaults", {}, 1, 3, (3,)),
    ):
        for interval in intervals:
            config = hooks.TaylorSeerCacheConfig(
                cache_interval=interval,
                disable_cache_before_step=warm_up,
                max_order=order,
                taylor_factors_dtype=torch.float32,
                **names,
            )
            setting = f"interval {interval}, {warm_up} of warm-up"
            yield f"TaylorSeer, {where}, order {order}", setting, lambda _, config=config: config


def mag_cache() -> Iterator[Setting]:
    for threshold, most, kept in ((0.06, 3, 0.2), (0.12, 3, 0.1), (0.3, 4, 0.1), (1.0, 6, 0.06)):
        yield (
            "MagCache",
            f"threshold {threshold:g}, {most} in a row, {100 * kept:.0f} % kept",
            partial(_mag_cache, threshold, most, kept),
        )


def pyramid_attention_broadcast() -> Iterator[Setting]:
    for interval in (2, 4):
        yield (
            "PyramidAttentionBroadcast",
            f"every {interval}",
            lambda pipe, interval=interval: hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=interval,
                spatial_attention_timestep_skip_range=(-1, 1001),
                current_timestep_callback=lambda: pipe.transformer.current_timestep,
            ),
        )


def faster_cache() -> Iterator[Setting]:
    for attention, guidance in ((2, 5), (6, 6)):
        setting = f"attention every {attention}, guidance every {guidance}"
        yield "FasterCache", setting, partial(_faster_cache, attention, guidance)


def sea_cache() -> Iterator[Setting]:
    for threshold, most in ((0.1, 2), (0.25, 3), (0.5, 4), (1.0, 6)):
        config = hooks.SeaCacheConfig(
            threshold=threshold, max_consecutive_cached=most, raw_vision_callback=_latents
        )
        setting = f"threshold {threshold:g}, at most {most} in a row"
        yield "SeaCache", setting, lambda _, config=config: config


OF_DIFFUSERS = (
    *(first_block_cache, taylor_seer, mag_cache),
    *(pyramid_attention_broadcast, faster_cache, sea_cache),
)


def _of_diffusers(
    case: Case, family: str, setting: str, configured: Callable[[Any], Any]
) -> Method:
    def make() -> Way:
        pipe = _copied(case.model)
        denoisers = tuple(find_denoisers(pipe).values())
        _make_cacheable(pipe, is_swapped=family == "FasterCache")
        if family == "MagCache":
            pipe.ratios = _magnitude_ratios(case)
        pipe.transformer.enable_cache(configured(pipe))
        return _way(case, pipe, denoisers, varies=family in ("FirstBlockCache", "SeaCache"))

    return Method(f"{family}, {setting}", f"diffusers {family}", make)


def _make_cacheable(pipe: Any, *, is_swapped: bool) -> None:
    """Gives the transformer ``CacheMixin`` if it has none, and a cache context at every call.

    Args:
        pipe: Its scheduler tells the step.
        is_swapped: Whether to show the transformer unconditional samples first, as FasterCache
            wants them; DiTPipeline has them last.
    """
    own = type(pipe.transformer)
    bases = (own,) if issubclass(own, CacheMixin) else (own, CacheMixin)

    def call(self: Any, hidden_states: Any, **options: Any) -> Any:
        timestep = options["timestep"].flatten()[0]
        self.current_timestep = timestep.item()
        if is_swapped:
            hidden_states = _swapped(hidden_states)
            options = {
                name: _swapped(x) if torch.is_tensor(x) else x for name, x in options.items()
            }
        with self.cache_context("cond", **_position(pipe.scheduler, timestep)):
            output = own.__call__(self, hidden_states=hidden_states, **options)
        if is_swapped:
            output.sample = _swapped(output.sample)
        return output

    pipe.transformer.__class__ = type(own.__name__, bases, {"__call__": call})


def _position(scheduler: Any, timestep: Any) -> dict[str, Any]:
    """Where the sampler is: step, number of steps, and share of noise as flow matching has it."""
    timesteps = scheduler.timesteps.tolist()
    signal = scheduler.alphas_cumprod[int(timestep)].sqrt().item()
    noise = (1 - signal**2) ** 0.5
    return {
        "step_index": timesteps.index(timestep.item()),
        "num_inference_steps": len(timesteps),
        "timestep": timestep,
        "sigma": noise / (signal + noise),
    }


def _swapped(batch: Any) -> Any:
    first, second = batch.chunk(2)
    return torch.cat([second, first])


def _latents(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The latents of every sample as videos of one frame, as SeaCache wants them."""
    latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return [image[:, None] for image in latents]


def _mag_cache(threshold: float, most: int, kept: float, pipe: Any) -> Any:
    """MagCache with the ratios that its own calibration printed, for one training generation."""
    return hooks.MagCacheConfig(
        threshold=threshold,
        max_skip_steps=most,
        retention_ratio=kept,
        num_inference_steps=len(pipe.ratios),
        mag_ratios=pipe.ratios,
    )


def _magnitude_ratios(case: Case) -> list[float]:
    pipe = _copied(case.model)
    _make_cacheable(pipe, is_swapped=False)
    config = hooks.MagCacheConfig(calibrate=True, num_inference_steps=case.num_steps)
    pipe.transformer.enable_cache(config)
    with redirect_stdout(io.StringIO()) as printed:
        case.training(pipe, 0)
    ratios: list[float] = ast.literal_eval(printed.getvalue().strip().splitlines()[-1])
    return ratios


def _faster_cache(attention: int, guidance: int, pipe: Any) -> Any:
    return hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=attention,
        spatial_attention_timestep_skip_range=(-1, 681),
        unconditional_batch_skip_range=guidance,
        unconditional_batch_timestep_skip_range=(-1, 641),
        tensor_format="BCHW",
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.transformer.current_timestep,
        _unconditional_conditional_input_kwargs_identifiers=[
            *("hidden_states", "timestep", "class_labels")
        ],
    )


# ----------------------------------------------------------------------------------- cache-dit

THRESHOLDS = ((0.05, 4), (0.08, 4), (0.15, 3), (0.3, 2))
MASKED = (2, 3, 4, 6, 10)
CACHE_DIT: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    *(
        (
            family,
            f"threshold {threshold:g}, {warm_up} of warm-up",
            {"residual_diff_threshold": threshold, "max_warmup_steps": warm_up},
            order,
        )
        for family, order in (("DBCache", 0), ("DBCache + TaylorSeer", 1))
        for threshold, warm_up in THRESHOLDS
    ),
    *(("DBCache + TaylorSeer, step mask", f"every {n}", {"interval": n}, 1) for n in MASKED),
)
"""Family, setting, what differs in ``DBCacheConfig``, and the order of TaylorSeer, 0 for none."""


def _of_cache_dit(
    case: Case, family: str, setting: str, options: Mapping[str, Any], order: int
) -> Method:
    def make() -> Way:
        import cache_dit  # the extra "rivals"

        logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
        pipe = _copied(case.model)
        denoisers = tuple(find_denoisers(pipe).values())
        cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                num_inference_steps=case.num_steps,
                **_masked(options, case.num_steps),
            ),
            calibrator_config=(
                cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
            ),
        )
        return _way(case, pipe, denoisers, varies="interval" not in options)

    return Method(f"{family}, {setting}", f"cache-dit {family}", make)


def _masked(options: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """The options, with every so many steps computed, and no others, if they name an interval."""
    if "interval" not in options:
        return dict(options)
    mask = [int(step % options["interval"] == 0) for step in range(num_steps)]
    return {
        "steps_computation_mask": mask,
        "steps_computation_policy": "static",
        "max_warmup_steps": 0,
    }


# ---------------------------------------------------------------------------------------- both


def _copied(pipe: Any) -> Any:
    """The same pipeline with a transformer, a noise scheduler and a class of its own."""
    parts = {
        **pipe.components,
        "transformer": copy.deepcopy(pipe.transformer),
        "scheduler": copy.deepcopy(pipe.scheduler),
    }
    twin = type(type(pipe).__name__, (type(pipe),), {})(**parts)
    twin.set_progress_bar_config(disable=True)
    return twin


def _way(case: Case, pipe: Any, denoisers: tuple[Any, ...], *, varies: bool) -> Way:
    return Way(lambda i: case.sample(pipe, i), denoisers, case.num_steps, varies=varies)
