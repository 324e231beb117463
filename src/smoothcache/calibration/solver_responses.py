"""How a solver responds to the denoiser's outputs, measured by playing it back without the model.

For the solvers in use the latents are linear in the outputs, with scalar coefficients:

    x_l = c_l x_0 + noise + sum_{t < l} h[t, l] e_t,      e_t = sum_b a_b E_(t, b)

where the sum over b is guidance: E_(t, b) are the outputs of the calls, or of the parts of one
batched call, of step t. The responses h and the coefficients a_b are measured with the user's own
``sample(i)``: recorded outputs are played back, all of them moved by random tensors, and the change
of the latents at every step is taken apart into those by least squares, which tells the steps apart
because random tensors are independent. So a few playbacks measure any solver, of diffusers or not.
One more with other random changes checks that the sum above holds.
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
_ROUNDINGS = 4  # by which latents may be off, each of the dtype's resolution
_MOST_PARTS = 4  # of a batch, in which guidance puts its branches
_NUMBERS_FOR_EACH = 20  # of the latents, for each response of a step


def calls_of(tape: Tape) -> dict[int, list[Place]]:
    """The calls of every step, in the order of their branches.

    Raises:
        CalibrationError: If steps differ in their calls, so that their outputs cannot be compared.
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
            f"{odd} (guidance in some steps only, or a solver with two calls a step), so one "
            "linear combination of outputs cannot serve all steps; pass trajectory=False"
        )
    for step, places in ordered.items():
        if [place.branch for place in places] != list(range(len(places))):
            raise CalibrationError(
                f"step {step} has other branches of guidance than step 0, so their outputs cannot "
                "be compared; pass trajectory=False"
            )
        if len({place.denoiser for place in places}) > 1:
            raise CalibrationError(
                f"two denoisers run at step {step}, whose outputs cannot be combined; pass "
                "trajectory=False"
            )
    return ordered


def measure_responses(
    model: Any, generate: Callable[[], Any], tape: Tape, recorded: Generation
) -> SolverResponses:
    """Measures how the sampler's solver responds, by playing it back a few times.

    Args:
        model: Pipeline or module.
        generate: Runs the recorded generation again.
        tape: Its outputs.
        recorded: Its latents and timesteps.

    Raises:
        CalibrationError: If the sampler is not deterministic or not linear in the outputs, with
            scalar coefficients; says where.
    """
    return _Measurement(model, generate, tape, recorded).result()


