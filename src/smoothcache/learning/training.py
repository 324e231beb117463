"""State of the routers during training: logits, gradients and price."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..calibration.curves import Calibration
from ..checks import check_number
from ..errors import CalibrationError, InvalidArgumentError

_LARGEST_LOGIT = 8.0  # the sigmoid saturates beyond
_TINY = 1e-30
_BETAS = (0.9, 0.95)  # of Adam; short averages, because there are few generations


class RouterTraining:
    """Adam on the logits of every layer and step.

    Args:
        calibration: Calibration with the layers, their costs and the steps.
        interval: Number of steps between steps that compute everything.
        compute: Budget as a fraction of the MACs; None with a penalty.
        penalty: Fixed price; None with a budget.
        learning_rate: Learning rate of Adam.

    Attributes:
        interval: Number of steps between steps that compute everything.
        price: Penalty of computing all layers of a step, in squared relative error.

    Raises:
        InvalidArgumentError: If not exactly one valid compute or penalty is given.
    """

    def __init__(
        self,
        calibration: Calibration,
        interval: int,
        compute: float | None,
        penalty: float | None,
        learning_rate: float,
    ) -> None:
        if (compute is None) == (penalty is None):
            raise InvalidArgumentError("pass exactly one of compute and penalty")
        if penalty is not None and check_number("penalty", penalty) < 0:
            raise InvalidArgumentError(f"penalty must not be negative, got {penalty}")
        self.interval = interval
        self.price = 0.0 if penalty is None else penalty
        self._target = compute
        self._paths = {layer.path: index for index, layer in enumerate(calibration.layers)}
        self._weights, self._cell_costs = _costs(calibration)
        self._least = self._least_compute(calibration)
        if compute is not None:
            self._check_target(compute)
        shape = (len(self._paths), calibration.num_steps)
        self._slopes = torch.zeros(shape, dtype=torch.float64)
        self._mixed = torch.zeros(shape, dtype=torch.bool)
        self._logits = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self._optimizer = torch.optim.Adam([self._logits], lr=learning_rate, betas=_BETAS)
        self._errors: list[float] = []
        self._calls = self._passes = self._generations = 0
        self._last_error = math.nan

    def _least_compute(self, calibration: Calibration) -> float | None:
        """Returns the smallest possible compute; None if costs are unknown."""
        if self._cell_costs is None:
            return None
        free = [sum(t % self.interval > 0 for t in run[1:]) for run in calibration.steps_run]
        return 1 - float(self._cell_costs @ torch.tensor(free, dtype=torch.float64))

    def _check_target(self, compute: float) -> None:
        if not 0 < check_number("compute", compute) <= 1:
            raise InvalidArgumentError(f"compute must be in (0, 1], got {compute}")
        if self._least is None:
            raise InvalidArgumentError(
                "a budget needs the costs of layers, which the calibration does not have; pass a "
                "penalty instead"
            )
        if compute < self._least:
            raise InvalidArgumentError(
                f"no routers are as cheap as {compute:.3f} of the uncached MACs: with an interval "
                f"of {self.interval} the minimum is {self._least:.3f}; use a larger interval"
            )

    # -------------------------------------------------------------------------------- training

    def shares(self, step: int) -> Tensor:
        """Returns beta of each layer at a step, as a leaf tensor for gradients; [layers]."""
        return self._logits[:, step].detach().float().sigmoid().requires_grad_()

    def index(self, path: str) -> int:
        """Returns the index of a layer."""
        return self._paths[path]

    def count(self, passes: int) -> None:
        """Counts a call of the denoiser and its number of forward and backward passes."""
        self._calls += 1
        self._passes += passes

    def note(
        self, step: int, mixed: Sequence[str], slope: Tensor, squares: float, norm: float
    ) -> None:
        """Records the error and gradients of a call.

        Args:
            step: Step of the call.
            mixed: Paths of the layers that were mixed.
            slope: Gradient of the squared error with respect to beta; [layers].
            squares: Squared error of the denoiser's output.
            norm: Squared norm of the output, which the error is relative to.
        """
        if not (math.isfinite(squares) and bool(slope.isfinite().all())):
            raise CalibrationError(
                f"the denoiser's output with mixed layers, or its gradient, is not finite at step "
                f"{step}; load the model in float32 or bfloat16"
            )
        self._mixed[[self._paths[path] for path in mixed], step] = True
        self._slopes[:, step] += slope.double() / max(norm, _TINY)
        self._errors.append(squares / max(norm, _TINY))

    def end_generation(self) -> None:
        """Takes one optimizer step from all calls of a generation."""
        self._generations += 1
        self._last_error = math.sqrt(sum(self._errors) / max(len(self._errors), 1))
        logits = self._logits.detach()
        moves = logits.sigmoid() * (1 - logits.sigmoid()) * self._mixed
        if self._target is not None:
            self.price = self._balance(moves)
        self._logits.grad = (self._slopes + self.price * self._weights) * moves
        self._optimizer.step()
        self._slopes.zero_()
        self._errors.clear()
        with torch.no_grad():
            self._logits.clamp_(-_LARGEST_LOGIT, _LARGEST_LOGIT)
            if self._target is not None and self._mixed.any():
                self._logits.add_(self._shift(self._target))

    def _balance(self, moves: Tensor) -> float:
        """Returns the weighted median of the gains per MAC.

        At this price, as many MACs gain from more computation as from less.
        """
        gains = (-self._slopes / self._weights).flatten()
        order = gains.argsort()
        weight = (self._weights * moves).flatten()[order].cumsum(0)
        middle = int(torch.searchsorted(weight, weight[-1] / 2))
        return max(float(gains[order[min(middle, len(order) - 1)]]), 0.0)

    def _shift(self, compute: float) -> float:
        """Returns the shift of all logits that meets a compute, found by bisection."""
        low, high = -2 * _LARGEST_LOGIT, 2 * _LARGEST_LOGIT
        for _ in range(50):
            middle = (low + high) / 2
            is_less = (self._compute_of(self._logits.detach() + middle) or 1.0) < compute
            low, high = (middle, high) if is_less else (low, middle)
        return high

    # --------------------------------------------------------------------------------- results

    def values(self) -> npt.NDArray[np.float64]:
        """Returns beta, 1 where a layer was never mixed; [layers, steps]."""
        shares = self._logits.detach().sigmoid()
        return torch.where(self._mixed, shares, 1.0).numpy()

    @property
    def compute(self) -> float | None:
        """Expected fraction of the MACs under the routers; None if costs are unknown."""
        return self._compute_of(self._logits.detach())

    def _compute_of(self, logits: Tensor) -> float | None:
        if self._cell_costs is None:
            return None
        reused = torch.where(self._mixed, 1 - logits.sigmoid(), 0.0)
        return 1 - float((self._cell_costs[:, None] * reused).sum())

    @property
    def cost(self) -> float:
        """Cost so far in uncached generations; a backward pass counts as a forward."""
        return self._generations * self._passes / max(self._calls, 1)

    def progress(self) -> str:
        """Returns the error of the last generation and the compute, for the progress bar."""
        spent = "" if self.compute is None else f", compute {self.compute:.3f}"
        return f"error {self._last_error:.4g}{spent}"


def _costs(calibration: Calibration) -> tuple[Tensor, Tensor | None]:
    """Returns each layer's fraction of the MACs of all layers, and of a run, per step.

    If costs are unknown, layers have equal weights, and the fraction of a run is None.
    """
    macs = [layer.macs for layer in calibration.layers]
    if None in macs or not sum(x or 0 for x in macs) or not calibration.total_macs:
        return torch.full((len(macs), 1), 1 / len(macs), dtype=torch.float64), None
    known = torch.tensor(macs, dtype=torch.float64)
    of_run = known / (calibration.total_macs * calibration.num_steps)
    return (known / known.sum())[:, None], of_run
