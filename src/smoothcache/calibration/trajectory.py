"""Trajectories of the calibration samples: their latents and the denoiser's outputs.

Planning needs only inner products of the outputs, N x N numbers per sample. Closed-loop fitting
also needs the latents and outputs; if they were not recorded, they are sampled again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import CalibrationError, InvalidArgumentError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Guidance:
    """How a solver combines the outputs of a step, and the layout of latents in the batch.

    Attributes:
        weights: Weight of each part of the output's batch, for each branch; the weights sum to 1
            unless guidance changes the scale.
        parts: Number of copies of the latents in the denoiser's input batch.
        channels: Number of output channels (dimension 1) that are used; None for all.
    """

    weights: tuple[tuple[float, ...], ...]
    parts: int = 1
    channels: int | None = None

    def combined(self, outputs: Sequence[Tensor]) -> Tensor:
        """Returns the combined output of a step in float32.

        Args:
            outputs: Outputs of all calls of a step, by branch.
        """
        total: Tensor | None = None
        for output, weights in zip(outputs, self.weights, strict=True):
            for part, weight in zip(self._cut(output), weights, strict=True):
                term = part.to(torch.float32) * weight
                total = term if total is None else total + term
        if total is None:
            raise CalibrationError("a step has no denoiser call, so it has no output to combine")
        return total

    def components(self, outputs: Sequence[Tensor]) -> Tensor:
        """Returns each branch's term of the combined output, [branches, *latents] in float32."""
        pairs = zip(outputs, self.weights, strict=True)
        return torch.stack(
            [
                part.to(torch.float32) * weight
                for output, weights in pairs
                for part, weight in zip(self._cut(output), weights, strict=True)
            ]
        )

    def latents(self, batch: Tensor) -> Tensor:
        """Returns one copy of the latents from the denoiser's input batch."""
        return batch.chunk(self.parts)[0] if self.parts > 1 else batch

    def _cut(self, output: Tensor) -> Sequence[Tensor]:
        used = output if self.channels is None else output[:, : self.channels]
        return used.chunk(self.parts) if self.parts > 1 else (used,)


@dataclass(frozen=True, eq=False)
class SolverResponses:
    """The response of the latents at every step to the output of every step before.

    Attributes:
        table: h[t, l], the change of the latents at step l per unit change of the output at step
            t; the last column is for the latents after the last step; [steps, steps + 1], 0 where
            t >= l. Read-only.
        guidance: How the outputs of a step are combined.
        knows_end: Whether the last column was measured; otherwise it is extrapolated.
    """

    table: FloatArray
    guidance: Guidance
    knows_end: bool = True

    @property
    def num_steps(self) -> int:
        return len(self.table)


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The uncached trajectories of the calibration set, with outputs combined by guidance.

    Attributes:
        responses: Responses of the solver, measured on the first sample.
        grams: Inner products of the combined outputs, [samples, steps, steps]. Read-only.
        denoisers: Prefix of the denoiser that runs at each step, [steps].
        output_bytes: Bytes of the outputs of a step, over all branches.
        latents: Latents before each step, [steps, *latents] per sample; empty if not kept.
        outputs: Combined outputs of each step, [steps, *latents] per sample; empty if not kept.
        offsets: Converged latents less the recorded ones, before each step and after the last one,
            [steps + 1, *latents] per sample; empty if not measured.

    Raises:
        InvalidArgumentError: If shapes contradict each other or a number is not finite.
    """

    responses: SolverResponses
    grams: FloatArray
    denoisers: tuple[str, ...]
    output_bytes: int = 0
    latents: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    offsets: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        steps = self.num_steps
        grams = np.array(self.grams, dtype=np.float64)
        if grams.ndim != 3 or grams.shape[1:] != (steps, steps) or not len(grams):
            raise InvalidArgumentError(
                f"the inner products have the shape {grams.shape}, expected [samples, {steps}, "
                f"{steps}]."
            )
        table = self.responses.table
        if table.shape != (steps, steps + 1) or np.any(np.tril(table)):
            raise InvalidArgumentError(
                f"the responses must have the shape [{steps}, {steps + 1}] and be 0 on and below "
                f"the diagonal; they have the shape {table.shape}."
            )
        for name, values in (("inner products", grams), ("responses", table)):
            if not np.isfinite(values).all():
                raise InvalidArgumentError(f"the {name} of the trajectories are not all finite.")
        if len(self.latents) != len(self.outputs) or len(self.latents) not in (0, len(grams)):
            raise InvalidArgumentError(
                f"there are latents of {len(self.latents)} and outputs of {len(self.outputs)} "
                f"samples, expected {len(grams)} or none."
            )
        for latents, outputs in zip(self.latents, self.outputs, strict=True):
            if len(latents) != steps or len(outputs) != steps:
                raise InvalidArgumentError(
                    f"a trajectory has {len(latents)} latents and {len(outputs)} outputs, "
                    f"expected one of each for all of {steps} steps."
                )
            if not bool(torch.isfinite(latents).all() and torch.isfinite(outputs).all()):
                raise InvalidArgumentError("the latents or outputs of a trajectory are not finite.")
        wanted = [(steps + 1, *x.shape[1:]) for x in self.latents]
        if self.offsets and [tuple(x.shape) for x in self.offsets] != wanted:
            raise InvalidArgumentError(
                "the offsets of converged trajectories must have the shapes of the latents, and "
                f"{steps + 1} steps."
            )
        if not all(bool(torch.isfinite(x).all()) for x in self.offsets):
            raise InvalidArgumentError("the offsets of a converged trajectory are not finite.")
        grams.flags.writeable = False
        object.__setattr__(self, "grams", grams)

    @property
    def num_steps(self) -> int:
        return len(self.denoisers)

    @property
    def num_samples(self) -> int:
        return len(self.grams)

    @property
    def has_latents(self) -> bool:
        """Whether latents and outputs were kept, in addition to inner products."""
        return bool(self.latents)

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes, also in a file."""
        numbers = sum(x.nbytes for x in (*self.latents, *self.outputs, *self.offsets))
        return numbers + self.grams.nbytes + self.responses.table.nbytes

    def without_latents(self) -> Trajectories:
        """Returns the trajectories with only the data that planning needs."""
        return replace(self, latents=(), outputs=(), offsets=())

    def of_samples(self, numbers: Sequence[int]) -> Trajectories:
        """The trajectories of some samples, in the order in which their numbers are given."""
        chosen = list(numbers)
        return replace(
            self,
            grams=self.grams[chosen],
            latents=tuple(self.latents[i] for i in chosen) if self.latents else (),
            outputs=tuple(self.outputs[i] for i in chosen) if self.outputs else (),
        )

    def followed_by(self, others: Trajectories) -> Trajectories:
        """These trajectories and others of the same sampler, with latents if both have them."""
        has_latents = self.has_latents and others.has_latents
        return replace(
            self,
            grams=np.concatenate([self.grams, others.grams]),
            latents=(*self.latents, *others.latents) if has_latents else (),
            outputs=(*self.outputs, *others.outputs) if has_latents else (),
        )

    def first_steps(self) -> tuple[int, ...]:
        """Returns the steps at which a denoiser takes over."""
        return tuple(
            t for t, name in enumerate(self.denoisers) if not t or name != self.denoisers[t - 1]
        )
