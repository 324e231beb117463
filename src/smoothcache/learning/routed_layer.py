"""One layer under a router: mixes computed and reused outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model.outputs import taken_apart
from ..steps.predictors import PREDICTORS, extrapolation_weights
from ..tracking.branches import Place


class RoutedLayer:
    """Handler of one layer that keeps outputs and mixes them with computed outputs.

    Between ``begin`` and ``end`` it keeps computed outputs. If a share is given, it returns
    share * computed + (1 - share) * reused, and keeps the computed output only if the share is
    above one half, as a schedule would. At any other time the layer runs unchanged.

    Args:
        predictor: Name of the predictor.

    Attributes:
        mixed: Whether the layer has mixed outputs since ``begin``.
    """

    def __init__(self, predictor: str) -> None:
        self._order = PREDICTORS[predictor].order
        self._kept: dict[Place, list[tuple[int, list[Tensor]]]] = {}
        self._share: Tensor | None = None
        self._active = self.mixed = False
        self._step = self._branch = self._use = 0

    def begin(self, step: int, branch: int, share: Tensor | None = None) -> None:
        """Prepares for a call of the denoiser."""
        self._step, self._branch, self._use = step, branch, 0
        self._share = share
        self._active, self.mixed = True, False

    def end(self) -> None:
        """Ends a call; the layer runs unchanged until the next one."""
        self._active, self._share = False, None

    def forget(self) -> None:
        """Drops all kept outputs."""
        self._kept.clear()

    def has_kept(self, branch: int) -> bool:
        """Whether an output is kept for this branch."""
        return any(place[0] == branch for place in self._kept)

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        output = forward(*args, **kwargs)
        if not self._active:
            return output
        place = (self._branch, self._use)
        self._use += 1
        leaves, rebuild = taken_apart(output)
        computed = _floats(leaves)
        history = self._kept.get(place, [])
        if self._share is None or not history or not _same_form(computed, history[-1][1]):
            self._keep(place, computed)
            return output
        mixed = iter(self._mixed(computed, history, self._share))
        if float(self._share.detach()) > 0.5:
            self._keep(place, computed)
        self.mixed = True
        return rebuild([next(mixed) if _is_float(leaf) else leaf for leaf in leaves])

    def _mixed(
        self, computed: list[Tensor], history: list[tuple[int, list[Tensor]]], share: Tensor
    ) -> list[Tensor]:
        weights = extrapolation_weights([step for step, _ in history], self._step)
        columns = zip(*(values for _, values in history), strict=True)
        reused = [
            sum(weight * value for weight, value in zip(weights, column, strict=True))
            for column in columns
        ]
        return [
            torch.lerp(old, new, share.to(new.device, new.dtype))
            for old, new in zip(reused, computed, strict=True)
        ]

    def _keep(self, place: Place, values: list[Tensor]) -> None:
        history = self._kept.setdefault(place, [])
        if history and not _same_form(values, history[-1][1]):
            history.clear()
        # Copies, because the model may modify its outputs in place.
        history.append((self._step, [value.detach().clone() for value in values]))
        del history[: -self._order - 1]


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _floats(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if _is_float(leaf)]


def _same_form(a: list[Tensor], b: list[Tensor]) -> bool:
    return [(x.shape, x.dtype) for x in a] == [(x.shape, x.dtype) for x in b]
