"""Records the trajectories of samples: latents, and outputs combined by guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError
from ..model.arguments import Signature
from ..model.target import Target
from ..tracking.intercept import Handler
from ..tracking.listener import DenoiserCall
from ..tracking.playback import Generation, Place, Playback, Tape
from .solver_responses import calls_of, measure_responses
from .trajectory import FloatArray, Guidance, SolverResponses, Trajectories

Keep = bool | Literal["gram"]
MOST_BYTES = 2**30  # limit of latents and outputs in a calibration


@dataclass(frozen=True)
class TrajectoryPart:
    """What one rank has recorded of its share of the samples.

    Attributes:
        reason: Why it recorded nothing; empty if it did.
        left_out: Bytes of latents and outputs that were left out.
        grams: Number of a sample -> its inner products.
        latents: Likewise; empty if they were not kept.
        outputs: Likewise.
    """

    reason: str
    left_out: int
    grams: dict[int, FloatArray]
    latents: dict[int, Tensor]
    outputs: dict[int, Tensor]


class TrajectoryRecorder:
    """Records samples, and measures the solver's responses on the first.

    Args:
        model: Pipeline or module.
        keeps_latents: Whether to keep latents and outputs, or only inner products.
        responses: Responses of the solver, if already measured.
        most_bytes: Limit for latents and outputs, beyond which all of them are discarded.

    Attributes:
        left_out: Bytes of the discarded latents and outputs.
    """

    def __init__(
        self,
        model: Any,
        *,
        keeps_latents: bool = True,
        responses: SolverResponses | None = None,
        most_bytes: int | None = None,
    ) -> None:
        self._model = model
        self._keeps_latents = keeps_latents
        self._responses = responses
        self._most_bytes = most_bytes
        self.left_out = 0
        self._denoisers: tuple[str, ...] = ()
        self._grams: dict[int, FloatArray] = {}
        self._latents: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._output_bytes = 0

    def record(self, generate: Callable[[], Any]) -> None:
        """Runs a generation uncached and adds its trajectory."""
        tape, generation = record_generation(self._model, generate)
        self.add(generate, tape, generation)

    def add(
        self,
        generate: Callable[[], Any],
        tape: Tape,
        generation: Generation,
        number: int | None = None,
    ) -> None:
        """Adds a recorded trajectory.

        Args:
            generate: Runs the generation again; used for the first one.
            tape: Recorded outputs.
            generation: Recorded latents and timesteps.
            number: Index of the sample; None takes the next one.
        """
        number = len(self._grams) if number is None else number
        calls = calls_of(tape)
        denoisers = tuple(calls[step][0].denoiser for step in range(len(calls)))
        if self._responses is None:
            self._responses = measure_responses(self._model, generate, tape, generation)
        if not self._denoisers:
            self._denoisers = denoisers
            self._output_bytes = sum(tape.main(place).nbytes for place in calls[0])
        guidance = self._responses.guidance
        if denoisers != self._denoisers or len(calls[0]) != len(guidance.weights):
            raise CalibrationError(
                "a sample calls the denoisers differently than the samples before; every sample "
                "must use the same denoisers with the same number of calls per step"
            )
        outputs = combined_outputs(tape, calls, guidance)
        for step, output in enumerate(outputs):
            if not bool(torch.isfinite(output).all()):
                raise CalibrationError(
                    f"the denoiser's output is not finite at step {step}; check the model's dtype "
                    "and its inputs"
                )
        self._grams[number] = gram_of(outputs)
        if self._keeps_latents:
            latents = torch.stack([guidance.latents(x) for x in generation.latents])
            self._latents[number] = in_half(latents.cpu())
            self._outputs[number] = in_half(outputs.cpu())
            self._limit()

    def _limit(self) -> None:
        """Leaves all latents and outputs out if they are too many."""
        held = sum(x.nbytes for x in (*self._latents.values(), *self._outputs.values()))
        if self._most_bytes is not None and held > self._most_bytes:
            self._keeps_latents, self.left_out = False, self.left_out + held
        if not self._keeps_latents:
            self._latents, self._outputs = {}, {}

    def part(self, reason: str) -> TrajectoryPart:
        """What was recorded so far, for another rank."""
        return TrajectoryPart(reason, self.left_out, self._grams, self._latents, self._outputs)

    def take(self, parts: Sequence[TrajectoryPart]) -> None:
        """Takes in what other ranks have recorded."""
        for part in parts:
            self._grams |= part.grams
            self._latents |= part.latents
            self._outputs |= part.outputs
            if part.left_out:
                self._keeps_latents, self.left_out = False, self.left_out + part.left_out
        self._limit()

    @property
    def responses(self) -> SolverResponses | None:
        """Of the solver, once they are measured."""
        return self._responses

    def use(self, responses: SolverResponses) -> None:
        """Takes what another rank measured of the solver."""
        self._responses = responses

    @property
    def is_measured(self) -> bool:
        """Whether the solver's responses have been measured."""
        return self._responses is not None

    def result(self) -> Trajectories:
        """Returns all trajectories recorded so far."""
        if self._responses is None:
            raise CalibrationError("no trajectory was recorded")
        return Trajectories(
            self._responses,
            np.stack([self._grams[i] for i in sorted(self._grams)]),
            self._denoisers,
            self._output_bytes,
            tuple(self._latents[i] for i in sorted(self._latents)),
            tuple(self._outputs[i] for i in sorted(self._outputs)),
        )


