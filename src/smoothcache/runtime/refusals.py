"""What a run refuses, in the words in which it does."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ScheduleMismatchError, SmoothCacheError


def refuse_checkpointing(denoiser: nn.Module) -> None:
    """Refuses to run layers again in a backward pass."""
    if torch.is_grad_enabled() and getattr(denoiser, "is_gradient_checkpointing", False):
        raise SmoothCacheError(
            "gradient checkpointing runs layers again in the backward pass, where nothing is "
            "reused; call disable_gradient_checkpointing() or sample under torch.no_grad()"
        )


def refuse_host_memory_when_compiled() -> None:
    """Refuses to keep the values of compiled code in host memory."""
    raise SmoothCacheError(
        "a compiled model keeps its values where its graphs find them, on the device; leave out "
        "store='cpu', or do not compile the model"
    )


def refuse_other_step_count(announced: int | None, planned: int) -> None:
    """Refuses a generation for which a noise scheduler announces another number of steps."""
    if announced is not None and announced != planned:
        raise ScheduleMismatchError(
            f"the noise scheduler announces {announced} steps, but the schedule was made for "
            f"{planned}; ask for {planned} steps, or plan for {announced}"
        )


def refuse_too_many_steps(step: int, planned: int) -> None:
    """Refuses a step beyond the last one of the schedule."""
    if step >= planned:
        raise ScheduleMismatchError(
            f"the generation has come to step {step + 1}, but the schedule covers {planned}; plan "
            "for the right number of steps, or call run.reset() if a new generation has begun"
        )


def refuse_confused_branches(step: int) -> None:
    """Refuses calls that turn out to be alike after one has reused what may be another's."""
    raise ScheduleMismatchError(
        f"in step {step} the model was called twice with the same latents and the same "
        "conditioning, so what tells the calls apart is hidden (a perturbed model, say), and the "
        "first may have reused a value of the second; put each into a cache_context of its own "
        "name, pass the model what tells them apart, or plan for the first such step to be computed"
    )


def about_too_few_steps(seen: int, planned: int) -> str:
    """What to say of a last generation that ended early."""
    return (
        f"the last generation ended after {seen} steps, but the schedule covers {planned}; plan "
        f"for {seen} steps (if it was broken off on purpose, call run.reset())"
    )
