"""What a run under a schedule did, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import Schedule


@dataclass(frozen=True)
class Summary:
    """What a run did so far. Printed, it is a short text.

    Attributes:
        schedule: What was planned.
        finished: Generations that came to their last step.
        broken_off: Generations that did not.
        steps_under_way: Steps of the generation that is under way; 0 if none is.
        computed: Layer calls that ran the layer, as planned.
        reused: Layer calls answered from kept values.
        outside: Calls of the model that belonged to no generation of the pipeline; run in full.
        recomputed: Layer calls that were to reuse but had to compute, by the reason.
        peak_bytes: The most bytes of kept values at any moment.
        held_bytes: Bytes of kept values at this moment.
        never_ran: Paths of the layers that the schedule covers but the model never called.
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
            lines.append(f"calls outside of any generation, run in full: {self.outside}")
        if self.never_ran:
            shown = ", ".join(self.never_ran[:3]) + (", ..." if len(self.never_ran) > 3 else "")
            lines.append(f"layers that never ran: {len(self.never_ran)} ({shown})")
        if self.finished and not self.reused and not self.schedule.is_all_compute:
            lines.append("NOTHING WAS REUSED: the schedule had no effect")
        return "\n".join(lines)
