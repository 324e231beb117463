"""Measures a solver's response to the denoiser's outputs by replaying it without the model.

For common solvers the latents are linear in the outputs, with scalar coefficients:

    x_l = c_l x_0 + noise + sum_{t < l} h[t, l] e_t,      e_t = sum_b a_b E_(t, b)

where the sum over b is guidance: E_(t, b) are the outputs of the calls, or of the parts of one
batched call, of step t. The responses h and the coefficients a_b are measured with the user's own
``sample(i)``. Recorded outputs are replayed with random perturbations. Least squares decomposes the
change of the latents at every step into these perturbations, which is possible because random
tensors are nearly orthogonal. A few replays therefore measure any solver, also outside diffusers.
One more replay with different perturbations verifies the equation above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError
from ..tracking.playback import Generation, Place, Playback, Tape
from .trajectory import FloatArray, Guidance, SolverResponses

TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
_ROUNDINGS = 4  # tolerated error of the latents, in multiples of the dtype's epsilon
_MAX_PARTS = 4  # largest number of guidance branches in a batch
_ELEMENTS_PER_RESPONSE = 20  # latent elements needed per response of a step


def calls_of(tape: Tape) -> dict[int, list[Place]]:
    """Returns the calls of every step, in branch order.

    Raises:
        CalibrationError: If steps differ in their calls, so that their outputs cannot be combined.
    """
    steps: dict[int, list[Place]] = {}
    for place in tape.outputs:
        steps.setdefault(place.step, []).append(place)
    ordered = {step: sorted(places, key=lambda x: x.branch) for step, places in steps.items()}
    counts = {step: len(places) for step, places in ordered.items()}
    if len(set(counts.values())) > 1:
        odd = next(step for step in counts if counts[step] != counts[0])
        raise CalibrationError(
            f"the denoiser is called {counts[0]} times at step 0 and {counts[odd]} times at step "
            f"{odd} (guidance in some steps only, or a solver with two calls per step), so one "
            "linear combination of outputs cannot apply to all steps; pass trajectory=False"
        )
    for step, places in ordered.items():
        if [place.branch for place in places] != list(range(len(places))):
            raise CalibrationError(
                f"step {step} has other guidance branches than step 0, so their outputs cannot be "
                "compared; pass trajectory=False"
            )
        if len({place.denoiser for place in places}) > 1:
            raise CalibrationError(
                f"two denoisers run at step {step}, and their outputs cannot be combined; pass "
                "trajectory=False"
            )
    return ordered


def measure_responses(
    model: Any, generate: Callable[[], Any], tape: Tape, recorded: Generation
) -> SolverResponses:
    """Measures the responses of the sampler's solver with a few replays.

    Args:
        model: Pipeline or module.
        generate: Runs the recorded generation again.
        tape: Recorded outputs.
        recorded: Recorded latents and timesteps.

    Raises:
        CalibrationError: If the sampler is not deterministic, or not linear in the outputs with
            scalar coefficients.
    """
    return _Measurement(model, generate, tape, recorded).result()


class _Measurement:
    """Replays a generation with randomly perturbed outputs and solves for the responses."""

    def __init__(
        self, model: Any, generate: Callable[[], Any], tape: Tape, recorded: Generation
    ) -> None:
        self._generate = generate
        self._tape = tape
        self._calls = calls_of(tape)
        self._steps = len(recorded.latents)
        self._playback = Playback(model, recorded.timesteps)
        self._tolerance = max(TOLERANCE.get(tape.main(x).dtype, 2e-3) for x in tape.outputs)
        self._rounding = _ROUNDINGS * torch.finfo(recorded.dtype).eps
        self._base = self._play({})
        self._refuse_randomness(recorded)

    def result(self) -> SolverResponses:
        perturbations, moved = self._perturbed(seed=0)
        guidance = self._guidance(perturbations, moved)
        combined, changes = [self._combined(perturbations, guidance)], [moved]
        # Small random tensors are not orthogonal enough to separate all steps.
        replays = -(-_ELEMENTS_PER_RESPONSE * self._steps // combined[0][0].numel())
        for seed in range(1, min(replays, self._steps)):
            perturbations, moved = self._perturbed(seed)
            combined.append(self._combined(perturbations, guidance))
            changes.append(moved)
        table = self._solved(combined, changes, guidance)
        knows_end = changes[0][self._steps] is not None
        if not knows_end:
            table[:, -1] = _extrapolated(table)
        table.flags.writeable = False
        responses = SolverResponses(table, guidance, knows_end)
        perturbations, moved = self._perturbed(seed=-1)  # not used to solve for the table
        self._check(responses.table, self._combined(perturbations, guidance), moved, guidance)
        return responses

    def _solved(
        self,
        combined: Sequence[Sequence[Tensor]],
        changes: Sequence[Sequence[Tensor | None]],
        guidance: Guidance,
    ) -> FloatArray:
        """Solves for the table that maps changes of the outputs to changes of the latents."""
        steps = self._steps
        flat = [
            torch.stack([x.flatten() for x in perturbations]).double() for perturbations in combined
        ]
        gram = sum((x @ x.T for x in flat), torch.zeros(())).cpu().numpy()
        table = np.zeros((steps, steps + 1))
        for later in range(1, steps + 1):
            right = np.zeros(later)
            for perturbations, columns, moved in zip(combined, flat, changes, strict=True):
                change = moved[later]
                if change is not None:
                    latents = _in_shape_of(perturbations[0], change, guidance).flatten().double()
                    right += (columns[:later] @ latents).cpu().numpy()
            table[:later, later] = np.linalg.lstsq(gram[:later, :later], right, rcond=None)[0]
        for perturbations, moved in zip(combined, changes, strict=True):
            self._check(table, perturbations, moved, guidance)
        return table

    # ------------------------------------------------------------------------------- replays

    def _play(self, changed: Mapping[Place, Tensor]) -> Generation:
        return self._playback.run(
            self._generate,
            lambda place, _: self._tape.played(place, changed),
            wants_end=True,
        )

    def _moved(self, generation: Generation) -> list[Tensor | None]:
        """Returns the change of the latents at every step and after the last step."""
        pairs = zip(generation.latents, self._base.latents, strict=True)
        moved: list[Tensor | None] = [a - b for a, b in pairs]
        ends = generation.end, self._base.end
        moved.append(None if ends[0] is None or ends[1] is None else ends[0] - ends[1])
        return moved

    def _perturbed(self, seed: int) -> tuple[dict[Place, Tensor], list[Tensor | None]]:
        """Perturbs all outputs; returns the perturbations and the changes of the latents."""
        generator = torch.Generator().manual_seed(seed % 2**31)
        perturbations, changed = {}, {}
        for places in self._calls.values():
            for place in places:
                main = self._tape.main(place)
                size = main.float().square().mean().sqrt()
                noise = torch.randn(main.shape, generator=generator).to(main.device)
                changed[place] = (main.float() + noise * torch.where(size > 0, size, 1.0)).to(
                    main.dtype
                )
                perturbations[place] = changed[place].float() - main.float()
        return perturbations, self._moved(self._play(changed))

    def _combined(self, perturbations: Mapping[Place, Tensor], guidance: Guidance) -> list[Tensor]:
        """Returns the perturbations of every step, combined by guidance."""
        return [
            guidance.combined([perturbations[place] for place in self._calls[step]])
            for step in range(self._steps)
        ]

    # ------------------------------------------------------------------------------ guidance

    def _guidance(
        self, changes: Mapping[Place, Tensor], moved: Sequence[Tensor | None]
    ) -> Guidance:
        """Derives how outputs are combined from the first step, which alone changes the second."""
        change = moved[1]
        if change is None or not float(change.abs().max()):
            raise CalibrationError(
                "the latents do not change with the denoiser's first output, so the solver's "
                "responses cannot be measured; pass trajectory=False"
            )
        perturbations = [changes[place] for place in self._calls[0]]
        parts = _parts(change, perturbations)
        channels = _channels(change, perturbations)
        plain = Guidance(tuple((1.0,) * parts for _ in perturbations), parts, channels)
        columns = [
            part.float().flatten()
            for perturbation in perturbations
            for part in plain._cut(perturbation)
        ]
        wanted = plain.latents(change).flatten()
        if any(len(column) != len(wanted) for column in columns):
            raise CalibrationError(
                f"the denoiser's output {list(perturbations[0].shape)} does not have the shape of "
                f"the latents {list(change.shape)}; pass trajectory=False"
            )
        found = _least_squares(columns, wanted)
        total = float(found.sum())
        scale = total if abs(total) > 1e-3 * float(np.abs(found).sum()) else float(found[0])
        weights = (found / scale).reshape(len(perturbations), parts)
        return Guidance(tuple(tuple(row) for row in weights.tolist()), parts, channels)

    # ------------------------------------------------------------------------------- refusals

    def _refuse_randomness(self, recorded: Generation) -> None:
        if len(self._base.latents) != self._steps:
            raise CalibrationError(
                f"sample(i) ran {self._steps} steps, but {len(self._base.latents)} when it ran "
                "again; it must run the same generation every time"
            )
        for step, (a, b) in enumerate(zip(recorded.latents, self._base.latents, strict=True)):
            if a.shape != b.shape or _distance(b, a) > self._tolerance + self._rounding:
                raise CalibrationError(
                    f"sample(i) is not deterministic: with the same denoiser outputs, its latents "
                    f"at step {step} differ from the first run; seed every generator in sample(i), "
                    "or pass trajectory=False"
                )

    def _check(
        self,
        table: FloatArray,
        perturbations: Sequence[Tensor],
        moved: Sequence[Tensor | None],
        guidance: Guidance,
    ) -> None:
        """Refuses a sampler whose latents differ from the table's prediction."""
        for later in range(1, self._steps + 1):
            change = moved[later]
            if change is None:
                continue
            predicted = sum(
                (perturbations[t] * float(table[t, later]) for t in range(later)),
                torch.zeros_like(perturbations[0]),
            )
            found = _in_shape_of(predicted, change, guidance)
            residual, size = float((found - predicted).norm()), float(found.norm())
            if residual > self._tolerance * 5 * size + self._rounding_error(later):
                raise self._not_linear(
                    f"perturbed outputs change the latents at step {later} by more than a linear "
                    f"combination of the perturbations (relative residual {residual / size:.2g})"
                )

    def _rounding_error(self, step: int) -> float:
        """Returns the largest difference of the latents at a step caused by rounding."""
        last = min(step, self._steps - 1)
        return self._rounding * float(self._base.latents[last].norm())

    def _not_linear(self, what: str) -> CalibrationError:
        return CalibrationError(
            f"the sampler is not linear in the denoiser's outputs: {what}. Possible causes are "
            "thresholding, clipping (clip_sample) and rescaled or varying guidance; turn them "
            "off, or pass trajectory=False"
        )


