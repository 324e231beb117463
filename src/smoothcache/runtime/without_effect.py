"""Warns of a schedule that has no effect, or that runs under another solver than calibrated."""

from __future__ import annotations

import warnings

from torch import nn

from ..checks import listed
from ..errors import SmoothCacheWarning
from ..model.target import Target
from ..schedule.schedule import Schedule
from .reused_layers import ReusedLayers
from .summary import Tally

_ADVICE = "enable the pipeline or the module that the sampler calls"


class WithoutEffect:
    """Detects conditions under which a schedule has no effect, and warns once of each.

    Args:
        target: The model.
        schedule: The schedule that the model runs under.
        tally: Counters of the run.
    """

    def __init__(self, target: Target, schedule: Schedule, tally: Tally) -> None:
        self._target = target
        self._schedule = schedule
        self._tally = tally
        self._solvers = {schedule.solver}  # the calibrated solver, and solvers warned of
        self._ran_outside: dict[str, None] = {}  # paths of layers that ran without their denoiser
        self._has_warned_of_outside = self._has_warned_of_no_effect = False
        self._reused_before = 0

    def begin_generation(self) -> None:
        """Called at the first call of a generation."""
        self._reused_before = self._tally.reused
        self._warn_of_another_solver()

    def end_generation(self, layers: ReusedLayers) -> None:
        """Warns once if a finished generation reused nothing, or bypassed some of the layers."""
        if self._has_warned_of_no_effect or self._schedule.is_all_compute:
            return
        idle, count = layers.idle(), len(layers.by_path)
        if self._tally.reused == self._reused_before:
            recomputed = self._tally.recomputed
            why = (
                f"({sum(recomputed.values())} layer calls had to be computed: "
                f"{', '.join(recomputed)})"
                if len(idle) < count
                else "(none of its layers ran: does the model bypass them?)"
            )
            message = f"the schedule reused nothing in a finished generation {why}"
        elif idle:
            message = (
                f"{len(idle)} of the {count} layers of the schedule never ran ({listed(idle)}); "
                "find the layers that run with smoothcache.observe_layers"
            )
        else:
            return
        self._has_warned_of_no_effect = True
        warnings.warn(message, SmoothCacheWarning, stacklevel=2)

    def layer_ran_outside(self, path: str, *, is_expected: bool) -> None:
        """Records a layer that runs without its denoiser's forward and is computed in full.

        Args:
            path: Path of the layer.
            is_expected: Whether its denoiser runs, but outside any generation.
        """
        self._ran_outside[path] = None
        if is_expected or self._has_warned_of_outside:
            return
        self._has_warned_of_outside = True
        warnings.warn(
            f"layer {path!r} ran without its denoiser's forward, so its step is unknown and "
            "nothing is reused; wrap the function that runs the blocks in an nn.Module whose "
            "forward takes the latents and the timestep, and plan for that module",
            SmoothCacheWarning,
            stacklevel=2,
        )

    def message(self, *, was_called: bool) -> str:
        """Returns the warning about layers that ran outside the denoisers, or an empty string.

        Args:
            was_called: Whether a denoiser was called in a generation.
        """
        names = {
            prefix: f"{type(denoiser).__name__}{f' ({prefix})' * bool(prefix)}"
            for prefix, denoiser in self._target.denoisers.items()
        }
        paths = listed(list(self._ran_outside))
        if not isinstance(self._target.model, nn.Module):
            gone = [names[prefix] for prefix in self._target.replaced()]
            if gone:
                return (
                    f"the pipeline's denoiser was replaced while enabled: {listed(gone)} is no "
                    f"longer part of it, and the new denoiser runs without the schedule; {_ADVICE}"
                )
        if not was_called:
            ran = f", though layers ran without it: {paths}"
            return (
                f"no generation was seen: {listed(list(names.values()))} was never called by a "
                f"sampler{ran * bool(self._ran_outside)}; did another object run? {_ADVICE}"
            )
        if self._ran_outside:
            return (
                f"{len(self._ran_outside)} layers of the schedule also ran outside any generation "
                f"and were computed in full ({paths}); another pipeline with a different noise "
                f"scheduler may have called them: {_ADVICE}"
            )
        return ""

    def _warn_of_another_solver(self) -> None:
        """Warns that errors measured under one noise scheduler do not hold under another."""
        planned, name = self._schedule.solver, self._target.solver
        if planned is None or name is None or name in self._solvers:
            return
        self._solvers.add(name)
        warnings.warn(
            f"the schedule was measured with {planned}, but the noise scheduler is {name}, for "
            "which its errors are unknown; calibrate with the scheduler that you sample with",
            SmoothCacheWarning,
            stacklevel=2,
        )
