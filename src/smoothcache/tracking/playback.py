"""Runs the user's sampler with recorded or modified outputs in place of the denoiser's.

The latents of the next call show what a solver makes of the denoiser's outputs. A generation is
therefore replayed by running ``sample(i)`` itself with recorded outputs. That requires no model
call and works with any solver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import CalibrationError
from ..model.arguments import Signature
from ..model.outputs import taken_apart
from ..model.target import Target
from .attachment import Attachment
from .listener import CallListener, CallMode, DenoiserCall


class Place(NamedTuple):
    """Index of a denoiser call in a generation.

    Attributes:
        step: Index of the solver step.
        denoiser: Prefix of the denoiser.
        branch: Number of the guidance branch.
    """

    step: int
    denoiser: str
    branch: int


Answer = Callable[[Place, Callable[[], Any]], Any]
"""Returns the output of a call; the second argument runs the model."""


class Reached(BaseException):
    """Raised to end a generation early, once everything needed has been recorded."""


class Playback:
    """Runs generations with substituted outputs and records the latents of every step.

    Args:
        model: Pipeline or module.
        timesteps: Timesteps of the recorded generation, if there is one.
    """

    def __init__(self, model: Any, timesteps: Sequence[float] | None = None) -> None:
        self._target = Target.of(model)
        self._timesteps = timesteps
        self._signatures = {name: Signature(x) for name, x in self._target.denoisers.items()}

    def run(
        self,
        generate: Callable[[], Any],
        answer: Answer,
        *,
        until: int | None = None,
        wants_end: bool = False,
        seen: Callable[[int, Tensor], None] | None = None,
    ) -> Generation:
        """Runs one generation and returns its latents and timesteps.

        Args:
            generate: Runs the generation.
            answer: Returns the outputs of the denoiser.
            until: Last step to run; None runs the whole generation.
            wants_end: Whether to record the latents after the last step. The generation ends
                when the noise scheduler returns them, before they are decoded.
            seen: Called with the step and latents at the beginning of every step.
        """
        return _Session(self, answer, until, wants_end, seen).run(generate)


class Generation(NamedTuple):
    """Latents and timesteps of one generation.

    Attributes:
        latents: Latents at the beginning of every step, in float32.
        timesteps: Timestep of every step.
        end: Latents after the last step; None if not requested or unknown.
        dtype: Data type of the latents passed to the denoiser.
    """

    latents: list[Tensor]
    timesteps: list[float]
    end: Tensor | None
    dtype: torch.dtype = torch.float32


class _Session(CallListener):
    """One running generation; listens to the denoiser's calls."""

    def __init__(
        self,
        playback: Playback,
        answer: Answer,
        until: int | None,
        wants_end: bool,
        seen: Callable[[int, Tensor], None] | None,
    ) -> None:
        self._playback = playback
        self._answer = answer
        self._until = until
        self._wants_end = wants_end
        self._seen = seen
        self._place = Place(0, "", 0)
        self._latents: list[Tensor] = []
        self._end: Tensor | None = None
        self._patched: Any = None
        self._generations = 0
        self._num_steps: Callable[[], int | None] = lambda: None
        self._dtype = torch.float32

    def run(self, generate: Callable[[], Any]) -> Generation:
        playback = self._playback
        known = playback._timesteps
        handlers = dict.fromkeys(playback._signatures, self._call)
        count = None if known is None else len(known)
        attachment = Attachment(playback._target, {}, handlers, self, known, count)
        self._num_steps = lambda: attachment.clock.num_steps if count is None else count
        try:
            output = generate()
            if self._wants_end and self._end is None:
                self._end = _latents_in(output, self._latents)
        except Reached:
            pass
        finally:
            self._restore()
            timesteps = attachment.clock.timesteps
            attachment.remove()
        return Generation(self._latents, timesteps, self._end, self._dtype)

    def _is_last(self, step: int) -> bool:
        """Returns whether this is known to be the last step."""
        return step + 1 == self._num_steps()

    def _call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        return self._answer(self._place, lambda: forward(*args, **kwargs))

    # --------------------------------------------------------------------------- calls

    def before(self, call: DenoiserCall) -> CallMode:
        """Records a call and, at the first call of a step, the latents."""
        denoiser, tick, branch = call.denoiser, call.tick, call.branch
        self._generations += tick.starts
        refuse_second_generation(self._generations)
        if self._until is not None and tick.step > self._until:
            raise Reached
        if branch is None:
            raise CalibrationError(
                "the calls of a step cannot be told apart, so their outputs cannot be replayed; "
                "run each guidance branch in a cache_context with its own name"
            )
        self._place = Place(tick.step, denoiser, branch)
        if tick.call == 0:
            latents = self._playback._signatures[denoiser].sort(call.args, call.kwargs).latents
            if latents is None:
                raise CalibrationError(
                    "the denoiser was called without latents, so its trajectory cannot be "
                    "recorded; pass the latents as a tensor argument"
                )
            kept = latents.detach().to(torch.float32, copy=True)
            self._latents.append(kept)
            self._dtype = latents.dtype
            if self._seen is not None:
                self._seen(tick.step, kept)
            if self._wants_end and self._is_last(tick.step):
                self._catch_end()
        return CallMode.UNCOMPILED

    # ------------------------------------------------------------------------ the final latents

    def _catch_end(self) -> None:
        """Patches the noise scheduler so that its next step ends the generation."""
        scheduler = self._playback._target.noise_scheduler
        step = getattr(scheduler, "step", None)
        if scheduler is None or step is None or "step" in vars(scheduler):
            return

        def caught(*args: Any, **kwargs: Any) -> Any:
            found = [x for x in pytree.tree_leaves(_unwrapped(step(*args, **kwargs)))]
            tensors = [x for x in found if isinstance(x, Tensor)]
            self._end = tensors[0].detach().to(torch.float32, copy=True) if tensors else None
            raise Reached

        scheduler.step = caught
        self._patched = scheduler

    def _restore(self) -> None:
        if self._patched is not None:
            with suppress(AttributeError):
                del self._patched.step
            self._patched = None


