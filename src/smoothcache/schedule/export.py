"""Whole-step plans in the form that other runtimes take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..checks import listed
from ..errors import InvalidArgumentError
from ..layers.layer import CacheLayer
from ..steps.predictors import PREDICTORS
from .row import Row

FORMATS = ("cache-dit",)
"""What ``Schedule.export`` can write."""


@dataclass(frozen=True)
class StepPlan:
    """Which steps run the whole denoiser, as cache-dit and SGLang Diffusion take it.

    Checked against cache-dit 1.5.3. In static policy it still computes the first blocks of a
    cached step (``Fn_compute_blocks``, at least 1), so its results come near those of a run here
    and do not equal them.

    >>> plan = StepPlan((1, 1, 0, 1, 0, 0))
    >>> plan.compute_bins, plan.cache_bins
    ([2, 1], [1, 2])

    Attributes:
        mask: 1 where the denoiser is computed, 0 where its output is reused; [steps].
        taylorseer_order: Order of cache-dit's Taylor calibrator; 0 for none, which holds values.
    """

    mask: tuple[int, ...]
    taylorseer_order: int = 0

    @property
    def steps_computation_mask(self) -> list[int]:
        """The mask as a list, as cache-dit takes it."""
        return list(self.mask)

    @property
    def compute_bins(self) -> list[int]:
        """Lengths of the runs of computed steps; SGLang's ``scm_compute_bins``."""
        return self._runs_of(1)

    @property
    def cache_bins(self) -> list[int]:
        """Lengths of the runs of reused steps between them; SGLang's ``scm_cache_bins``."""
        return self._runs_of(0)

    def cache_config(self) -> dict[str, Any]:
        """Arguments of cache-dit's ``DBCacheConfig`` under which exactly this plan is run.

        Returns:
            The number of steps, the mask, the static policy, and no steps of warm-up.
        """
        return {
            "num_inference_steps": len(self.mask),
            "steps_computation_mask": self.steps_computation_mask,
            "steps_computation_policy": "static",
            "max_warmup_steps": 0,
        }

    def sampling_params(self) -> dict[str, Any]:
        """The bins under the names that SGLang Diffusion has for them in a request.

        Returns:
            ``scm_compute_bins`` and ``scm_cache_bins``.
        """
        return {
            "scm_compute_bins": self.compute_bins,
            "scm_cache_bins": self.cache_bins,
        }

    def _runs_of(self, value: int) -> list[int]:
        return [len(list(run)) for step, run in groupby(self.mask) if step == value]


def step_plan(rows: Mapping[str, Row], layers: Sequence[CacheLayer] | None) -> StepPlan:
    """The plan of rows that reuse the denoiser's whole output.

    Args:
        rows: Layer path -> row.
        layers: The layers, of the kind "model".

    Raises:
        InvalidArgumentError: If the rows cannot be told by one mask over the steps.
    """
    if layers is None:
        raise InvalidArgumentError(
            "this schedule does not know its layers, so whether it reuses whole steps is unknown; "
            "bind it first: schedule.bind(find_layers(model, granularity='model'))."
        )
    finer = sorted({layer.kind for layer in layers if layer.kind != "model"})
    if finer:
        raise InvalidArgumentError(
            f"a mask over the steps can't express reuse of {listed(finer)}; only schedules at the "
            "granularity 'model' can be exported, such as those of plan_trajectory or "
            "Schedule.uniform(..., granularity='model')."
        )
    distinct = list(dict.fromkeys(rows.values()))
    if len(distinct) > 1:
        raise InvalidArgumentError(
            f"the denoisers {listed(rows)} have {len(distinct)} different rows, and a mask over "
            "the steps is one row; export a schedule that was planned for each denoiser alone."
        )
    (row,) = distinct
    return StepPlan(tuple(map(int, row.computed)), _taylor_order(row))


def _taylor_order(row: Row) -> int:
    if all(row.computed):
        return 0
    if row.weights is not None or row.gains is not None:
        what = "fitted weights" if row.weights is not None else "gains"
        raise InvalidArgumentError(
            f"a mask over the steps can't express {what}; plan with the predictor 'hold', 'taylor' "
            "or 'taylor2', or take the computed steps alone: row.moved(row.computed) of a row "
            "with fitted weights has the predictor 'taylor2'."
        )
    if row.axis != "step":
        raise InvalidArgumentError(
            f"the predictor {row.predictor!r} runs over the noise level, and those of cache-dit "
            "run over the step; plan with the predictor 'hold', 'taylor' or 'taylor2'."
        )
    return PREDICTORS[row.predictor].order
