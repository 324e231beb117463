"""Learning-to-Cache beside even spacings of the same cost, on the demo's pipeline (50 DDIM steps).

Trains routers on seeds of their own, plans for each budget, and prints for each way of sampling
the MACs it spends, its relative error and PSNR against the uncached images of seeds that nothing
was trained on, and what finding it cost in uncached generations. Even spacings compute all layers
at as many steps as the budget allows; every 2nd step is FORA with n = 2.

    python benchmarks/learned_cache.py [--compute 0.75 0.51] [--epochs 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smoothcache as sc
from smoothcache.demo.image import CALIBRATION_SEEDS, FOLDER, NUM_CLASSES, sample_shapes
from smoothcache.diffusers_io.loading import load_pipeline
from smoothcache.metrics.fidelity import psnr, relative_error

STEPS = 50
LEAST_FREE = 0.05  # of the compute: what routers need to choose from


def learned_schedule(
    model: Any,
    sample: Callable[[int], Any],
    calibration: sc.Calibration,
    compute: float,
    *,
    interval: int | None = None,
    predictor: str = "hold",
    progress: bool = False,
    **settings: Any,
) -> tuple[sc.Schedule, float]:
    """Trains routers for a budget and plans from them.

    Args:
        model: Pipeline or module.
        sample: ``sample(i)`` runs generation number i.
        calibration: Of the same sampler.
        compute: The most that the schedule may cost, as a fraction of the uncached MACs.
        interval: Of ``learn_routers``; None for the smallest that leaves the routers a choice.
        predictor: How reused values are made.
        progress: Whether to show a progress bar.
        **settings: Others of ``learn_routers``.

    Returns:
        The schedule, and what the training cost in uncached generations.
    """
    interval = interval or smallest_interval(calibration, compute)
    routers = sc.learn_routers(
        model,
        sample,
        calibration,
        compute=compute,
        interval=interval,
        predictor=predictor,
        progress=progress,
        **settings,
    )
    cost = float(routers.provenance["training cost"].split()[0])
    return sc.plan_learned(routers, compute=compute), cost


def smallest_interval(calibration: sc.Calibration, compute: float) -> int:
    """The smallest interval at which reusing all it allows is clearly cheaper than a budget."""
    for interval in range(2, calibration.num_steps):
        if cost(even(calibration, math.ceil(calibration.num_steps / interval))) < (
            compute - LEAST_FREE
        ):
            return interval
    return calibration.num_steps


def even(calibration: sc.Calibration, count: int, predictor: str = "hold") -> sc.Schedule:
    """Computes all layers at ``count`` steps, evenly spaced from step 0 on."""
    steps = calibration.num_steps
    chosen = {i * steps // count for i in range(count)}
    row = sc.Row(tuple(step in chosen for step in range(steps)), predictor)
    share = sum(layer.macs or 0 for layer in calibration.layers) / calibration.total_macs
    return sc.Schedule(
        steps,
        {layer.path: row for layer in calibration.layers},
        calibration.layers,
        model=calibration.model,
        timesteps=calibration.timesteps,
        compute=1 - share * (1 - count / steps),
    )


def cost(schedule: sc.Schedule) -> float:
    return 1.0 if schedule.compute is None else schedule.compute


def even_within(calibration: sc.Calibration, compute: float, predictor: str) -> sc.Schedule:
    """The even spacing that spends most of a budget."""
    counts = range(calibration.num_steps, 0, -1)
    schedules = (even(calibration, count, predictor) for count in counts)
    return next(x for x in schedules if cost(x) <= compute)


class Judge:
    """Compares with the uncached images of seeds that nothing was trained on."""

    def __init__(self, pipe: Any, batches: int) -> None:
        self._pipe = pipe
        self._batches = batches
        self.reference = self.images()

    def images(self, num_steps: int = STEPS) -> Tensor:
        labels = list(range(NUM_CLASSES))
        seeds = range(self._batches)
        return torch.cat([sample_shapes(self._pipe, labels, i, num_steps) for i in seeds])

    def row(self, name: str, compute: float, images: Tensor, trained: float = 0) -> dict[str, Any]:
        row = {
            "name": name,
            "compute": compute,
            "relative_error": float(relative_error(images, self.reference).mean()),
            "psnr": float(psnr(images, self.reference).mean()),
            "training": trained,
        }
        print(
            f"{name:34} {row['compute']:8.1%} {row['relative_error']:9.4f} {row['psnr']:8.2f}"
            f" {trained:9.0f}",
            flush=True,
        )
        return row

    def schedule(self, name: str, schedule: sc.Schedule, trained: float = 0) -> dict[str, Any]:
        with sc.cached(self._pipe, schedule):
            images = self.images()
        return self.row(name, cost(schedule), images, trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compute", type=float, nargs="+", default=[0.75, 0.51])
    parser.add_argument("--predictors", nargs="+", default=["hold", "taylor"])
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--interval", type=int)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--batches", type=int, default=1, help="of 10 images, to be compared")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    pipe = load_pipeline(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def sample(i: int) -> Tensor:
        return sample_shapes(pipe, [i % NUM_CLASSES], CALIBRATION_SEEDS + i, STEPS)

    calibration = sc.calibrate(pipe, sample, 2, 1, progress=False)
    judge = Judge(pipe, options.batches)
    print(f"{'':34} {'compute':>8} {'rel. err':>9} {'PSNR':>8} {'training':>9}")
    rows = []
    for compute in options.compute:
        fewer = int(STEPS * compute)
        rows.append(judge.row(f"{fewer} steps", fewer / STEPS, judge.images(fewer)))
        for predictor in options.predictors:
            spaced = even_within(calibration, compute, predictor)
            rows.append(judge.schedule(f"even, {predictor}", spaced))
            learned, trained = learned_schedule(
                pipe,
                sample,
                calibration,
                compute,
                interval=options.interval,
                predictor=predictor,
                num_samples=options.samples,
                epochs=options.epochs,
                learning_rate=options.rate,
            )
            interval = learned.provenance["interval"]
            rows.append(judge.schedule(f"learned, {predictor}, n = {interval}", learned, trained))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