def _parts(change: Tensor, perturbations: Sequence[Tensor]) -> int:
    """Returns the number of equal parts in a change of the denoiser's input."""
    if any(len(perturbation) != len(change) for perturbation in perturbations):
        return 1
    scale = float(change.abs().max())
    for parts in range(_MAX_PARTS, 1, -1):
        if len(change) % parts == 0:
            first, *others = change.chunk(parts)
            if all(float((x - first).abs().max()) <= 1e-4 * scale for x in others):
                return parts
    return 1


def _channels(change: Tensor, perturbations: Sequence[Tensor]) -> int | None:
    """Returns the number of latent channels if the outputs have more, otherwise None."""
    perturbation = perturbations[0]
    if (
        perturbation.ndim == change.ndim
        and perturbation.ndim > 2
        and perturbation.shape[1] > change.shape[1]
    ):
        return change.shape[1]
    return None


def _in_shape_of(like: Tensor, change: Tensor, guidance: Guidance) -> Tensor:
    """Returns one copy of a change of the denoiser's input, or of the final latents."""
    latents = change if change.shape == like.shape else guidance.latents(change)
    if latents.shape != like.shape:
        raise CalibrationError(
            f"the latents have the shape {list(latents.shape)}, but the denoiser's outputs have "
            f"the shape {list(like.shape)}; pass trajectory=False"
        )
    return latents


def _least_squares(columns: Sequence[Tensor], wanted: Tensor) -> FloatArray:
    matrix = np.array([[float((a.double() * b.double()).sum()) for b in columns] for a in columns])
    right = np.array([float((a.double() * wanted.double()).sum()) for a in columns])
    found: FloatArray = np.linalg.lstsq(matrix, right, rcond=None)[0]
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    norm = float(b.double().norm())
    return float((a.double() - b.double()).norm()) / norm if norm else float(a.double().norm())


def _extrapolated(table: FloatArray) -> FloatArray:
    """Extrapolates the last column of the table if the final latents are unknown.

    The column before is repeated. The response to the last output is taken from the response of
    the last step's latents to the output before.
    """
    end: FloatArray = table[:, -2].copy()
    if len(table) > 1:
        end[-1] = table[-2, -2]
    else:
        end[-1] = 1.0
    return end
