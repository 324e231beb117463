"""Whose generation is under way: one model serves one thread at a time."""

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
    """How far a thread's generation had come at its last call; unread timesteps stay unread."""

    def __init__(self, clock: Clock) -> None:
        self._first, self._last = clock.first_timestep, clock.last_given
        self._sketch = clock.sketch

    def could_go_on(self, timestep: float, sketch: Tensor | None) -> bool:
        """Whether a call may be the next of this generation, and not the first of another."""
        if timestep == self._first or are_unrelated(self._sketch, sketch):
            return False
        last = timestep_value(self._last, batch=0)
        moved, moves = last - self._first, timestep - last
        return moves != 0 and moved * moves >= 0


class Turn:
    """Whose generation is under way: a model serves one thread at a time."""

    def __init__(self) -> None:
        self._in_call = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Lets any thread begin."""
        self._thread: weakref.ref[threading.Thread] | None = None
        self._under_way: WeakKeyDictionary[threading.Thread, _Progress] = WeakKeyDictionary()

    def enter(self) -> None:
        """Begins a call of a denoiser."""
        if not self._in_call.acquire(blocking=False):
            raise two_threads_error()

    def leave(self) -> None:
        """Ends it."""
        self._in_call.release()

    def refuses(
        self, timestep: float, latents: Tensor | None, *, starts: bool, is_announced: bool
    ) -> bool:
        """Whether this call goes on with a generation that another thread overtook.

        A thread may always begin another generation: one that was cancelled is over, but nobody
        says so. What it was refused it does not go on with.

        Args:
            timestep: Of this call.
            latents: Of this call.
            starts: Whether the clock takes it for the first call of a generation.
            is_announced: Whether a noise scheduler has just announced a generation.
        """
        thread = threading.current_thread()
        progress = self._under_way.get(thread)
        seen = None if latents is None else sketch(latents)
        refused = not starts or (
            progress is not None and not is_announced and progress.could_go_on(timestep, seen)
        )
        if refused:
            self._under_way.pop(thread, None)
        return refused

    @property
    def is_of_another_thread(self) -> bool:
        """Whether the last call was another thread's."""
        return self._thread is not None and self._thread() is not threading.current_thread()

    def take(self, clock: Clock, *, is_last: bool) -> None:
        """Gives this thread the turn, until another begins a generation."""
        thread = threading.current_thread()
        self._thread = weakref.ref(thread)
        self._under_way[thread] = _Progress(clock)
        if is_last:
            del self._under_way[thread]

    def is_of_another(self, timestep: float, latents: Tensor | None, last: Tensor | None) -> bool:
        """Whether this thread certainly begins a generation where another's was cancelled."""
        if latents is None:
            return False
        seen, progress = sketch(latents), self._under_way.get(threading.current_thread())
        goes_on = progress is not None and progress.could_go_on(timestep, seen)
        return not goes_on and are_unrelated(last, seen)


class TwoThreadsError(SmoothCacheError):
    """Refuses a call and leaves the generation of the other thread alone."""


def two_threads_error() -> SmoothCacheError:
    return TwoThreadsError(
        "two threads generate with one model at once, and their steps cannot be told apart; "
        "let them take turns (a lock around each generation), or give each its own copy"
    )
