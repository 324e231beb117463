"""One way of sampling, measured: runs it, counts what it spends and keeps, and times it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError
from ..metrics.modality import modality_of
from ..model.costs import MacCounter
from ..runtime.run import cached
from ..schedule.schedule import Schedule
from ..tracking.attachment import Attachment
from ..tracking.listener import CallListener, CallMode, DenoiserCall


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
        asks: Whether ``sample`` stands for a call ``sample(i, num_steps)``, in messages.
    """

    sample: Callable[[int], Tensor]
    denoisers: Sequence[nn.Module]
    num_steps: int
    model: Any = None
    schedule: Schedule | None = None
    varies: bool = False
    note: str = ""
    asks: bool = False

    def call(self, i: int) -> str:
        """The call that runs a generation, as it stands in messages.

        Args:
            i: Number of the generation.

        Returns:
            Python source, such as ``sample(0)``.
        """
        return f"sample({i}, {self.num_steps})" if self.asks else f"sample({i})"

    @property
    def is_foreign(self) -> bool:
        """Whether the cache is not ours, so that its state may leak between generations."""
        return self.model is None


@dataclass(eq=False)
class Trial:
    """A way of sampling, and what it has done so far.

    A generation is either counted or timed, because counting takes time.

    Attributes:
        name: Of its row.
        family: The method of which it is one setting.
        way: What is run.
        samples: What each generation gave, on the CPU.
        seconds: Number of a generation -> wall clock, where it ran without being counted.
        macs: Of the denoisers in each generation that was counted.
        steps: Solver steps that the last counted generation really ran.
        kept: The most bytes at any moment that a schedule kept; without one, of all tensors that
            were alive between two calls of a denoiser, if they were weighed.
        recomputed: Layer calls that were to reuse but had to compute, by the reason, in the
            generations that were counted.
        differs: Whether a generation that ran twice gave two results.
        reference: Another trial, whose samples this one's must have the shape of.
    """

    name: str
    family: str
    way: Way
    reference: Trial | None = None
    samples: list[Tensor] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    macs: list[int] = field(default_factory=list)
    steps: int = 0
    kept: int = 0
    recomputed: dict[str, int] = field(default_factory=dict)
    differs: bool = False

    def count(self, i: int, *, weigh: bool = False) -> None:
        """Runs generation number i and counts its steps and multiply-accumulates.

        Args:
            i: Number of the generation.
            weigh: Whether to weigh all tensors that live on between two calls of a denoiser. Then
                steps are not counted, because what counts them keeps tensors of its own.

        Raises:
            InvalidArgumentError: If it did not run the model, or its result cannot be compared.
        """
        with (
            self._scheduled() as run,
            nullcontext() if weigh else self._followed() as steps,
            metered(self.way.denoisers, weigh=weigh) as meter,
        ):
            samples = self.way.sample(i)
        if not meter.calls:
            raise InvalidArgumentError(
                f"{self.way.call(i)} did not run the model from start to end under {self.name!r}; "
                "it must run the pipeline or module that was passed."
            )
        if run is None:
            self.kept = max(self.kept, meter.bytes)
            self.steps = self.way.num_steps if steps is None else steps.count
        else:
            summary = run.summary()
            self.kept = max(self.kept, summary.peak_bytes)
            self.steps = summary.schedule.num_steps if summary.finished else 0
            for reason, calls in summary.recomputed.items():
                self.recomputed[reason] = self.recomputed.get(reason, 0) + calls
        self.macs.append(meter.macs)
        self._take(i, samples)

    def time(self, i: int) -> None:
        """Runs generation number i and takes its time."""
        with self._scheduled():
            start = time.perf_counter()
            samples = self.way.sample(i)
            if isinstance(samples, Tensor):
                samples = samples.detach().cpu()  # waits for the device
            self.seconds[i] = time.perf_counter() - start
        self._take(i, samples)

    def compute(self, reference: Trial) -> float:
        """Multiply-accumulates of a generation as a fraction of the reference's."""
        return statistics.mean(self.macs) / statistics.mean(reference.macs)

    def time_ratios(self, reference: Trial) -> list[float]:
        """Time over the reference's, of each generation that both were timed in."""
        timed = self.seconds.keys() & reference.seconds.keys()
        return [self.seconds[i] / reference.seconds[i] for i in sorted(timed)]

    def _scheduled(self) -> Any:
        return cached(self.way.model, self.way.schedule) if self.way.schedule else nullcontext()

    @contextmanager
    def _followed(self) -> Iterator[_Steps | None]:
        """Counts the steps of plain sampling; under a schedule the run does."""
        if self.way.schedule is not None or self.way.model is None:
            yield None
            return
        steps = _Steps()
        attachment = Attachment(self.way.model, {}, {}, steps)
        try:
            yield steps
        finally:
            attachment.remove()

    def _take(self, i: int, samples: object) -> None:
        others = self.reference.samples if self.reference is not None else []
        like = self.samples[:1] or others[:1]
        samples = checked_samples(samples, self.way.call(i), like)
        if i < len(self.samples):
            self.differs |= not torch.equal(samples, self.samples[i])
        else:
            self.samples.append(samples)


class _Steps(CallListener):
    """Counts the steps of a generation as a listener of the denoisers' calls."""

    def __init__(self) -> None:
        self.count = 0

    def before(self, call: DenoiserCall) -> CallMode:
        self.count += call.tick.call == 0
        return CallMode.AS_IT_IS


def checked_samples(results: object, call: str, like: list[Tensor]) -> Tensor:
    """What a sampler returned, on the CPU in float32, if it can be compared with what is in `like`.

    Raises:
        InvalidArgumentError: If it cannot.
    """
    modality = modality_of(results, call)
    noun, samples = modality.noun, cast(Tensor, results).detach().cpu()
    if not samples.numel() or not samples.isfinite().all():
        raise InvalidArgumentError(f"{call} returned no {noun}, or NaN or infinity in one.")
    low, high = samples.min().item(), samples.max().item()
    if modality.bounds and (low < modality.bounds[0] or high > modality.bounds[1]):
        raise InvalidArgumentError(
            f"{call} must return {noun} {modality.wanted}, got values from {low:.3g} to {high:.3g}."
        )
    if like and samples.shape != like[0].shape:
        raise InvalidArgumentError(
            f"{call} returned {noun} of shape {list(samples.shape)}, where {list(like[0].shape)} "
            "came before; all must have the same shape."
        )
    return samples.float()


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
def metered(denoisers: Sequence[nn.Module], *, weigh: bool) -> Iterator[_Meter]:
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