def _unwrapped(output: Any) -> Any:
    """Unwraps the output of a noise scheduler's step; the next latents come first."""
    return getattr(output, "prev_sample", output)


def _latents_in(output: Any, latents: Sequence[Tensor]) -> Tensor | None:
    """Returns the output tensor, if it has the shape of the latents or a part of their batch."""
    tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
    if len(tensors) != 1 or not latents or not tensors[0].is_floating_point():
        return None
    shape = latents[0].shape
    fits = tensors[0].shape[1:] == shape[1:] and shape[0] % max(1, len(tensors[0])) == 0
    return tensors[0].detach().to(torch.float32, copy=True) if fits else None


def refuse_second_generation(count: int) -> None:
    if count > 1:
        raise CalibrationError(
            "sample(i) started a second generation; it must run exactly one from start to end"
        )


class Tape:
    """The recorded outputs of all denoiser calls of one generation.

    Attributes:
        outputs: Leaves of each call's output, and a function that rebuilds it from other leaves.
    """

    def __init__(self) -> None:
        self.outputs: dict[Place, tuple[list[Any], Callable[[list[Any]], Any]]] = {}

    def record(self, place: Place, output: Any) -> None:
        """Stores a copy of a call's output."""
        leaves, rebuild = taken_apart(output)
        kept = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        self.outputs[place] = kept, rebuild

    def main(self, place: Place) -> Tensor:
        """Returns the tensor of a call's output that the solver uses."""
        return main_leaf(self.outputs[place][0])

    def played(self, place: Place, changed: Mapping[Place, Tensor] | None = None) -> Any:
        """Returns a recorded output, with its main tensor replaced if ``changed`` has one."""
        if place not in self.outputs:
            raise CalibrationError(
                f"the sampler made a call at step {place.step} that the recorded generation did "
                "not make; sample(i) must run the same generation every time"
            )
        leaves, rebuild = self.outputs[place]
        values = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        if changed is not None and place in changed:
            main = main_leaf(leaves)
            at = next(i for i, x in enumerate(leaves) if x is main)
            values[at] = changed[place].to(main.dtype)
        return rebuild(values)


def main_leaf(leaves: Sequence[Any]) -> Tensor:
    """Returns the first floating-point tensor with more than one dimension."""
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
            return leaf
    raise CalibrationError("the denoiser returned no floating-point tensor")
