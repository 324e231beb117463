"""The result of a comparison: scores with intervals, and duels at equal cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..calibration.statistics import student_t_95
from ..checks import listed
from ..errors import InvalidArgumentError
from ..metrics.modality import Modality, modality_of
from ..metrics.report import Report, ReportRow

REFERENCE = "uncached"
"""Name of the row of the uncached run."""
HIGHEST_DECIBELS = 150.0  # taken for identical samples where differences are averaged
QUOTED = {
    "psnr": ("PSNR {:.1f} against {:.1f} dB", 1),
    "snr": ("SNR {:.1f} against {:.1f} dB", 1),
    "log_spectral_distance": ("log-spectral distance {:.2f} against {:.2f} dB", 1),
    "relative_error": ("relative error {:.3g} against {:.3g}", 1),
    "class_accuracy": ("class accuracy {:.1f} against {:.1f} %", 100),
    "frechet_distance": ("Frechet distance {:.4g} against {:.4g}", 1),
}
"""What the verdict quotes of two rows, and a factor for the unit."""


@dataclass(frozen=True)
class Duel:
    """A schedule against fewer steps of the same cost: which is closer to the uncached samples?

    Attributes:
        name: The schedule's row.
        rival: The row of fewer steps.
        gain: Mean PSNR, or of sounds SNR, of the schedule over that of its rival, in dB;
            negative if it lost.
        low: Lower end of the 95 % confidence interval of ``gain`` over samples; NaN for one.
        high: Its upper end.
    """

    name: str
    rival: str
    gain: float
    low: float
    high: float

    @property
    def is_won(self) -> bool | None:
        """Whether the schedule is closer; None if the samples do not tell."""
        if self.gain == 0 or self.low <= 0 <= self.high:
            return None
        return self.gain > 0


@dataclass(frozen=True, eq=False)
class Comparison:
    """The result of ``compare``.

    Attributes:
        rows: The uncached run first; rows of fewer steps follow the schedules of their cost.
        images: What each row sampled, on the CPU; [samples, channels, height, width] in [0, 1],
            of clips [samples, frames, channels, height, width], of sounds [samples, channels, audio
            samples].
        rivals: Name of each schedule's row -> name of the row of fewer steps of the same cost.
        recomputed: Name of a row -> why layers ran that its schedule would have reused, and how
            often; empty if all went as planned.
    """

    rows: tuple[ReportRow, ...]
    images: Mapping[str, Tensor]
    rivals: Mapping[str, str]
    recomputed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def modality(self) -> Modality:
        """What kind of samples these are."""
        return modality_of(self.images[REFERENCE], "sample")

    def row(self, name: str) -> ReportRow:
        """The row of this name.

        Args:
            name: Of a variant, "uncached", or of a row of fewer steps.

        Returns:
            Cost, time and quality of this way of sampling.

        Raises:
            InvalidArgumentError: If there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = listed((row.name for row in self.rows), 20)
        raise InvalidArgumentError(f"there is no row {name!r}; there are {names}.")

    def duels(self) -> tuple[Duel, ...]:
        """Each schedule against fewer steps of the same cost, sample by sample.

        Returns:
            One for each schedule, in the order of the rows.
        """
        if not self.rivals:
            return ()
        decibels, uncached = self.modality.decibels, self.images[REFERENCE]
        quality = {
            name: decibels(x, uncached).double().clamp(max=HIGHEST_DECIBELS)
            for name, x in self.images.items()
        }
        return tuple(
            Duel(name, rival, *mean_with_interval(quality[name] - quality[rival]))
            for name, rival in self.rivals.items()
        )

    def verdict(self) -> list[str]:
        """A sentence for each schedule, and one for all: does caching beat fewer steps?

        Returns:
            The sentences; empty if no schedule was compared.
        """
        duels = self.duels()
        if not duels:
            return []
        won = [duel for duel in duels if duel.is_won]
        conclusion = (
            f"Schedules that beat plain fewer steps of the same cost, in {self.modality.title} "
            f"against the uncached {self.modality.noun}: {len(won)} of {len(duels)}"
        )
        if won:
            best = max(won, key=lambda duel: duel.gain)
            conclusion += f". The largest gain is {best.gain:.1f} dB, of {best.name}"
        else:
            conclusion += ". Use fewer steps instead"
        return [*map(self._sentence, duels), f"{conclusion}."]

    def report(self, title: str = "") -> Report:
        """The table, with the verdict below it.

        Args:
            title: Comes above the table.

        Returns:
            A report that prints as text, Markdown or JSON.
        """
        return Report(self.rows, title=title, notes=(*self._warnings(), *self.verdict()))

    def __str__(self) -> str:
        """The table, and the notes below it."""
        return str(self.report())

    def _repr_html_(self) -> str:
        """What a notebook shows: the table and the verdict."""
        return self.report()._repr_html_()

    def _sentence(self, duel: Duel) -> str:
        first, second = self.row(duel.name), self.row(duel.rival)
        if duel.is_won is False:
            first, second = second, first
        noun = self.modality.noun
        close = (
            f"is no closer to the uncached {noun}, and no farther from them, than"
            if duel.is_won is None
            else f"is closer to the uncached {noun} than"
        )
        numbers = [
            text.format(factor * getattr(first, name), factor * getattr(second, name))
            for name, (text, factor) in QUOTED.items()
            if None not in (getattr(first, name), getattr(second, name))
        ]
        return f"{first.name} {close} {second.name} at the same cost: {', '.join(numbers)}."

    def _warnings(self) -> Iterator[str]:
        for name, reasons in self.recomputed.items():
            count = sum(reasons.values())
            yield (
                f"{name}: {count} layer calls were to reuse but had to compute, because "
                f"{'; because '.join(reasons)}. Its cost counts them."
            )


def mean_with_interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of [n] values with its 95 % confidence interval, which is NaN for one value."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    half_width = student_t_95(len(values) - 1) * float(values.std()) / math.sqrt(len(values))
    return mean, mean - half_width, mean + half_width
