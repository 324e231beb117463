"""Errors of a run."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ScheduleMismatchError, SmoothCacheError


def refuse_checkpointing(denoiser: nn.Module) -> None:
    """Refuses gradient checkpointing, which reruns layers in the backward pass."""
    if torch.is_grad_enabled() and getattr(denoiser, "is_gradient_checkpointing", False):
        raise SmoothCacheError(
            "gradient checkpointing reruns layers in the backward pass, where values cannot be "
            "reused; call disable_gradient_checkpointing() or sample under torch.no_grad()"
        )


def refuse_host_memory_when_compiled() -> None:
    """Refuses host memory for the kept values of a compiled model."""
    raise SmoothCacheError(
        "a compiled model must keep its values on the device; remove store='cpu', or do not "
        "compile the model"
    )


def refuse_other_step_count(announced: int | None, planned: int) -> None:
    """Refuses a generation whose announced number of steps differs from the schedule's."""
    if announced is not None and announced != planned:
        raise ScheduleMismatchError(
            f"the noise scheduler announces {announced} steps, but the schedule was made for "
            f"{planned}; sample with {planned} steps, or plan a schedule for {announced}"
        )


def refuse_too_many_steps(step: int, planned: int) -> None:
    """Refuses a step beyond the last one of the schedule."""
    if step >= planned:
        raise ScheduleMismatchError(
            f"the generation has reached step {step + 1}, but the schedule covers {planned}; plan "
            "for the right number of steps, or call run.reset() before each new generation"
        )


def refuse_confused_branches(step: int) -> None:
    """Refuses indistinguishable calls after one of them may have reused the other's value."""
    raise ScheduleMismatchError(
        f"in step {step} the model was called twice with the same latents and conditioning. The "
        "calls differ in something hidden (a perturbed model, for example), and the first may "
        "have reused a value of the second. Run each in a cache_context with its own name, pass "
        "the model an argument that differs, or plan the first such step to be computed"
    )


def about_too_few_steps(seen: int, planned: int) -> str:
    """Returns the message for a last generation that ended early."""
    return (
        f"the last generation ended after {seen} steps, but the schedule covers {planned}; plan "
        f"for {seen} steps, or call run.reset() after interrupting a generation on purpose"
    )
