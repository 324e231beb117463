"""The card of a calibration that is shared on the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..hub.card import Card, Details
from ..hub.shared import FileKind
from ..version import __version__

if TYPE_CHECKING:
    from .curves import Calibration

FILE_KIND = FileKind(
    "calibration.safetensors",
    "calibration",
    most_bytes=2**30,
    others={"schedule.json": "It holds a schedule: Schedule.from_pretrained."},
)


def calibration_card(calibration: Calibration, name: str, details: Details) -> Card:
    """What was calibrated, on what, and the error curves in short.

    Args:
        calibration: What is shared.
        name: Of the repository.
        details: What the one who shares adds.
    """
    model = calibration.model
    facts = {
        "denoiser": model.class_name if model else "",
        "digest of its configuration": model.fingerprint if model else "",
        "noise scheduler": calibration.solver or "",
        "steps": str(calibration.num_steps),
        "samples": str(calibration.num_samples),
        "largest gap": str(calibration.max_gap),
        **{f"made with {key}": value for key, value in calibration.provenance.items()},
        "smoothcache": __version__,
    }
    usage = (
        "import smoothcache as sc\n\n"
        f'calibration = sc.Calibration.from_pretrained("{name}")\n'
        "schedule = sc.plan(calibration, alpha=0.2)"
    )
    limits = [
        f"Other numbers of steps than {calibration.num_steps}; plan(num_steps=...) interpolates.",
        "Other noise schedulers, resolutions, guidance scales and kinds of prompts.",
        "The quality of samples: error curves are of layers, not of what the pipeline makes.",
    ]
    title = f"Calibration of {details.base_model or (model.class_name if model else 'a model')}"
    return Card(title, "calibration", facts, usage, curve_rows(calibration), limits, details)


def curve_rows(calibration: Calibration) -> list[list[str]]:
    """A table of the errors by kind and gap, its heading first; only a heading for one step."""
    gaps = range(1, min(calibration.max_gap, calibration.num_steps - 1) + 1)
    rows = [["kind", "layers", *(f"error at gap {gap}" for gap in gaps)]]
    for kind in calibration.kinds if gaps else ():
        count = sum(layer.kind == kind for layer in calibration.layers)
        means = [np.nanmean(calibration.curve(gap=gap, kind=kind).mean) for gap in gaps]
        rows.append([kind, str(count), *(f"{mean:.3g}" for mean in means)])
    return rows