class _Measurement:
    """Plays a generation back with all outputs moved at random, and solves for the responses."""

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
        kicks, moved = self._kicked(seed=0)
        guidance = self._guidance(kicks, moved)
        combined, changes = [self._combined(kicks, guidance)], [moved]
        # Random tensors of few numbers are not independent enough to tell all steps apart.
        wanted = -(-_NUMBERS_FOR_EACH * self._steps // combined[0][0].numel())
        for seed in range(1, min(wanted, self._steps)):
            kicks, moved = self._kicked(seed)
            combined.append(self._combined(kicks, guidance))
            changes.append(moved)
        table = self._solved(combined, changes, guidance)
        knows_end = changes[0][self._steps] is not None
        if not knows_end:
            table[:, -1] = _continued(table)
        table.flags.writeable = False
        responses = SolverResponses(table, guidance, knows_end)
        kicks, moved = self._kicked(seed=-1)  # others than the table was solved from
        self._check(responses.table, self._combined(kicks, guidance), moved, guidance)
        return responses

    def _solved(
        self,
        combined: Sequence[Sequence[Tensor]],
        changes: Sequence[Sequence[Tensor | None]],
        guidance: Guidance,
    ) -> FloatArray:
        """The table under which the changes of the latents follow from those of the outputs."""
        steps = self._steps
        flat = [torch.stack([x.flatten() for x in kicks]).double() for kicks in combined]
        gram = sum((x @ x.T for x in flat), torch.zeros(())).cpu().numpy()
        table = np.zeros((steps, steps + 1))
        for later in range(1, steps + 1):
            right = np.zeros(later)
            for kicks, columns, moved in zip(combined, flat, changes, strict=True):
                change = moved[later]
                if change is not None:
                    once = _alike(change, kicks[0], guidance).flatten().double()
                    right += (columns[:later] @ once).cpu().numpy()
            table[:later, later] = np.linalg.lstsq(gram[:later, :later], right, rcond=None)[0]
        for kicks, moved in zip(combined, changes, strict=True):
            self._check(table, kicks, moved, guidance)
        return table

    # ------------------------------------------------------------------------------- playing

    def _play(self, changed: Mapping[Place, Tensor]) -> Generation:
        return self._playback.run(
            self._generate,
            lambda place, _: self._tape.played(place, changed),
            wants_end=True,
        )

    def _moved(self, generation: Generation) -> list[Tensor | None]:
        """The change of the latents at every step, and after the last one."""
        pairs = zip(generation.latents, self._base.latents, strict=True)
        moved: list[Tensor | None] = [a - b for a, b in pairs]
        ends = generation.end, self._base.end
        moved.append(None if ends[0] is None or ends[1] is None else ends[0] - ends[1])
        return moved

    def _kicked(self, seed: int) -> tuple[dict[Place, Tensor], list[Tensor | None]]:
        """Changes of all outputs at random, and those of the latents at every step from them."""
        generator = torch.Generator().manual_seed(seed % 2**31)
        kicks, changed = {}, {}
        for places in self._calls.values():
            for place in places:
                main = self._tape.main(place)
                size = main.float().square().mean().sqrt()
                noise = torch.randn(main.shape, generator=generator).to(main.device)
                changed[place] = (main.float() + noise * torch.where(size > 0, size, 1.0)).to(
                    main.dtype
                )
                kicks[place] = changed[place].float() - main.float()
        return kicks, self._moved(self._play(changed))

    def _combined(self, kicks: Mapping[Place, Tensor], guidance: Guidance) -> list[Tensor]:
        """The changes of the outputs of every step as the solver sees them."""
        return [
            guidance.combined([kicks[place] for place in self._calls[step]])
            for step in range(self._steps)
        ]

    # ------------------------------------------------------------------------------ guidance

    def _guidance(
        self, changes: Mapping[Place, Tensor], moved: Sequence[Tensor | None]
    ) -> Guidance:
        """Reads how outputs are combined off the first step, which alone moves the next state."""
        change = moved[1]
        if change is None or not float(change.abs().max()):
            raise CalibrationError(
                "the latents do not move when the denoiser's first output does, so the solver's "
                "responses cannot be measured; pass trajectory=False"
            )
        kicks = [changes[place] for place in self._calls[0]]
        parts = _parts(change, kicks)
        channels = _channels(change, kicks)
        plain = Guidance(tuple((1.0,) * parts for _ in kicks), parts, channels)
        columns = [part.float().flatten() for kick in kicks for part in plain._cut(kick)]
        wanted = plain.latents(change).flatten()
        if any(len(column) != len(wanted) for column in columns):
            raise CalibrationError(
                f"the denoiser's output {list(kicks[0].shape)} has not the form of the latents "
                f"{list(change.shape)}; pass trajectory=False"
            )
        found = _least_squares(columns, wanted)
        total = float(found.sum())
        scale = total if abs(total) > 1e-3 * float(np.abs(found).sum()) else float(found[0])
        weights = (found / scale).reshape(len(kicks), parts)
        return Guidance(tuple(tuple(row) for row in weights.tolist()), parts, channels)

    # ------------------------------------------------------------------------------- refusals

    def _refuse_randomness(self, recorded: Generation) -> None:
        if len(self._base.latents) != self._steps:
            raise CalibrationError(
                f"sample(i) ran {self._steps} steps, and {len(self._base.latents)} when it ran "
                "again; it must run the same generation whenever it is called"
            )
        for step, (a, b) in enumerate(zip(recorded.latents, self._base.latents, strict=True)):
            if a.shape != b.shape or _distance(b, a) > self._tolerance + self._rounding:
                raise CalibrationError(
                    f"with the same outputs of the denoiser, sample(i) has other latents at step "
                    f"{step} than before, so it is not deterministic; seed every generator anew "
                    "in sample(i), or pass trajectory=False"
                )

    def _check(
        self,
        table: FloatArray,
        kicks: Sequence[Tensor],
        moved: Sequence[Tensor | None],
        guidance: Guidance,
    ) -> None:
        """Compares how the latents moved with what the table says."""
        for later in range(1, self._steps + 1):
            change = moved[later]
            if change is None:
                continue
            told = sum(
                (kicks[t] * float(table[t, later]) for t in range(later)),
                torch.zeros_like(kicks[0]),
            )
            found = _alike(change, told, guidance)
            left, size = float((found - told).norm()), float(found.norm())
            if left > self._tolerance * 5 * size + self._rounded(later):
                raise self._not_linear(
                    f"random outputs move the latents at step {later} by something else than a "
                    f"sum of multiples of their changes (relative distance {left / size:.2g})"
                )

    def _rounded(self, step: int) -> float:
        """How far the latents at a step may be off by rounding alone."""
        last = min(step, self._steps - 1)
        return self._rounding * float(self._base.latents[last].norm())

    def _not_linear(self, what: str) -> CalibrationError:
        return CalibrationError(
            f"the sampler is not linear in the denoiser's outputs: {what}. Thresholding, clipping "
            "(clip_sample) and rescaled or varying guidance do that; turn them off, or pass "
            "trajectory=False"
        )


def _parts(change: Tensor, kicks: Sequence[Tensor]) -> int:
    """In how many equal parts a change of the denoiser's input comes."""
    if any(len(kick) != len(change) for kick in kicks):
        return 1
    scale = float(change.abs().max())
    for parts in range(_MOST_PARTS, 1, -1):
        if len(change) % parts == 0:
            first, *others = change.chunk(parts)
            if all(float((x - first).abs().max()) <= 1e-4 * scale for x in others):
                return parts
    return 1


def _channels(change: Tensor, kicks: Sequence[Tensor]) -> int | None:
    """How many channels of the outputs the latents have, if that is fewer."""
    kick = kicks[0]
    if kick.ndim == change.ndim and kick.ndim > 2 and kick.shape[1] > change.shape[1]:
        return change.shape[1]
    return None


def _alike(change: Tensor, like: Tensor, guidance: Guidance) -> Tensor:
    """A change of the denoiser's input, or of the final latents, once."""
    once = change if change.shape == like.shape else guidance.latents(change)
    if once.shape != like.shape:
        raise CalibrationError(
            f"the latents have the shape {list(once.shape)}, the denoiser's outputs "
            f"{list(like.shape)}; pass trajectory=False"
        )
    return once


def _least_squares(columns: Sequence[Tensor], wanted: Tensor) -> FloatArray:
    matrix = np.array([[float((a.double() * b.double()).sum()) for b in columns] for a in columns])
    right = np.array([float((a.double() * wanted.double()).sum()) for a in columns])
    found: FloatArray = np.linalg.lstsq(matrix, right, rcond=None)[0]
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    norm = float(b.double().norm())
    return float((a.double() - b.double()).norm()) / norm if norm else float(a.double().norm())


def _continued(table: FloatArray) -> FloatArray:
    """The last column, if nobody knows it: the latents end as they came to the last step.

    The last output moves them as far as the output before moved those of the last step.
    """
    end: FloatArray = table[:, -2].copy()
    if len(table) > 1:
        end[-1] = table[-2, -2]
    else:
        end[-1] = 1.0
    return end
