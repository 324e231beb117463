"""Warns of a schedule that does nothing, or that runs where it was not measured."""

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
    """Notices what keeps a schedule from having its effect, and warns once of each.

    Args:
        target: The model.
        schedule: What it runs under.
        tally: What the layers did.
    """

    def __init__(self, target: Target, schedule: Schedule, tally: Tally) -> None:
        self._target = target
        self._schedule = schedule
        self._tally = tally
        self._solvers = {schedule.solver}  # the one that was planned for, and those warned of
        self._ran_outside: dict[str, None] = {}  # layers, while their denoiser did not run
        self._has_warned_of_outside = self._has_warned_of_nothing = False
        self._reused_before = 0

    def begin_generation(self) -> None:
        """Called at the first call of a generation."""
        self._reused_before = self._tally.reused
        self._warn_of_another_solver()

    def end_generation(self, layers: ReusedLayers) -> None:
        """Warns once if a finished generation reused nothing, or bypassed some of the layers."""
        if self._has_warned_of_nothing or self._schedule.is_all_compute:
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
                "smoothcache.observe_layers finds those that do"
            )
        else:
            return
        self._has_warned_of_nothing = True
        warnings.warn(message, SmoothCacheWarning, stacklevel=2)

    def layer_ran_outside(self, path: str, *, is_expected: bool) -> None:
        """Notices a layer that runs while its denoiser's forward does not: it runs in full.

        Args:
            path: The layer's.
            is_expected: Whether its denoiser runs, but outside any generation.
        """
        self._ran_outside[path] = None
        if is_expected or self._has_warned_of_outside:
            return
        self._has_warned_of_outside = True
        warnings.warn(
            f"layer {path!r} ran without its denoiser's forward, so its step cannot be told and "
            "nothing is reused; wrap the function that walks the blocks in an nn.Module whose "
            "forward takes the latents and the timestep, and plan for that module",
            SmoothCacheWarning,
            stacklevel=2,
        )

    def message(self, *, was_called: bool) -> str:
        """What to say at the end of a run that something else than its denoisers took part in.

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
                    f"the pipeline's denoiser was exchanged while enabled: {listed(gone)} is no "
                    f"longer in it, and its successor runs without the schedule; {_ADVICE}"
                )
        if not was_called:
            ran = f", though layers ran without it: {paths}"
            return (
                f"no generation was seen: {listed(list(names.values()))} was never called by a "
                f"sampler{ran * bool(self._ran_outside)}; did another object run? {_ADVICE}"
            )
        if self._ran_outside:
            return (
                f"{len(self._ran_outside)} layers of the schedule also ran outside any generation, "
                f"in full ({paths}); a pipeline with another noise scheduler than the enabled "
                f"one's may have called them: {_ADVICE}"
            )
        return ""

    def _warn_of_another_solver(self) -> None:
        """Warns that errors measured under one noise scheduler do not hold under another."""
        planned, name = self._schedule.solver, self._target.solver
        if planned is None or name is None or name in self._solvers:
            return
        self._solvers.add(name)
        warnings.warn(
            f"the schedule was measured under {planned}, but the noise scheduler is {name}: its "
            "errors are not known there; calibrate with the scheduler that you sample with",
            SmoothCacheWarning,
            stacklevel=2,
        )
