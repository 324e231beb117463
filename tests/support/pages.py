"""Made-up results for reports, with names that no report may take for markup."""

from __future__ import annotations

import torch
from support.made_up import calibration_of
from torch import Tensor

from smoothcache import Calibration, Row, Schedule
from smoothcache.comparison.result import Comparison
from smoothcache.layers.layer import ModelIdentity
from smoothcache.metrics.report import ReportRow

HOSTILE = "<script>alert('x')</script>\"'&amp; $\\frac{1 $ {{ 7*7 }} </style>"
STEPS = 12


def samples(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = {"image": (3, 3, 24, 20), "video": (2, 5, 3, 16, 16), "audio": (2, 1, 4096)}[kind]
    drawn = torch.rand(shape, generator=generator)
    return drawn if kind != "audio" else drawn - 0.5


def comparison(kind: str = "image", name: str = "every 2nd step") -> Comparison:
    """Two schedules beside fewer steps; the second is called as asked for."""
    names = ("uncached", "α = 0.2", name, "6 steps")
    base = samples(kind, 0)
    images = {
        row: (base + 0.02 * i * samples(kind, i)).clamp(-1 if kind == "audio" else 0, 1)
        for i, row in enumerate(names)
    }
    field = "snr" if kind == "audio" else "psnr"
    rows = [ReportRow("uncached", steps=STEPS, compute=1.0, time=1.0, **{field: float("inf")})]
    rows += [
        ReportRow(row, steps=STEPS, compute=0.5, time=0.55, relative_error=0.1, **{field: 40.0 - i})
        for i, row in enumerate(names[1:])
    ]
    return Comparison(tuple(rows), images, {names[1]: "6 steps", names[2]: "6 steps"})


def schedules(name: str = "every 2nd step") -> dict[str, Schedule]:
    even = Row.uniform(STEPS, 2)
    odd = Row.uniform(STEPS, 3, predictor="taylor")
    return {
        "α = 0.2": Schedule(STEPS, {"attn": even, "ffn": odd}, provenance={"alpha": "0.2"}),
        name: Schedule(STEPS, {name: even}, compute=0.5, provenance={"alpha": name}),
    }


def calibration(name: str = "ToyDiT") -> Calibration:
    return calibration_of(0.2, max_gap=2, steps=STEPS, model=ModelIdentity(name, "0" * 16))
