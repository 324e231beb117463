"""Effects of the steps between two computed ones on the state at their end, as inner products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..calibration.trajectory import Trajectories
from ..errors import InvalidArgumentError

FloatArray = npt.NDArray[np.float64]
Aim = Literal["uncached", "converged"]
"""Which run a plan comes close to."""


class Segments:
    """Effects of all segments between computed steps, as inner products.

    Args:
        gram: Inner products of the outputs, summed over the samples, [steps, steps].
        table: Responses of the solver, [steps, steps + 1].
        ends: For each step, the next step of another denoiser, or the number of steps; [steps].
        sensitivities: Weight of an error in the latents at each step and at the end, [steps + 1];
            None for equal weights.
        offsets: Inner products of the outputs, then the offsets of the converged latents, with
            themselves, [2 * steps + 1, 2 * steps + 1]; None to stay close to the uncached states.

    Attributes:
        corrections: Inner products with the outputs of what a segment has to add to come from one
            converged state to the next, [begin, end, steps]; None without offsets.
    """

    def __init__(
        self,
        gram: FloatArray,
        table: FloatArray,
        ends: Sequence[int],
        sensitivities: FloatArray | None = None,
        offsets: FloatArray | None = None,
    ) -> None:
        self.gram, self.table = gram, table
        self.ends = np.array(ends)
        self.num_steps = steps = len(gram)
        t, later = np.arange(steps), np.arange(steps + 1)
        inside = (t[:, None, None] < t) & (t < later[:, None])  # [j, l, t]
        effects = np.where(inside, table.T[None], 0.0)
        if sensitivities is not None:
            effects = effects * sensitivities[:, None]
        self.effects: FloatArray = effects  # [j, l, t]
        self.products: FloatArray = effects @ gram  # <r(j, l), e_t>
        self.squares: FloatArray = np.einsum("jlt,jlt->jl", self.products, effects)
        self.corrections: FloatArray | None = None
        if offsets is not None:
            wanted = _wanted_offsets(table)  # [j, l, t]
            self.corrections = wanted @ offsets[steps:, :steps]
            if sensitivities is not None:
                wanted = wanted * sensitivities[:, None]
            both = np.concatenate([effects, wanted], axis=-1)
            products = both @ offsets
            self.squares = np.einsum("jlt,jlt->jl", products, both)
            self.products = products[..., :steps].copy()
            self.products[t, t + 1] = 0.0  # without a reused step there are no weights

    @classmethod
    def of(
        cls, trajectories: Trajectories, early_weight: float = 1.0, target: Aim = "uncached"
    ) -> Segments:
        """Returns the segments of all samples, with errors weighted as in ``plan_trajectory``."""
        steps = trajectories.num_steps
        firsts = [*trajectories.first_steps(), steps]
        ends = [next(x for x in firsts if x > t) for t in range(steps)]
        sensitivities = early_weight ** np.linspace(1, 0, steps + 1)
        gram = trajectories.grams.sum(axis=0)
        offsets = None if target == "uncached" else _offset_products(trajectories, gram)
        return cls(gram, trajectories.responses.table, ends, sensitivities, offsets)

    def regressors(self, computed: Sequence[int], max_lag: int) -> list[int]:
        """Returns the last computed steps of the same denoiser, the newest first."""
        newest = computed[-1]
        return [t for t in reversed(computed[-max_lag:]) if self.ends[t] == self.ends[newest]]


def _wanted_offsets(table: FloatArray) -> FloatArray:
    """Returns how much of each offset a segment has to add, [begin, end, steps + 1].

    The offset at its end, less the offset at its beginning as the solver carries it on. A
    first-order solver carries a change of the latents on in proportion to the response of an
    earlier output; for others this is an approximation.
    """
    steps = len(table)
    wanted = np.zeros((steps, steps + 1, steps + 1))
    for begin in range(steps):
        later = np.arange(begin + 1, steps + 1)
        wanted[begin, later, later] += 1.0
        if begin:
            own = table[begin - 1, begin]
            carried = table[begin - 1, later] / own if own else np.ones(len(later))
            wanted[begin, later, begin] -= carried
    return wanted


def _offset_products(trajectories: Trajectories, gram: FloatArray) -> FloatArray:
    """Returns the inner products of outputs and offsets, [2 * steps + 1, 2 * steps + 1]."""
    if not trajectories.offsets:
        raise InvalidArgumentError(
            "the calibration has no converged trajectories; calibrate with converged_steps=..., "
            'or plan with target="uncached".'
        )
    steps = trajectories.num_steps
    products = np.zeros((2 * steps + 1, 2 * steps + 1))
    for pair in zip(trajectories.outputs, trajectories.offsets, strict=True):
        flat = np.concatenate([x.flatten(1).double().numpy() for x in pair])
        products += flat @ flat.T
    products[:steps, :steps] = gram
    return products


def relative_error(segments: Segments, cost: float) -> float:
    """Returns the root of a sum of costs, relative to the effect of all outputs on the end."""
    last = segments.table[:, -1]
    whole = float(last @ segments.gram @ last)
    return float(np.sqrt(cost / whole)) if whole > 0 else 0.0
