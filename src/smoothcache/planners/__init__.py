"""Planners: one method per file.

A new planner is a file with a function from a calibration to a schedule, and an entry in
``PLANNERS``, which adds it to the shared tests. ``plan_learned`` and ``plan_trajectory`` have no
entry, because they need more than error curves: trained routers and recorded trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from ..calibration.curves import Calibration
from ..schedule.schedule import Schedule
from .threshold import plan as plan
from .timesteps import TimestepGrid as TimestepGrid
from .timesteps import plan_timesteps as plan_timesteps
from .trajectory import plan_trajectory as plan_trajectory
from .uniform import plan_uniform as plan_uniform

PLANNERS: Mapping[str, Callable[[Calibration], Schedule]] = MappingProxyType(
    {
        "everything": partial(plan_uniform, interval=1),
        "uniform-2": partial(plan_uniform, interval=2),
        "uniform-2-last": partial(plan_uniform, interval=2, last=True),
        "uniform-3-taylor": partial(plan_uniform, interval=3, predictor="taylor"),
        "threshold-kind": partial(plan, alpha=0.18),
        "threshold-block": partial(plan, alpha=0.18, per="block"),
    }
)
"""Example settings of each method, by name."""
