"""Summary and counters of a run under a schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..schedule.schedule import Schedule

OTHER_SHAPES = "the shape of the inputs had changed"
NOT_FINITE = "what had been computed was not finite"


@dataclass(frozen=True)
class Summary:
    """What a run has computed and reused so far; ``str()`` gives a short text.

    Attributes:
        schedule: The schedule of the run.
        finished: Number of generations that reached their last step.
        broken_off: Number of generations that were interrupted.
        steps_under_way: Number of steps of the current generation; 0 if there is none.
        computed: Number of layer calls computed as planned.
        reused: Number of layer calls that reused kept values.
        outside: Number of model calls outside any generation, which are computed in full.
        recomputed: Number of layer calls planned for reuse that had to be computed, by reason.
        peak_bytes: Peak size of the kept values in bytes.
        held_bytes: Current size of the kept values in bytes.
        never_ran: Paths of the scheduled layers that the model never called.
    """

    schedule: Schedule
    finished: int
    broken_off: int
    steps_under_way: int
    computed: int
    reused: int
    outside: int
    recomputed: dict[str, int]
    peak_bytes: int
    held_bytes: int
    never_ran: tuple[str, ...]

    @property
    def reused_fraction(self) -> float:
        """Share of the layer calls that reused, in [0, 1]; 0 before any call."""
        calls = self.computed + self.reused + sum(self.recomputed.values())
        return self.reused / calls if calls else 0.0

    def __str__(self) -> str:
        planned = self.schedule.compute
        lines = [
            f"{self.finished} generation(s) of {self.schedule.num_steps} steps finished"
            + (f", {self.broken_off} broken off" if self.broken_off else "")
            + (f", one at step {self.steps_under_way}" if self.steps_under_way else ""),
            f"layer calls: {self.computed} computed, {self.reused} reused "
            f"({self.reused_fraction:.1%})",
            f"peak of kept values: {self.peak_bytes / 2**20:.2f} MiB",
        ]
        if planned is not None:
            lines.insert(1, f"planned compute: {planned:.1%} of the uncached MACs")
        if self.recomputed:
            total = sum(self.recomputed.values())
            lines.append(f"computed although planned for reuse: {total}")
            lines += [f"  {count} because {why}" for why, count in self.recomputed.items()]
        if self.outside:
            lines.append(f"calls outside any generation, computed in full: {self.outside}")
        if self.never_ran:
            shown = ", ".join(self.never_ran[:3]) + (", ..." if len(self.never_ran) > 3 else "")
            lines.append(f"layers that never ran: {len(self.never_ran)} ({shown})")
        if self.finished and not self.reused and not self.schedule.is_all_compute:
            lines.append("NOTHING WAS REUSED: the schedule had no effect")
        return "\n".join(lines)


@dataclass
class Tally:
    """Counters of a run, updated by its layers.

    Attributes:
        computed: Number of layer calls computed as planned.
        reused: Number of layer calls that reused kept values.
        recomputed: Number of layer calls planned for reuse that had to be computed, by reason.
        held_bytes: Current size of the kept values in bytes.
        peak_bytes: Peak of ``held_bytes``.
    """

    computed: int = 0
    reused: int = 0
    recomputed: dict[str, int] = field(default_factory=dict)
    held_bytes: int = 0
    peak_bytes: int = 0

    def hold(self, change: int) -> None:
        """Adds to the kept bytes; a negative change frees them."""
        self.held_bytes += change
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def recompute(self, reason: str, calls: int = 1) -> None:
        """Counts calls that were planned for reuse but had to be computed."""
        self.recomputed[reason] = self.recomputed.get(reason, 0) + calls
