"""The routers while they are trained: their logits, what they spend, and the price of that."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ._checks import check_number
from .calibration import Calibration
from .errors import CalibrationError, InvalidArgumentError

_LARGEST_LOGIT = 8.0  # a sigmoid hardly moves beyond
_TINY = 1e-30


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
        price: What computing all layers at a step costs, in squared relative error. If it is to
            follow a budget, the first generation only measures it: what the mean gain was.

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
        self.price = penalty
        self._target = compute
        self._paths = {layer.path: index for index, layer in enumerate(calibration.layers)}
        self._num_steps = calibration.num_steps
        self._weights, self._cell_costs = _costs(calibration)
        self._least = self._least_compute(calibration)
        if compute is not None:
            self._check_target(compute)
        self._logits = [nn.Parameter(torch.zeros(len(self._paths))) for _ in calibration.timesteps]
        self._optimizer = torch.optim.Adam(self._logits, lr=learning_rate)
        self._mixed = np.zeros((len(self._paths), self._num_steps), dtype=bool)
        self._gains: list[float] = []
        self._errors: list[float] = []
        self._calls = self._passes = self._generations = 0
        self._last_error = math.nan

    def _least_compute(self, calibration: Calibration) -> float | None:
        """The compute of reusing wherever that may be; None if costs are not known."""
        if self._cell_costs is None:
            return None
        free = [sum(t % self.interval > 0 for t in run[1:]) for run in calibration.steps_run]
        return 1 - float(np.dot(self._cell_costs, free))

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
        return self._logits[step].detach().sigmoid().requires_grad_()

    def index(self, path: str) -> int:
        """The position of a layer among the shares."""
        return self._paths[path]

    def count(self, passes: int) -> None:
        """Notes a call of the denoiser that took so many passes instead of one."""
        self._calls += 1
        self._passes += passes

    def move(
        self, step: int, mixed: Sequence[str], slope: Tensor, squares: float, norm: float
    ) -> None:
        """One step of descent.

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
        took_part = torch.zeros(len(self._paths), dtype=torch.bool)
        took_part[[self._paths[path] for path in mixed]] = True
        self._mixed[:, step] |= took_part.numpy()
        slope = slope.double() / max(norm, _TINY)
        self._errors.append(squares / max(norm, _TINY))
        if self.price is None:
            self._gains.append(-float(slope.sum() / self._weights[took_part].sum()))
            return
        shares = self._logits[step].detach().double().sigmoid()
        full = (slope + self.price * self._weights) * shares * (1 - shares) * took_part
        self._logits[step].grad = full.to(self._logits[step].dtype)
        self._optimizer.step()
        self._logits[step].grad = None
        with torch.no_grad():
            self._logits[step].clamp_(-_LARGEST_LOGIT, _LARGEST_LOGIT)

    def end_generation(self) -> None:
        """Lets the price follow the budget."""
        self._generations += 1
        if self._errors:
            self._last_error = math.sqrt(sum(self._errors) / len(self._errors))
        self._errors.clear()
        if self._target is None or self._least is None:
            return
        if self.price is None:
            self.price = max(sum(self._gains) / max(len(self._gains), 1), _TINY)
        elif self._least < 1 and (spent := self.compute) is not None:
            self.price *= math.exp((spent - self._target) / (1 - self._least))

    # --------------------------------------------------------------------------------- results

    def values(self) -> npt.NDArray[np.float64]:
        """The shares, 1 where a layer was never free; [layers, steps]."""
        shares = torch.stack([x.detach().double().sigmoid() for x in self._logits], dim=1)
        return np.where(self._mixed, shares.numpy(), 1.0)

    @property
    def compute(self) -> float | None:
        """The fraction of the MACs that the shares stand for; None if costs are not known."""
        if self._cell_costs is None:
            return None
        return 1 - float((self._cell_costs[:, None] * (1 - self.values())).sum())

    @property
    def cost(self) -> float:
        """What was run, in uncached generations; a backward pass counts like a forward."""
        return self._generations * self._passes / max(self._calls, 1)

    def progress(self) -> str:
        """How it goes: error of the denoiser's output in the last generation, and compute."""
        spent = "" if self.compute is None else f", compute {self.compute:.3f}"
        return f"error {self._last_error:.4g}{spent}"


def _costs(calibration: Calibration) -> tuple[Tensor, npt.NDArray[np.float64] | None]:
    """Each layer's part in the MACs of all layers, and in those of a run, for one step of it.

    Layers of unknown cost count alike, and what they are in a run is not known.
    """
    macs = [layer.macs for layer in calibration.layers]
    if None in macs or not sum(x or 0 for x in macs) or not calibration.total_macs:
        return torch.full((len(macs),), 1 / len(macs), dtype=torch.float64), None
    known = np.array(macs, dtype=np.float64)
    of_run = known / (calibration.total_macs * calibration.num_steps)
    return torch.from_numpy(known / known.sum()), of_run
