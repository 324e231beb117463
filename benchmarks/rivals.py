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
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from diffusers import hooks
from diffusers.models.cache_utils import CacheMixin

from smoothcache.benchmark import Case, Method, Way
from smoothcache.denoisers import find_denoisers

LAYERS = r"transformer_blocks\.\d+\.(attn1|ff)"
BLOCKS, LAST = r"transformer_blocks\.\d+", "proj_out_2"


def rivals(case: Case) -> list[Method]:
    """Every rival at several settings."""
    return [
        *(_of_diffusers(case, *setting) for setting in _diffusers_settings(case)),
        *(_of_cache_dit(case, *setting) for setting in CACHE_DIT),
    ]


# ----------------------------------------------------------------------------------- diffusers


def _diffusers_settings(case: Case) -> list[tuple[str, str, Callable[[Any], Any]]]:
    """Family, setting, and a function from a copy of the pipeline to a configuration."""
    first_block = [
        ("FirstBlockCache", f"threshold {x:g}", lambda _, x=x: hooks.FirstBlockCacheConfig(x))
        for x in (0.03, 0.05, 0.08, 0.12, 0.2, 0.4)
    ]
    taylor = [
        (
            f"TaylorSeer, {name} order {order}",
            f"interval {n}",
            lambda _, n=n, order=order, names=names: hooks.TaylorSeerCacheConfig(
                cache_interval=n,
                max_order=order,
                taylor_factors_dtype=torch.float32,
                **names,
            ),
        )
        for name, order, names in (
            ("layers,", 1, {"cache_identifiers": [LAYERS]}),
            ("layers,", 2, {"cache_identifiers": [LAYERS]}),
            (
                "output,",
                1,
                {"skip_predict_identifiers": [BLOCKS], "cache_identifiers": [LAST]},
            ),
        )
        for n in (2, 3, 4, 5, 6)
    ]
    as_documented = (
        "TaylorSeer, defaults",
        "interval 3",
        lambda _: hooks.TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32),
    )
    magnitude = [
        (
            "MagCache",
            f"threshold {x:g}, {k} in a row, {100 * first:.0f} % kept",
            partial(_mag_cache, case, x, k, first),
        )
        for x, k, first in ((0.06, 3, 0.2), (0.12, 3, 0.1), (0.3, 4, 0.1), (1.0, 6, 0.06))
    ]
    pyramid = [
        (
            "PyramidAttentionBroadcast",
            f"every {n}",
            lambda pipe, n=n: hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=n,
                spatial_attention_timestep_skip_range=(-1, 1001),
                current_timestep_callback=lambda: pipe.transformer.current_timestep,
            ),
        )
        for n in (2, 4, 6)
    ]
    faster = [
        (
            "FasterCache",
            f"attention every {n}, guidance every {k}",
            partial(_faster_cache, n, k),
        )
        for n, k in ((2, 2), (2, 5), (6, 6))
    ]
    sea = [
        (
            "SeaCache",
            f"threshold {x:g}, at most {k} in a row",
            lambda _, x=x, k=k: hooks.SeaCacheConfig(
                threshold=x, max_consecutive_cached=k, raw_vision_callback=_latents
            ),
        )
        for x, k in ((0.1, 2), (0.25, 2), (0.5, 3), (1.0, 4))
    ]
    return [*first_block, as_documented, *taylor, *magnitude, *pyramid, *faster, *sea]


def _of_diffusers(
    case: Case, family: str, setting: str, configured: Callable[[Any], Any]
) -> Method:
    def make() -> Way:
        pipe = _copied(case.model)
        denoisers = tuple(find_denoisers(pipe).values())
        _make_cacheable(pipe, is_swapped=family == "FasterCache")
        pipe.transformer.enable_cache(configured(pipe))
        return _way(case, pipe, denoisers)

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


def _mag_cache(case: Case, threshold: float, most: int, kept: float, _: Any) -> Any:
    """MagCache with the ratios that its own calibration prints, for one training generation."""
    pipe = _copied(case.model)
    _make_cacheable(pipe, is_swapped=False)
    steps = case.num_steps
    pipe.transformer.enable_cache(hooks.MagCacheConfig(calibrate=True, num_inference_steps=steps))
    with redirect_stdout(io.StringIO()) as printed:
        case.training(pipe, 0)
    ratios = ast.literal_eval(printed.getvalue().strip().splitlines()[-1])
    return hooks.MagCacheConfig(
        threshold=threshold,
        max_skip_steps=most,
        retention_ratio=kept,
        num_inference_steps=steps,
        mag_ratios=ratios,
    )


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

THRESHOLDS = ((0.03, 8), (0.05, 4), (0.08, 4), (0.15, 3), (0.3, 2))
MASKED = (2, 3, 4, 6, 10)
CACHE_DIT: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    *(
        (
            family,
            f"threshold {threshold:g}, {warm_up} steps of warm-up",
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
        return _way(case, pipe, denoisers)

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


def _way(case: Case, pipe: Any, denoisers: tuple[Any, ...]) -> Way:
    return Way(lambda i: case.sample(pipe, i), denoisers, case.num_steps, varies=True)
