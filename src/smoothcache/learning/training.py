"""The routers while they are trained: their logits, what they spend, and the price of that."""

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

_LARGEST_LOGIT = 8.0  # a sigmoid hardly moves beyond
_TINY = 1e-30
_MEMORY = (0.9, 0.95)  # of Adam; short, because there are few generations


class RouterTraining:
    """Adam on the logits of every layer and step.

    Args:
        calibration: Gives layers, costs and steps.
        interval: Steps from one that computes everything to the next.
        compute: The fraction of the MACs that the price aims at; or None.
        penalty: The price; or None.
        learning_rate: Of Adam.

    Attributes:
        interval: As given.
        price: What computing all layers at a step costs, in squared relative error.

    Raises:
        InvalidArgumentError: If compute and penalty are not one number that makes sense.
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
            raise InvalidArgumentError("give exactly one of compute and penalty")
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
        self._optimizer = torch.optim.Adam([self._logits], lr=learning_rate, betas=_MEMORY)
        self._errors: list[float] = []
        self._calls = self._passes = self._generations = 0
        self._last_error = math.nan

    def _least_compute(self, calibration: Calibration) -> float | None:
        """The compute of reusing wherever that may be; None if costs are not known."""
        if self._cell_costs is None:
            return None
        free = [sum(t % self.interval > 0 for t in run[1:]) for run in calibration.steps_run]
        return 1 - float(self._cell_costs @ torch.tensor(free, dtype=torch.float64))

    def _check_target(self, compute: float) -> None:
        if not 0 < check_number("compute", compute) <= 1:
            raise InvalidArgumentError(f"compute must be in (0, 1], got {compute}")
        if self._least is None:
            raise InvalidArgumentError(
                "the calibration does not know what the layers cost, so no budget can be kept; "
                "give a penalty instead"
            )
        if compute < self._least:
            raise InvalidArgumentError(
                f"no routers are as cheap as {compute:.3f} of the uncached MACs: with an interval "
                f"of {self.interval} the least is {self._least:.3f}; give a larger interval"
            )

    # -------------------------------------------------------------------------------- training

    def shares(self, step: int) -> Tensor:
        """What each layer computes of itself at a step, for gradients to be taken of; [layers]."""
        return self._logits[:, step].detach().float().sigmoid().requires_grad_()

    def index(self, path: str) -> int:
        """The position of a layer among the shares."""
        return self._paths[path]

    def count(self, passes: int) -> None:
        """Notes a call of the denoiser that took so many passes instead of one."""
        self._calls += 1
        self._passes += passes

    def note(
        self, step: int, mixed: Sequence[str], slope: Tensor, squares: float, norm: float
    ) -> None:
        """Takes in what came of a call.

        Args:
            step: Of the generation.
            mixed: The layers that took part.
            slope: Of the squared error, by the shares; [layers].
            squares: The squared error of the denoiser's output.
            norm: What it is relative to.
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
        """One step of descent, from all calls of a generation."""
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
        """The price at which as much is to be computed more as is to be computed less."""
        gains = (-self._slopes / self._weights).flatten()
        order = gains.argsort()
        weight = (self._weights * moves).flatten()[order].cumsum(0)
        middle = int(torch.searchsorted(weight, weight[-1] / 2))
        return max(float(gains[order[min(middle, len(order) - 1)]]), 0.0)

    def _shift(self, compute: float) -> float:
        """What to add to all logits, so that they stand for a compute; found by bisection."""
        low, high = -2 * _LARGEST_LOGIT, 2 * _LARGEST_LOGIT
        for _ in range(50):
            middle = (low + high) / 2
            is_less = (self._compute_of(self._logits.detach() + middle) or 1.0) < compute
            low, high = (middle, high) if is_less else (low, middle)
        return high

    # --------------------------------------------------------------------------------- results

    def values(self) -> npt.NDArray[np.float64]:
        """The shares, 1 where a layer was never free; [layers, steps]."""
        shares = self._logits.detach().sigmoid()
        return torch.where(self._mixed, shares, 1.0).numpy()

    @property
    def compute(self) -> float | None:
        """The fraction of the MACs that the shares stand for; None if costs are not known."""
        return self._compute_of(self._logits.detach())

    def _compute_of(self, logits: Tensor) -> float | None:
        if self._cell_costs is None:
            return None
        reused = torch.where(self._mixed, 1 - logits.sigmoid(), 0.0)
        return 1 - float((self._cell_costs[:, None] * reused).sum())

    @property
    def cost(self) -> float:
        """What was run, in uncached generations; a backward pass counts like a forward."""
        return self._generations * self._passes / max(self._calls, 1)

    def progress(self) -> str:
        """How it goes: error of the denoiser's output in the last generation, and compute."""
        spent = "" if self.compute is None else f", compute {self.compute:.3f}"
        return f"error {self._last_error:.4g}{spent}"


def _costs(calibration: Calibration) -> tuple[Tensor, Tensor | None]:
    """Each layer's part in the MACs of all layers, and in those of a run, for one step of it.

    Layers of unknown cost count alike, and what they are in a run is not known.
    """
    macs = [layer.macs for layer in calibration.layers]
    if None in macs or not sum(x or 0 for x in macs) or not calibration.total_macs:
        return torch.full((len(macs), 1), 1 / len(macs), dtype=torch.float64), None
    known = torch.tensor(macs, dtype=torch.float64)
    of_run = known / (calibration.total_macs * calibration.num_steps)
    return (known / known.sum())[:, None], of_run
