"""The nodes: calibrate, plan, load a schedule, and apply it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import smoothcache as sc

from .sampling import ComfyPipeline

CALIBRATION, SCHEDULE = "SMOOTHCACHE_CALIBRATION", "SMOOTHCACHE_SCHEDULE"
FOLDER = Path(__file__).parent / "schedules"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_log = logging.getLogger("smoothcache")


class ApplySchedule:
    """A MODEL that runs under a schedule, whichever sampler node it is connected to."""

    CATEGORY, FUNCTION = "smoothcache", "apply"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "schedule": (SCHEDULE,)}}

    def apply(self, model: Any, schedule: sc.Schedule) -> tuple[Any]:
        pipeline = ComfyPipeline(model)

        @contextmanager
        def running(num_steps: int) -> Iterator[None]:
            if num_steps != schedule.num_steps:
                raise sc.ScheduleMismatchError(
                    f"the sampler makes {num_steps} steps, and the schedule is for "
                    f"{schedule.num_steps}; set the same number, or plan for {num_steps} steps "
                    "(a denoise below 1 makes fewer)"
                )
            with sc.cached(pipeline, schedule) as run:
                yield
            _log.info("%s", run.summary())

        return (pipeline.wrapped(model, running),)


class Calibrate:
    """Measures on a few generations what reuse of each layer costs."""

    CATEGORY, FUNCTION = "smoothcache", "calibrate"
    RETURN_TYPES = (CALIBRATION,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "guider": ("GUIDER",),
                "sampler": ("SAMPLER",),
                "sigmas": ("SIGMAS",),
                "latent_image": ("LATENT",),
                "samples": ("INT", {"default": 3, "min": 1, "max": 100}),
                "max_gap": ("INT", {"default": 3, "min": 1, "max": 20}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63}),
            }
        }

    def calibrate(
        self,
        guider: Any,
        sampler: Any,
        sigmas: torch.Tensor,
        latent_image: dict[str, Any],
        samples: int,
        max_gap: int,
        seed: int,
    ) -> tuple[sc.Calibration]:
        patcher = guider.model_patcher
        options = guider.model_options
        pipeline = ComfyPipeline(patcher)
        latent = latent_image["samples"]
        guider.model_patcher = pipeline.wrapped(patcher, lambda num_steps: nullcontext())
        guider.model_options = guider.model_patcher.model_options

        def sample(i: int) -> Any:
            number = seed + i
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(number))
            return guider.sample(noise, latent, sampler, sigmas, seed=number)

        try:
            return (sc.calibrate(pipeline, sample, samples, max_gap, trajectory=False),)
        finally:
            guider.model_patcher, guider.model_options = patcher, options


class Plan:
    """The schedule of a calibration for a threshold, saved if it gets a name."""

    CATEGORY, FUNCTION = "smoothcache", "plan"
    RETURN_TYPES = (SCHEDULE, "STRING")
    RETURN_NAMES = ("schedule", "description")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "calibration": (CALIBRATION,),
                "alpha": ("FLOAT", {"default": 0.18, "min": 0.0, "max": 10.0, "step": 0.01}),
                "save_as": ("STRING", {"default": ""}),
            }
        }

    def plan(
        self, calibration: sc.Calibration, alpha: float, save_as: str = ""
    ) -> tuple[sc.Schedule, str]:
        path = _file_named(save_as) if save_as else None
        schedule = sc.plan(calibration, alpha=alpha)
        if path is not None:
            FOLDER.mkdir(exist_ok=True)
            schedule.save(path)
        return schedule, str(schedule)


class LoadSchedule:
    """A schedule that "plan" saved, or that was put into the folder ``schedules``."""

    CATEGORY, FUNCTION = "smoothcache", "load"
    RETURN_TYPES = (SCHEDULE,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {"default": ""})}}

    def load(self, name: str) -> tuple[sc.Schedule]:
        path = _file_named(name)
        if not path.is_file():
            known = ", ".join(sorted(x.stem for x in FOLDER.glob("*.json"))) or "none"
            raise sc.InvalidArgumentError(
                f"there is no schedule {name!r} in {FOLDER}; there are: {known}"
            )
        return (sc.Schedule.load(path),)


def _file_named(name: str) -> Path:
    """The file of a schedule; a name from a workflow never leaves the folder."""
    if not _NAME.fullmatch(name):
        raise sc.InvalidArgumentError(
            f"a schedule is named by letters, digits, '.', '_' and '-', got {name!r}; leave out "
            "the folder"
        )
    return FOLDER / f"{name.removesuffix('.json')}.json"


NODE_CLASS_MAPPINGS = {
    "SmoothCacheApplySchedule": ApplySchedule,
    "SmoothCacheCalibrate": Calibrate,
    "SmoothCachePlan": Plan,
    "SmoothCacheLoadSchedule": LoadSchedule,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SmoothCacheApplySchedule": "smoothcache: apply schedule",
    "SmoothCacheCalibrate": "smoothcache: calibrate",
    "SmoothCachePlan": "smoothcache: plan",
    "SmoothCacheLoadSchedule": "smoothcache: load schedule",
}