def record_generation(model: Any, generate: Callable[[], Any]) -> tuple[Tape, Generation]:
    """Runs a generation uncached; returns its outputs, and its latents and timesteps."""
    tape = Tape()

    def answer(place: Place, run: Callable[[], Any]) -> Any:
        output = run()
        tape.record(place, output)
        return output

    generation = Playback(model).run(generate, answer)
    if not tape.outputs:
        raise CalibrationError("sample(i) never ran the model")
    return tape, generation


def in_half(values: Tensor) -> Tensor:
    """Returns values in half precision, or unchanged if they overflow."""
    half = values.to(torch.float16)
    return half if bool(torch.isfinite(half).all()) else values


def combined_outputs(tape: Tape, calls: dict[int, list[Place]], guidance: Guidance) -> Tensor:
    """Returns the outputs of all steps, combined by guidance; [steps, *latents]."""
    steps = [[tape.main(place) for place in calls[step]] for step in range(len(calls))]
    return torch.stack([guidance.combined(outputs) for outputs in steps])


def gram_of(outputs: Tensor) -> FloatArray:
    """Returns the inner products of the outputs of all steps; [steps, steps]."""
    flat = outputs.flatten(1).double()
    gram: FloatArray = (flat @ flat.T).cpu().numpy()
    return gram


class TrajectoryObserver:
    """Records trajectories during a calibration; a failure never aborts the calibration.

    Args:
        model: Pipeline or module.
        keep: Whether to record trajectories; "gram" records only inner products.
        first: Index of the first sample that this process runs.

    Attributes:
        reason: Why trajectories or their latents are missing; empty if nothing is missing.
    """

    def __init__(self, model: Any, keep: Keep, first: int = 0) -> None:
        self._model = model
        self._keep = keep
        self._first = first
        self._number = first
        self._signatures = {name: Signature(x) for name, x in Target.of(model).denoisers.items()}
        self.reason = ""
        self._recorder: TrajectoryRecorder | None = None
        self._start()

    def start(self, i: int) -> None:
        """Starts a sample."""
        self._number = i
        if i == self._first and self._keep:
            keeps = self._keep is True
            self._recorder = TrajectoryRecorder(
                self._model, keeps_latents=keeps, most_bytes=MOST_BYTES
            )
        self._start()

    def _start(self) -> None:
        self._tape, self._latents = Tape(), list[Tensor]()
        self._dtype = torch.float32
        self._place: Place | None = None
        self._pending: Callable[[Callable[[], Any]], None] | None = None

    def around(self, handlers: Mapping[str, Handler]) -> dict[str, Handler]:
        """Returns the handlers, wrapped to record the outputs of the denoisers."""
        if not self._keep:
            return dict(handlers)
        wrapped = {name: self._recording(handlers.get(name)) for name in self._signatures}
        return {**handlers, **wrapped}

    def _recording(self, handler: Handler | None) -> Handler:
        def call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
            output = handler(forward, args, kwargs) if handler else forward(*args, **kwargs)
            if self._place is not None and not self.reason:
                self._guarded(self._tape.record, self._place, output)
            return output

        return call

    def before(self, call: DenoiserCall) -> None:
        """Notes the place and, at the first call of a step, the latents of a denoiser call."""
        denoiser, tick, branch = call.denoiser, call.tick, call.branch
        self._place = None
        if self.reason or not self._keep:
            return
        if branch is None:
            self.reason = "the calls of a step cannot be told apart"
            return
        self._place = Place(tick.step, denoiser, branch)
        if tick.call == 0:
            latents = self._signatures[denoiser].sort(call.args, call.kwargs).latents
            if latents is None:
                self.reason = "the denoiser is called without latents"
                return
            self._latents.append(latents.detach().to(torch.float32, copy=True))
            self._dtype = latents.dtype

    def complete(self, timesteps: list[float]) -> None:
        """Ends a sample; the first sample is added later, by ``measure``."""
        generation = Generation(self._latents, timesteps, None, self._dtype)
        tape, recorder = self._tape, self._recorder
        self._start()
        if self.reason or recorder is None:
            return
        number = self._number
        self._pending = lambda generate: recorder.add(generate, tape, generation, number)
        if recorder.is_measured:
            self.measure(lambda: None)

    def measure(self, generate: Callable[[], Any]) -> None:
        """Adds the last sample; for the first sample, measures the solver's responses."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._guarded(pending, generate)

    @property
    def responses(self) -> SolverResponses | None:
        """Of the solver, once they are measured."""
        return None if self._recorder is None else self._recorder.responses

    def adopt(self, responses: SolverResponses | None, reason: str) -> None:
        """Adds the first sample with what rank 0 measured of the solver, or why it could not."""
        if self._recorder is not None and responses is not None:
            self._recorder.use(responses)
        self.reason = self.reason or reason
        if self.reason or responses is None:
            self._pending = None
        self.measure(lambda: None)

    def part(self) -> TrajectoryPart:
        """What this process has recorded."""
        if self._recorder is None:
            return TrajectoryPart(self.reason, 0, {}, {}, {})
        return self._recorder.part(self.reason)

    def take(self, parts: Sequence[TrajectoryPart]) -> None:
        """Takes in what other ranks have recorded; without that of one, there is none."""
        self.reason = next((x.reason for x in parts if x.reason and not self.reason), self.reason)
        if self._recorder is not None and not self.reason:
            self._recorder.take(parts)

    def result(self) -> Trajectories | None:
        """Returns the recorded trajectories; None if nothing could be recorded."""
        recorder = self._recorder
        if self.reason or recorder is None:
            return None
        if recorder.left_out:
            self.reason = f"latents and outputs of {recorder.left_out / 2**20:.0f} MiB left out"
        return recorder.result()

    def _guarded(self, action: Callable[..., None], *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:  # including errors of the user's sampler on artificial outputs
            self.reason = f"{error}" or type(error).__name__
