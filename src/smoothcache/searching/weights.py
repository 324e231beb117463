"""Fits the weights of reused outputs so that a run comes near to a reference of other steps.

A joint search takes other solvers and numbers of steps and is judged by the converged sample. The
uncached run of such a candidate is recorded, and its weights are fitted in closed loop to the
states of the reference at the same timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..calibration.recording import TrajectoryRecorder, record_generation
from ..calibration.trajectory import Guidance
from ..fitting.closed_loop import ClosedLoopFit
from .gains import Trajectory
from .objectives import output_tensors

Weights = tuple[tuple[float, ...], ...]


def fit_weights(
    model: Any,
    run: Callable[[int], Any],
    computed: tuple[bool, ...],
    references: Mapping[int, tuple[Trajectory, Any]],
) -> Weights:
    """Fits weights so that generations end close to references.

    Args:
        model: A pipeline or module with one denoiser.
        run: Runs generation number i uncached, as the candidate samples.
        computed: Whether each step is computed.
        references: Number of a generation -> trajectory of the reference, and its output.

    Returns:
        The weights of every step.

    Raises:
        CalibrationError: If the generations cannot be recorded, or their solver is not linear.
    """
    recorder = TrajectoryRecorder(model)
    timesteps: list[float] = []
    outputs: dict[int, Any] = {}

    def remembered(i: int) -> Any:
        outputs[i] = output = run(i)
        return output

    for i in references:
        tape, generation = record_generation(model, partial(remembered, i))
        recorder.add(partial(run, i), tape, generation)
        timesteps = generation.timesteps
    trajectories = recorder.result()
    guidance = trajectories.responses.guidance
    targets = [
        _offsets(
            latents.float(),
            timesteps,
            trajectory,
            _difference(output_tensors(output, f"sample({i})"), outputs[i], f"sample({i})"),
            guidance,
        )
        for latents, (i, (trajectory, output)) in zip(
            trajectories.latents, references.items(), strict=True
        )
    ]
    fit = ClosedLoopFit(
        model, run, trajectories, timesteps, computed, numbers=list(references), targets=targets
    )
    tables, _ = fit.fitted(len(targets), 0, progress=False)
    return tuple(tables[0])


def _difference(reference: Any, output: Any, call: str) -> Tensor | None:
    """The difference of two outputs that are one tensor each; None of others."""
    output = output_tensors(output, call)
    if not isinstance(reference, Tensor) or not isinstance(output, Tensor):
        return None
    return reference.float() - output.float() if reference.shape == output.shape else None


def _offsets(
    latents: Tensor,
    timesteps: list[float],
    trajectory: Trajectory,
    end: Tensor | None,
    guidance: Guidance,
) -> Tensor:
    """How far the states of a reference lie from those of a run, [steps + 1, *latents].

    Where a state of the reference is not known, it lies as far off as the one before. The last one
    is known if the sampler returns latents.
    """
    found: list[Tensor] = []
    for step, time in enumerate(timesteps):
        state = trajectory.at(time)
        known = found[-1] if found else torch.zeros_like(latents[0])
        found.append(known if state is None else guidance.latents(state).cpu() - latents[step])
    is_known = end is not None and end.shape == found[-1].shape
    found.append(end if end is not None and is_known else found[-1])
    return torch.stack(found)
