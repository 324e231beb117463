"""One way of sampling in a comparison: runs it, and keeps the books of what it cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ._attach import Attachment
from ._modality import modality_of
from .apply import cached
from .clock import Tick
from .errors import InvalidArgumentError
from .report import COLUMNS, ReportRow
from .schedule import Schedule
from .summary import Summary

Sample = Callable[[int, int], Tensor]
Score = Callable[[Tensor], float]
ACCURACY = "_accuracy"


@dataclass(eq=False)
class Contest:
    """One way of sampling, and what it has done so far.

    Attributes:
        name: Of its row.
        asked: Number of steps that ``sample`` is asked for.
        schedule: What to run under, bound to the model; None for plain sampling.
        planned: Fraction of an uncached step's MACs that the schedule leaves on average.
        images: What each generation returned, images, clips or sounds, on the CPU.
        seconds: Wall clock of each generation.
        steps: Solver steps that the last generation really ran.
        calls: Calls of the denoisers so far, of plain sampling.
        reused: Layer calls that were reused so far.
        recomputed: Layer calls that were to reuse but had to compute, by the reason.
        peak_bytes: The most bytes of kept values at any moment.
    """

    name: str
    asked: int
    schedule: Schedule | None = None
    planned: float = 1.0
    images: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    calls: int = 0
    reused: int = 0
    recomputed: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0

    def run(self, model: Any, sample: Sample, i: int, reference: Contest) -> None:
        """Runs generation number i.

        Raises:
            InvalidArgumentError: If ``sample`` did not run the model, or not as asked, or
                returned something else than images, clips or sounds like those of the reference.
        """
        with self._watched(model):
            start = time.perf_counter()
            images = sample(i, self.asked)
            if isinstance(images, Tensor):
                images = images.detach().cpu()  # waits for the device
            self.seconds.append(time.perf_counter() - start)
        call = f"sample({i}, {self.asked})"
        if not self.steps:
            raise InvalidArgumentError(
                f"{call} did not run the model from start to end under {self.name!r}; it must run "
                "the pipeline or module that was passed to compare."
            )
        if self.steps == reference.steps and self.asked != reference.asked:
            raise InvalidArgumentError(
                f"{call} ran {self.steps} steps, as it did when asked for {reference.asked}; "
                "it must run as many steps as it is asked for."
            )
        self.images.append(_checked(images, call, reference.images[i : i + 1] or self.images[:1]))

    @contextmanager
    def _watched(self, model: Any) -> Iterator[None]:
        """Runs under the schedule, if there is one, and counts."""
        if self.schedule is not None:
            with cached(model, self.schedule) as run:
                yield
            self._add(run.summary())
            return
        counter = _StepCounter()
        attachment = Attachment(model, {}, {}, counter)
        try:
            yield
        finally:
            attachment.remove()
        self.steps = counter.steps
        self.calls += counter.calls

    def _add(self, summary: Summary) -> None:
        self.steps = summary.schedule.num_steps if summary.finished else 0
        self.reused += summary.reused
        self.peak_bytes = max(self.peak_bytes, summary.peak_bytes)
        for reason, count in summary.recomputed.items():
            self.recomputed[reason] = self.recomputed.get(reason, 0) + count

    def compute(self, reference: Contest) -> float:
        """Fraction of the uncached run's MACs that were really spent.

        Layers that were to be reused but had to run count as the average of what was to be.
        """
        if self.schedule is None:
            return self.calls / reference.calls
        wanted = self.reused + sum(self.recomputed.values())
        kept = self.reused / wanted if wanted else 1.0
        return (1 - (1 - self.planned) * kept) * self.steps / reference.steps

    def row(self, reference: Contest, scores: Mapping[str, Score]) -> ReportRow:
        """What it cost and how good its images are."""
        images, uncached = torch.cat(self.images), torch.cat(reference.images)
        times = zip(self.seconds, reference.seconds, strict=True)
        judged: dict[str, Any] = dict(modality_of(images, "sample").measured(images, uncached))
        accuracies: dict[str, float] = {}
        for name, score in scores.items():
            attribute = name.removesuffix(ACCURACY)
            place, key = (judged, name) if name in COLUMNS else (accuracies, attribute)
            place[key] = float(score(images))
        return ReportRow(
            self.name,
            steps=self.steps,
            compute=self.compute(reference),
            time=statistics.median(own / other for own, other in times),
            seconds=sum(self.seconds),
            peak_bytes=self.peak_bytes,
            accuracies=accuracies,
            **judged,
        )


class _StepCounter:
    """Counts the steps and calls of a run without a schedule."""

    def __init__(self) -> None:
        self.steps = self.calls = 0

    def before(
        self, denoiser: str, tick: Tick, branch: int | None, args: tuple[Any, ...], kwargs: Any
    ) -> bool:
        self.steps += tick.call == 0
        self.calls += 1
        return False

    def after(self, denoiser: str, tick: Tick) -> None:
        pass

    def outside(self) -> None:
        pass

    def failed(self) -> None:
        pass


def _checked(results: object, call: str, like: list[Tensor]) -> Tensor:
    """What ``sample`` returned, in float32, if it can be compared with what is in ``like``.

    Raises:
        InvalidArgumentError: If it cannot.
    """
    modality = modality_of(results, call)
    noun, images = modality.noun, cast(Tensor, results)
    if not images.numel() or not images.isfinite().all():
        raise InvalidArgumentError(f"{call} returned no {noun}, or NaN or infinity in one.")
    low, high = images.min().item(), images.max().item()
    if modality.bounds and (low < modality.bounds[0] or high > modality.bounds[1]):
        raise InvalidArgumentError(
            f"{call} must return {noun} {modality.wanted}, got values from {low:.3g} to {high:.3g}."
        )
    if like and images.shape != like[0].shape:
        raise InvalidArgumentError(
            f"{call} returned {noun} of shape {list(images.shape)}, where {list(like[0].shape)} "
            "came before; all must have the same shape."
        )
    return images.float()
