"""Trajectories of the calibration samples: what was denoised and what the denoiser said.

Planning needs inner products of the outputs alone, N x N numbers a sample. Fitting in closed loop
also needs the latents and outputs themselves; a record without them has them sampled again.
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
    """How a solver combines the outputs of a step, and where the latents are in its input.

    Attributes:
        weights: By branch, the weight of each part of the batch of its output; they sum to 1
            where guidance does not change the scale.
        parts: In how many equal parts the denoiser's input holds the latents.
        channels: How many of the channels (dimension 1) of the outputs are used; None for all.
    """

    weights: tuple[tuple[float, ...], ...]
    parts: int = 1
    channels: int | None = None

    def combined(self, outputs: Sequence[Tensor]) -> Tensor:
        """The output as the solver sees it, in float32.

        Args:
            outputs: Of all calls of a step, by branch.
        """
        total: Tensor | None = None
        for output, weights in zip(outputs, self.weights, strict=True):
            for part, weight in zip(self._cut(output), weights, strict=True):
                term = part.to(torch.float32) * weight
                total = term if total is None else total + term
        if total is None:
            raise CalibrationError("a step without a call of the denoiser cannot be combined")
        return total

    def components(self, outputs: Sequence[Tensor]) -> Tensor:
        """What each branch adds to the combined output, [branches, *latents] in float32."""
        pairs = zip(outputs, self.weights, strict=True)
        return torch.stack(
            [
                part.to(torch.float32) * weight
                for output, weights in pairs
                for part, weight in zip(self._cut(output), weights, strict=True)
            ]
        )

    def latents(self, given: Tensor) -> Tensor:
        """The latents in the input of a denoiser, once."""
        return given.chunk(self.parts)[0] if self.parts > 1 else given

    def _cut(self, output: Tensor) -> Sequence[Tensor]:
        used = output if self.channels is None else output[:, : self.channels]
        return used.chunk(self.parts) if self.parts > 1 else (used,)


@dataclass(frozen=True, eq=False)
class SolverResponses:
    """The response of the latents at every step to the output of every step before.

    Attributes:
        table: h[t, l], how far the latents at step l move when the output at step t moves by one
            unit; the last column is of the latents after the last step; [steps, steps + 1], 0
            where t >= l. Read-only.
        guidance: How the outputs of a step are combined.
        knows_end: Whether the last column was measured. Otherwise it continues the one before.
    """

    table: FloatArray
    guidance: Guidance
    knows_end: bool = True

    @property
    def num_steps(self) -> int:
        return len(self.table)


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The uncached trajectories of some samples, as their solver sees them.

    Attributes:
        responses: Of the solver, measured on the first sample.
        grams: Inner products of the combined outputs, [samples, steps, steps]. Read-only.
        denoisers: Prefix of the denoiser that runs at each step, [steps].
        output_bytes: Bytes of the outputs of a step, all branches together.
        latents: Before each step, [steps, *latents] for each sample; empty if they were not kept.
        outputs: Combined over the guidance branches, alike.

    Raises:
        InvalidArgumentError: If sizes contradict each other or a number is not finite.
    """

    responses: SolverResponses
    grams: FloatArray
    denoisers: tuple[str, ...]
    output_bytes: int = 0
    latents: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()

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
                f"the responses must be [{steps}, {steps + 1}], and 0 where a step does not come "
                f"before another; they have the shape {table.shape}."
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
        """Whether the latents and outputs were kept, and not their inner products alone."""
        return bool(self.latents)

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers, as a file holds them too."""
        numbers = sum(x.nbytes for x in (*self.latents, *self.outputs))
        return numbers + self.grams.nbytes + self.responses.table.nbytes

    def without_latents(self) -> Trajectories:
        """What planning needs alone."""
        return replace(self, latents=(), outputs=())

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
        """The steps at which a denoiser has its first turn."""
        return tuple(
            t for t, name in enumerate(self.denoisers) if not t or name != self.denoisers[t - 1]
        )
