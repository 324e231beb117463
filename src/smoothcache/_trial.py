"""One way of sampling in a benchmark: runs it, and counts what it really spends and keeps."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._contest import _checked
from .apply import cached
from .costs import MacCounter
from .errors import InvalidArgumentError
from .schedule import Schedule


@dataclass(frozen=True, eq=False)
class Way:
    """How a method runs one generation after the other.

    Attributes:
        sample: Runs generation number i; gives samples [batch, ...].
        denoisers: The modules whose cost counts.
        num_steps: Solver steps of a generation.
        model: What the schedule is for; None for others' caches, on a pipeline of their own.
        schedule: What to run under; None for plain sampling and for others' caches.
        varies: Whether the cost depends on the input, so that every generation is counted.
        note: What else is to be known of it.
    """

    sample: Callable[[int], Tensor]
    denoisers: Sequence[nn.Module]
    num_steps: int
    model: Any = None
    schedule: Schedule | None = None
    varies: bool = False
    note: str = ""

    @property
    def is_foreign(self) -> bool:
        """Whether the cache is not ours, so that its state may leak between generations."""
        return self.model is None


@dataclass(eq=False)
class Trial:
    """A way of sampling, and what it has done so far.

    Attributes:
        name: Of its row.
        family: The method of which it is one setting.
        way: What is run.
        samples: What each generation gave, on the CPU.
        seconds: Number of a generation -> wall clock, where it ran without being counted.
        macs: Of the denoisers in each generation that was counted.
        kept: The most bytes at any moment that a schedule kept; without one, of all tensors that
            were alive between two calls of a denoiser.
        differs: Whether a generation that ran twice gave two results.
    """

    name: str
    family: str
    way: Way
    samples: list[Tensor] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    macs: list[int] = field(default_factory=list)
    kept: int = 0
    differs: bool = False

    def count(self, i: int) -> None:
        """Runs generation number i and counts its multiply-accumulates and the bytes kept.

        Raises:
            InvalidArgumentError: If it did not run the model, or layers had to run that the
                schedule would have reused.
        """
        with self._scheduled() as run, _metered(self.way.denoisers, weigh=i == 0) as meter:
            samples = self.way.sample(i)
        if not meter.calls:
            raise InvalidArgumentError(f"'{self.name}' did not run the model in generation {i}.")
        if run is None:
            self.kept = max(self.kept, meter.bytes)
        else:
            summary = run.summary()
            self.kept = max(self.kept, summary.peak_bytes)
            if summary.recomputed:
                reasons = "; ".join(summary.recomputed)
                raise InvalidArgumentError(f"'{self.name}' had to compute after all: {reasons}.")
        self.macs.append(meter.macs)
        self._take(i, samples)

    def time(self, i: int) -> None:
        """Runs generation number i and takes its time."""
        with self._scheduled():
            start = time.perf_counter()
            samples = self.way.sample(i)
            samples = samples.detach().cpu()  # waits for the device
            self.seconds[i] = time.perf_counter() - start
        self._take(i, samples)

    def _scheduled(self) -> Any:
        return cached(self.way.model, self.way.schedule) if self.way.schedule else nullcontext()

    def _take(self, i: int, samples: Tensor) -> None:
        samples = _checked(samples.detach().cpu(), f"sample({i})", self.samples[:1])
        if i < len(self.samples):
            self.differs |= not torch.equal(samples, self.samples[i])
        else:
            self.samples.append(samples)


@dataclass
class _Meter:
    """What ran inside the denoisers, and what lived on after each of their calls."""

    weigh: bool
    counter: MacCounter = field(default_factory=MacCounter)
    macs: int = 0
    calls: int = 0
    bytes: int = 0

    def before(self, *_: Any) -> None:
        self.counter.__enter__()

    def after(self, *_: Any) -> None:
        self.counter.__exit__(None, None, None)
        self.macs += self.counter.total
        self.calls += 1
        if self.weigh:
            self.bytes = max(self.bytes, _bytes_alive())


@contextmanager
def _metered(denoisers: Sequence[nn.Module], *, weigh: bool) -> Iterator[_Meter]:
    meter = _Meter(weigh)
    handles: list[Any] = []
    if weigh:  # what is alive by now, weights above all, is left out
        gc.collect()
        gc.freeze()
    try:
        for denoiser in denoisers:
            handles.append(denoiser.register_forward_pre_hook(meter.before))
            handles.append(denoiser.register_forward_hook(meter.after, always_call=True))
        yield meter
    finally:
        for handle in handles:
            handle.remove()
        if weigh:
            gc.unfreeze()


def _bytes_alive() -> int:
    """Bytes of all tensors that were made since ``gc.freeze``."""
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
