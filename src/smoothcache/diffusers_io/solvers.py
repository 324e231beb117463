"""Solvers that a pipeline could use instead of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..model.target import Target
from ..optional import optional_module


def suitable_solvers(model: Any) -> Mapping[str, Any]:
    """The multistep solvers that suit the noise scheduler of a pipeline.

    Args:
        model: A pipeline or a module; a module has no noise scheduler.

    Returns:
        Name -> noise scheduler; empty if the model has none, or none is known to suit.

    Example:
        >>> from torch import nn
        >>> suitable_solvers(nn.Identity())
        {}
    """
    scheduler = Target.of(model).noise_scheduler
    return multistep_solvers(scheduler) if hasattr(scheduler, "config") else {}


def multistep_solvers(scheduler: Any) -> dict[str, Any]:
    """Multistep solvers, configured for the same model as a noise scheduler.

    Args:
        scheduler: One of diffusers; its noise levels and what its model predicts are taken over.

    Returns:
        Name -> a scheduler of its own; empty if none is known to suit.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> list(multistep_solvers(DDIMScheduler()))
        ['DPM-Solver++ 2M', 'DPM-Solver++ 2M, log-SNR', 'DPM-Solver++ 3M, log-SNR', 'UniPC']
    """
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    config = dict(scheduler.config)
    if type(scheduler).__name__.startswith("FlowMatch"):
        if config.get("use_dynamic_shifting"):
            return {}
        flow = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": config.get("shift", 1.0),
        }
        return {
            "DPM-Solver++ 2M": DPMSolverMultistepScheduler(**flow),
            "UniPC": UniPCMultistepScheduler(**flow),
        }
    if not hasattr(scheduler, "alphas_cumprod"):
        return {}

    def dpm_solver(order: int, *, log_snr: bool) -> Any:
        return DPMSolverMultistepScheduler.from_config(
            config,
            algorithm_type="dpmsolver++",
            solver_order=order,
            use_lu_lambdas=log_snr,
            use_karras_sigmas=False,
        )

    return {
        "DPM-Solver++ 2M": dpm_solver(2, log_snr=False),
        "DPM-Solver++ 2M, log-SNR": dpm_solver(2, log_snr=True),
        "DPM-Solver++ 3M, log-SNR": dpm_solver(3, log_snr=True),
        "UniPC": UniPCMultistepScheduler.from_config(config),
    }


def third_order_sde(scheduler: Any) -> Any:
    """DPM-Solver++(3M) SDE, which Stable Audio Open is sampled with, for the same model.

    diffusers' ``CosineDPMSolverMultistepScheduler`` stops at the second order: it takes
    ``solver_order=3``, and then has no update for the third step. Everything else is its own, the
    noise levels as well as the seeded Brownian noise, which needs torchsde.

    Args:
        scheduler: A ``CosineDPMSolverMultistepScheduler``.

    Returns:
        A scheduler of a subclass, at the start of no generation.

    Raises:
        InvalidArgumentError: If it is another scheduler.
        MissingPackageError: If torchsde is not installed.

    Source: Lu et al., "DPM-Solver++", arXiv 2211.01095, for data prediction and the SDE; the
    weight of the second difference is that of k-diffusion's ``sample_dpmpp_3m_sde``, half of
    what integrating the parabola gives.

    Example:
        >>> from diffusers import CosineDPMSolverMultistepScheduler
        >>> type(third_order_sde(CosineDPMSolverMultistepScheduler())).__name__
        'DPMSolver3MSDEScheduler'
    """
    optional_module("torchsde", extra="audio")
    base = type(scheduler)
    if base.__name__ != "CosineDPMSolverMultistepScheduler":
        raise InvalidArgumentError(
            "the third order is known for a CosineDPMSolverMultistepScheduler, got "
            f"{base.__name__}."
        )

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        self.oldest = None

    def update(self: Any, outputs: list[Tensor], sample: Tensor, noise: Tensor) -> Tensor:
        oldest, self.oldest = self.oldest, outputs[-2]
        if oldest is None:
            second: Tensor = base.multistep_dpm_solver_second_order_update(
                self, outputs, sample=sample, noise=noise
            )
            return second
        sigmas = self.sigmas[self.step_index - 2 : self.step_index + 2]
        return _third_order_step(sigmas, (oldest, *outputs[-2:]), sample, noise)

    methods = {
        "set_timesteps": set_timesteps,
        "multistep_dpm_solver_second_order_update": update,
    }
    cls: Any = type("DPMSolver3MSDEScheduler", (base,), methods)
    return cls.from_config({**scheduler.config, "solver_order": 2})


def _third_order_step(
    sigmas: Tensor, denoised: tuple[Tensor, Tensor, Tensor], sample: Tensor, noise: Tensor
) -> Tensor:
    """The sample at the last of four noise levels, from the denoised ones at the first three."""
    widths = sigmas[:-1].log() - sigmas[1:].log()
    oldest, older, newest = denoised
    h = 2 * widths[2]  # the SDE goes twice as far as the ODE, and noise takes it half way back
    first, second = ((newest - older) / widths[1], (older - oldest) / widths[0])
    difference = widths[2] * (first - second) / (widths[0] + widths[1])
    slope = first + widths[1] / widths[2] * difference
    phi_1 = -torch.expm1(-h)
    phi_2 = 1 - phi_1 / h
    phi_3 = phi_2 / h - 0.5
    deterministic = torch.exp(-h) * sample + phi_1 * newest
    curved = widths[2] * (phi_2 * slope - phi_3 * difference)
    return deterministic + curved + sigmas[3] * phi_1.sqrt() * noise
