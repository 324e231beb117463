"""What an acceleration gained and lost, measured on unseen samples."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class MeasuredWay:
    """One way of sampling, measured against the uncached one.

    Attributes:
        name: What it is called.
        compute: Multiply-accumulates as a fraction of those of the uncached run.
        seconds: Wall clock of a generation, the median.
        time: Wall clock as a fraction of the uncached one, the median over generations.
        psnr: Mean over the samples, in dB, against the uncached ones.
        low: Lower end of the 95 % confidence interval of ``psnr``; NaN for one sample.
        high: Its upper end.
    """

    name: str
    compute: float
    seconds: float
    time: float
    psnr: float
    low: float
    high: float

    @property
    def speedup(self) -> float:
        """How many times as fast as the uncached run, in multiply-accumulates."""
        return 1 / self.compute if self.compute else math.inf

    @property
    def speedup_in_time(self) -> float:
        """How many times as fast as the uncached run, in wall clock."""
        return 1 / self.time if self.time else math.inf

    def __str__(self) -> str:
        between = "" if math.isnan(self.low) else f" (95 %: {self.low:.1f} to {self.high:.1f})"
        return (
            f"{self.name}: x {self.speedup:.2f} in MACs, x {self.speedup_in_time:.2f} in time, "
            f"PSNR {self.psnr:.1f} dB{between}"
        )


@dataclass(frozen=True)
class AccelerationReport:
    """What was gained and lost. ``str()`` gives a few lines.

    Attributes:
        cached: The schedule that was enabled.
        alternatives: Fewer steps of the same cost without a cache, of the sampler's own solver and
            of the best other one; empty if the sampler cannot take fewer steps.
        seconds: Wall clock of an uncached generation, the median.
        num_samples: Generations that were measured, none of which was used before.
        gain: How many dB the schedule is closer to the uncached samples than the best of the
            alternatives, a mean over the samples; NaN without any.
        gain_low: Lower end of its 95 % confidence interval; NaN for one sample.
        gain_high: Its upper end.
        cost: What calibrating, searching and measuring took, in uncached generations.
        is_calibration_cached: Whether the calibration was read from disk.
        notes: What else is to be known.
    """

    cached: MeasuredWay
    alternatives: tuple[MeasuredWay, ...]
    seconds: float
    num_samples: int
    gain: float
    gain_low: float
    gain_high: float
    cost: float
    is_calibration_cached: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def pays(self) -> bool | None:
        """Whether the cache beats fewer steps; None if that was not measured or cannot be told."""
        if math.isnan(self.gain) or self.gain == 0 or self.gain_low <= 0 <= self.gain_high:
            return None
        return self.gain > 0

    @property
    def verdict(self) -> str:
        """Whether the cache pays, in a sentence."""
        if not self.alternatives:
            return (
                "not compared with fewer steps, because sample takes no num_inference_steps: "
                "whether the cache pays is not known"
            )
        best = max(self.alternatives, key=lambda way: way.psnr)
        if self.pays is None:
            return (
                f"no difference to {best.name} that {self.num_samples} samples can tell "
                f"({self.gain:+.1f} dB); measure more of them"
            )
        if self.pays:
            return (
                f"caching pays: {self.gain:.1f} dB closer to the uncached samples than {best.name} "
                "without a cache"
            )
        return (
            f"CACHING DOES NOT PAY: {best.name} without a cache is {-self.gain:.1f} dB closer to "
            "the uncached samples at the same cost; disable it and sample so instead"
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for a file.

        Returns:
            Names of the attributes and the verdict -> values.
        """
        return {**asdict(self), "pays": self.pays, "verdict": self.verdict}

    def __str__(self) -> str:
        unseen = f"{self.num_samples} unseen generation" + "s" * (self.num_samples > 1)
        source = ", with a calibration from the cache" if self.is_calibration_cached else ""
        return "\n".join(
            [
                f"{self.cached}",
                *(f"beside it, {way}" for way in self.alternatives),
                self.verdict,
                f"measured on {unseen} of {self.seconds:.2g} s uncached; all of it took as much as "
                f"{self.cost:.1f} uncached generations{source}",
                *self.notes,
            ]
        )
