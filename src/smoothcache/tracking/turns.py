"""Ensures that one thread at a time generates with a model."""

from __future__ import annotations

import threading
import weakref
from weakref import WeakKeyDictionary

from torch import Tensor

from ..errors import SmoothCacheError
from ..model.digests import are_unrelated, sketch
from .clock import Clock
from .timesteps import timestep_value


class _Progress:
    """State of a thread's generation at its last call; tensors of timesteps are not read."""

    def __init__(self, clock: Clock) -> None:
        self._first, self._last = clock.first_timestep, clock.last_given
        self._sketch = clock.sketch

    def may_continue_with(self, timestep: float, sketch: Tensor | None) -> bool:
        """Whether a call may continue this generation rather than start another."""
        if timestep == self._first or are_unrelated(self._sketch, sketch):
            return False
        last = timestep_value(self._last, batch=0)
        moved, moves = last - self._first, timestep - last
        return moves != 0 and moved * moves >= 0


class Turn:
    """The thread whose generation is running; only one thread at a time may use a model."""

    def __init__(self) -> None:
        self._in_call = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Allows any thread to start a generation."""
        self._thread: weakref.ref[threading.Thread] | None = None
        self._unfinished: WeakKeyDictionary[threading.Thread, _Progress] = WeakKeyDictionary()

    def enter(self) -> None:
        """Marks the beginning of a denoiser call."""
        if not self._in_call.acquire(blocking=False):
            raise two_threads_error()

    def leave(self) -> None:
        """Marks the end of a denoiser call."""
        self._in_call.release()

    def refuses(
        self, timestep: float, latents: Tensor | None, *, starts: bool, is_announced: bool
    ) -> bool:
        """Whether this call continues a generation that another thread has interrupted.

        A thread may always start a new generation, because the end of a cancelled generation
        cannot be observed. A generation that was refused once cannot continue.

        Args:
            timestep: Timestep of this call.
            latents: Latents of this call.
            starts: Whether the clock counts it as the first call of a generation.
            is_announced: Whether a noise scheduler has just announced a generation.
        """
        thread = threading.current_thread()
        progress = self._unfinished.get(thread)
        seen = None if latents is None else sketch(latents)
        refused = not starts or (
            progress is not None and not is_announced and progress.may_continue_with(timestep, seen)
        )
        if refused:
            self._unfinished.pop(thread, None)
        return refused

    @property
    def is_of_another_thread(self) -> bool:
        """Whether another thread made the last call."""
        return self._thread is not None and self._thread() is not threading.current_thread()

    def take(self, clock: Clock, *, is_last: bool) -> None:
        """Gives this thread the turn until another thread starts a generation."""
        thread = threading.current_thread()
        self._thread = weakref.ref(thread)
        self._unfinished[thread] = _Progress(clock)
        if is_last:
            del self._unfinished[thread]

    def is_of_another(self, timestep: float, latents: Tensor | None, last: Tensor | None) -> bool:
        """Whether this thread certainly starts anew after another thread's was cancelled."""
        if latents is None:
            return False
        seen, progress = sketch(latents), self._unfinished.get(threading.current_thread())
        continues = progress is not None and progress.may_continue_with(timestep, seen)
        return not continues and are_unrelated(last, seen)


class TwoThreadsError(SmoothCacheError):
    """Raised for a call while another thread generates; that generation is unaffected."""


def two_threads_error() -> SmoothCacheError:
    return TwoThreadsError(
        "two threads are generating with one model at once, so their steps cannot be told apart; "
        "put a lock around each generation, or give each thread its own copy of the model"
    )
