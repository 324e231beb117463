"""Measures how far the converged trajectory lies from the recorded one.

The converged trajectory starts from the same noise and takes many more steps, so it shows what the
sampler would end at if its steps cost nothing. A plan that aims at it can correct errors of the
sampler's own step size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..model.target import Target
from ..tracking.playback import Playback
from .recording import in_half
from .trajectory import Trajectories

_FARTHEST = 0.5  # of the converged final latents from the sampler's own, relative L2


def converged_offsets(
    target: Target,
    sample: Callable[..., Any],
    trajectories: Trajectories,
    timesteps: Sequence[float],
    num_steps: int,
    numbers: Sequence[int],
) -> dict[int, Tensor]:
    """Samples converged trajectories and subtracts the recorded ones.

    Args:
        target: The model.
        sample: ``sample(i, num_inference_steps=n)`` runs generation number i with n steps.
        trajectories: Recorded trajectories, with latents.
        timesteps: Timesteps of the recorded steps.
        num_steps: Number of steps of a converged trajectory.
        numbers: Indices of the samples.

    Returns:
        For each sample the difference of the latents before each recorded step and after the last
        one, [steps + 1, *latents]. Converged latents are interpolated linearly over the timesteps.
        If the sampler does not reveal the final latents, their difference is that of the last step.

    Raises:
        CalibrationError: If a converged generation takes no more steps, starts from another noise,
            has another shape, or ends as another sample.
    """
    guidance = trajectories.responses.guidance
    found = {}
    for i in numbers:
        run = partial(sample, i, num_inference_steps=num_steps)
        fine, own = (
            Playback(target).run(generate, lambda place, run_model: run_model(), wants_end=True)
            for generate in (run, partial(sample, i))
        )
        if len(fine.timesteps) <= len(timesteps):
            raise CalibrationError(
                f"sample({i}, num_inference_steps={num_steps}) ran {len(fine.timesteps)} steps, no "
                f"more than the {len(timesteps)} of sample({i}); it must pass the number on"
            )
        states = [guidance.latents(x).cpu() for x in fine.latents]
        recorded = trajectories.latents[i].float()
        if not states or states[0].shape != recorded[0].shape:
            raise CalibrationError(
                f"sample({i}, num_inference_steps={num_steps}) runs on latents of another shape "
                f"than sample({i})"
            )
        scale = float(states[0].norm())
        if float((states[0] - recorded[0]).norm()) > 0.1 * scale:
            raise CalibrationError(
                f"sample({i}, num_inference_steps={num_steps}) starts from other latents than "
                f"sample({i}); its noise must depend on the sample index alone"
            )
        offsets: list[Tensor] = []
        for step, time in enumerate(timesteps):
            state = _state_at(fine.timesteps, states, time)
            last = offsets[-1] if offsets else torch.zeros_like(recorded[0])
            offsets.append(last if state is None else state - recorded[step])
        offsets[0] = torch.zeros_like(recorded[0])
        offsets.append(offsets[-1])
        if fine.end is not None and own.end is not None:
            end = (fine.end - own.end).cpu()
            if end.shape != recorded[0].shape:  # still holds a copy for each guidance branch
                end = guidance.latents(end)
            offsets[-1] = end if end.shape == recorded[0].shape else offsets[-1]
        _refuse_another_sample(i, offsets[-1], recorded[-1])
        found[i] = in_half(torch.stack(offsets))
    return found


def _refuse_another_sample(i: int, offset: Tensor, latents: Tensor) -> None:
    """Refuses a converged sample that has little to do with the sampler's own."""
    distance = float(offset.norm() / latents.norm())
    if distance > _FARTHEST:
        raise CalibrationError(
            f"the converged sample {i} ends {distance:.0%} away from the sampler's own, as another "
            "sample would; a solver that adds noise must follow the same path at every number of "
            "steps, or leave out converged_steps"
        )


def _state_at(times: Sequence[float], states: Sequence[Tensor], time: float) -> Tensor | None:
    """Returns the latents at a timestep, interpolated; None outside the trajectory."""
    for (begin, end), (before, after) in zip(pairwise(times), pairwise(states), strict=True):
        if begin != end and min(begin, end) <= time <= max(begin, end):
            return torch.lerp(before, after, (time - begin) / (end - begin))
    return None
