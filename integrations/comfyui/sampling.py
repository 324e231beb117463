"""Tells smoothcache where ComfyUI's sampler is, from the sigmas of the model patcher's wrappers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from smoothcache import InvalidArgumentError

# Kinds of wrappers, by the names that the model patcher knows them by.
OUTER_SAMPLE, CALC_COND_BATCH = "outer_sample", "calc_cond_batch"
KEY = "smoothcache"


class Sigmas:
    """The sigmas of a generation, in the place of a noise scheduler."""

    order = 1  # evaluations in a step, for each branch of guidance

    def __init__(self) -> None:
        self.timesteps: torch.Tensor | None = None
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._sigmas: list[float] = []
        self._evaluated = -1

    def begin(self, sigmas: torch.Tensor, to_timestep: Callable[[torch.Tensor], Any]) -> None:
        """Announces a generation.

        Args:
            sigmas: From the first to the last one, where no evaluation takes place; [steps + 1].
            to_timestep: Makes the model's own t of a sigma.
        """
        self._sigmas = sigmas.detach().float().cpu().flatten().tolist()
        steps = sigmas.detach().float().cpu().flatten()[:-1]
        self.timesteps = torch.as_tensor([float(to_timestep(sigma)) for sigma in steps])
        self.num_inference_steps = len(self.timesteps)
        self._step_index, self._evaluated = 0, -1

    def arrive(self, sigma: torch.Tensor) -> None:
        """Notes the step of the evaluation that comes.

        Raises:
            InvalidArgumentError: If the sampler evaluates between its sigmas, or twice at one.
        """
        value = float(sigma.flatten()[0])
        following = self._evaluated + 1
        tolerance = 1e-5 * max(1.0, abs(value))
        if following >= self.num_steps or abs(self._sigmas[following] - value) > tolerance:
            expected = f"{self._sigmas[following]:g}" if following < self.num_steps else "none"
            raise InvalidArgumentError(
                f"the sampler evaluates the model at sigma {value:g} after {following} steps, and "
                f"its list of sigmas has {expected} there; samplers with one evaluation in each "
                "step are supported (euler, ddim, dpmpp_2m, lms, uni_pc), those with several "
                "(heun, dpm_2, dpmpp_2s, dpmpp_sde) are not"
            )
        self._step_index = self._evaluated = following

    @property
    def num_steps(self) -> int:
        """Steps of this generation."""
        return max(len(self._sigmas) - 1, 0)


class ComfyPipeline:
    """The diffusion model of a model patcher and its sigmas, as smoothcache takes a pipeline.

    Args:
        patcher: A MODEL of ComfyUI.

    Raises:
        InvalidArgumentError: If it has no diffusion model.
    """

    def __init__(self, patcher: Any) -> None:
        model = getattr(patcher, "model", None)
        denoiser = getattr(model, "diffusion_model", None)
        if not isinstance(denoiser, nn.Module):
            raise InvalidArgumentError(
                f"expected a MODEL with a diffusion model, got {type(patcher).__name__}; connect "
                "the output of a node that loads one"
            )
        self.scheduler = Sigmas()
        self.components = {"diffusion_model": denoiser, "scheduler": self.scheduler}

    def wrapped(self, patcher: Any, entering: Callable[[int], AbstractContextManager[Any]]) -> Any:
        """A clone of the patcher whose sampling announces its sigmas.

        Args:
            patcher: The MODEL that this pipeline was made of.
            entering: Number of steps -> context around the whole of a generation.
        """

        def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
            sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
            sampling = executor.class_obj.model_patcher.model.model_sampling
            self.scheduler.begin(sigmas, sampling.timestep)
            with entering(self.scheduler.num_steps):
                return executor(*args, **kwargs)

        def evaluate(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.scheduler.arrive(kwargs["timestep"] if "timestep" in kwargs else args[3])
            return executor(*args, **kwargs)

        clone = patcher.clone()
        clone.add_wrapper_with_key(OUTER_SAMPLE, KEY, sample)
        clone.add_wrapper_with_key(CALC_COND_BATCH, KEY, evaluate)
        return clone
