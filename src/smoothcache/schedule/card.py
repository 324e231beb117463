"""The card of a schedule that is shared on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..hub.card import Card, Details
from ..hub.shared import FileKind
from ..steps.resample import CARRIED_OVER
from ..version import __version__

if TYPE_CHECKING:
    from .schedule import Schedule

FILE_KIND = FileKind(
    "schedule.json",
    "schedule",
    most_bytes=64 * 2**20,
    others={"calibration.safetensors": "It holds a calibration: Calibration.from_pretrained."},
)


def schedule_card(
    schedule: Schedule, name: str, details: Details, measured: Sequence[Sequence[str]]
) -> Card:
    """What a schedule is for, what was measured of it, and what was not.

    Args:
        schedule: What is shared.
        name: Of the repository.
        details: What the one who shares adds.
        measured: A table, its heading first.
    """
    model = schedule.model
    kinds = sorted({layer.kind for layer in schedule.layers or ()})
    facts = {
        "denoiser": model.class_name if model else "",
        "digest of its configuration": model.fingerprint if model else "",
        "noise scheduler": schedule.solver or "",
        "steps": str(schedule.num_steps),
        "compute": "" if schedule.compute is None else f"{schedule.compute:.1%} of the MACs",
        "layers": f"{len(schedule.rows)}: {', '.join(kinds)}" if kinds else "",
        **{f"measured {key}": f"{value:.4g}" for key, value in schedule.quality.items()},
        **{f"made with {key}": value for key, value in schedule.provenance.items()},
        "smoothcache": __version__,
    }
    usage = (
        "import smoothcache as sc\n\n"
        f'schedule = sc.Schedule.from_pretrained("{name}")\n'
        "with sc.cached(pipe, schedule):\n"
        f"    pipe(..., num_inference_steps={schedule.num_steps})"
    )
    title = f"Schedule for {details.base_model or (model.class_name if model else 'a model')}"
    return Card(title, "schedule", facts, usage, measured, _limits(schedule, details), details)


def _limits(schedule: Schedule, details: Details) -> list[str]:
    """What follows from what is not known."""
    limits = []
    if not schedule.quality and CARRIED_OVER not in schedule.provenance:
        limits.append("The quality of the samples: the file has no figure of it.")
    if CARRIED_OVER in schedule.provenance:
        limits.append("Anything at this number of steps: it was carried over from another one.")
    solver = schedule.solver or "the noise scheduler that it was made with"
    limits.append(f"Other numbers of steps than {schedule.num_steps}; other solvers than {solver}.")
    named = {name.lower() for name in details.settings}
    for what in ("resolution", "dtype", "guidance"):
        stated = next((details.settings[x] for x in details.settings if x.lower() == what), None)
        limits.append(
            f"Any {what} other than {stated}." if what in named else f"The {what} is not stated."
        )
    limits.append("Fine-tuned models, adapters, and other models of the same class.")
    return limits
