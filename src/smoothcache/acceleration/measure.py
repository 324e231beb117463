"""Measures ways of sampling against the uncached run: cost, time, and decibels of every sample."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..comparison.result import HIGHEST_DECIBELS, mean_with_interval
from ..comparison.trial import metered
from ..errors import InvalidArgumentError
from ..model.target import Target
from ..runtime.run import cached
from ..schedule.schedule import Schedule
from ..searching.objectives import is_finite, output_tensors
from .report import MeasuredWay

UNCACHED = "uncached"


@dataclass(eq=False)
class Measurement:
    """One way of sampling and what it has shown so far.

    Attributes:
        name: What it is called.
        run: Runs generation number i.
        schedule: To run under; None for plain sampling.
        macs: Of the first generation.
        seconds: Of each generation that was timed.
        decibels: Of each sample, against the uncached one.
    """

    name: str
    run: Callable[[int], Any]
    schedule: Schedule | None = None
    macs: int = 0
    seconds: list[float] = field(default_factory=list)
    decibels: list[Tensor] = field(default_factory=list)

    def generate(self, model: Any, i: int, *, counts: bool) -> Any:
        """The tensors of a generation; its arithmetic is counted, or its time taken.

        Raises:
            InvalidArgumentError: If there are no tensors, or they are not finite.
        """
        denoisers = list(Target.of(model).denoisers.values()) if counts else []
        with (
            cached(model, self.schedule) if self.schedule is not None else nullcontext(),
            metered(denoisers, weigh=False) as meter,
        ):
            started = time.perf_counter()
            output = output_tensors(self.run(i), f"sample({i})")  # waits for the device
            seconds = time.perf_counter() - started
        if counts:
            self.macs = meter.macs
        else:
            self.seconds.append(seconds)
        if not is_finite(output):
            raise InvalidArgumentError(f"sample({i}) returned NaN or infinity under {self.name!r}")
        return output

    def against(self, uncached: Measurement) -> MeasuredWay:
        """What it came to, against the uncached run."""
        pairs = zip(self.seconds, uncached.seconds, strict=True)
        psnr, low, high = mean_with_interval(torch.cat(self.decibels))
        return MeasuredWay(
            self.name,
            compute=self.macs / uncached.macs if uncached.macs else 1.0,
            seconds=statistics.median(self.seconds),
            time=statistics.median(own / other for own, other in pairs),
            psnr=psnr,
            low=low,
            high=high,
        )


def measure(
    model: Any, ways: Sequence[Measurement], numbers: Sequence[int], told: Callable[[], object]
) -> None:
    """Measures ways of sampling on the same generations, which they run in turn.

    The first generation of each is counted, which takes time, and then run again if it is the only
    one.

    Args:
        model: Pipeline or module.
        ways: The first one is run uncached to compare with.
        numbers: Of the generations.
        told: Is told of every generation.
    """
    uncached, *others = ways
    for position, i in enumerate(numbers):
        for counts in (True, False) if len(numbers) == 1 else (position == 0,):
            reference = uncached.generate(model, i, counts=counts)
            told()
            for way in others:
                output = way.generate(model, i, counts=counts)
                told()
                if counts or position:
                    way.decibels.append(decibels(output, reference))


def decibels(output: Any, reference: Any) -> Tensor:
    """Peak signal-to-noise ratio of every sample of a batch in dB, at most 150.

    The peak is 1 for images in [0, 1], and else the range of the reference.

    Args:
        output: A tensor [batch, ...], or several.
        reference: As many tensors of the same shapes.

    Raises:
        InvalidArgumentError: If the shapes differ.
    """
    outputs, references = pytree.tree_leaves(output), pytree.tree_leaves(reference)
    if [x.shape for x in outputs] != [x.shape for x in references]:
        raise InvalidArgumentError(
            f"sample(i) returned the shapes {[list(x.shape) for x in outputs]}, and uncached "
            f"{[list(x.shape) for x in references]}; they must be the same"
        )
    sizes = {len(x) if x.ndim > 1 else 1 for x in references}
    count = sizes.pop() if len(sizes) == 1 else 1
    flat = [
        torch.cat([x.double().reshape(count, -1) for x in tensors], dim=1)
        for tensors in (outputs, references)
    ]
    error = (flat[0] - flat[1]).square().mean(dim=1)
    low, high = float(flat[1].min()), float(flat[1].max())
    peak = 1.0 if low >= 0 and 0 < high <= 1 else high - low
    values = 20 * math.log10(peak or 1.0) - 10 * error.clamp_min(1e-300).log10()
    return values.clamp(max=HIGHEST_DECIBELS)
