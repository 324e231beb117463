"""Planned timesteps beside even ones and beside caching, on the demo's pipeline of images.

    python benchmarks/timestep_grids.py --write

Every row runs the denoiser as often as the others of its budget. A grid skips steps in the sampler;
a trajectory plan skips calls of the denoiser within the calibrated sampler's steps. PSNR is against
the uncached 50 steps of DDIM, and against the converged sample (500 steps).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_methods import environment
from torch import Tensor

import smoothcache as sc
from smoothcache.comparison.benchmark import Case
from smoothcache.demo.image import NUM_CLASSES, shapes_case
from smoothcache.diffusers_io import multistep_solvers, scheduler_on_grid, silence_libraries
from smoothcache.metrics.fidelity import psnr

RESULTS = Path(__file__).parent / "results" / "timestep_grids.json"
COUNTS = (25, 18, 14, 11, 9)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    silence_libraries()
    case = shapes_case(options.steps)
    pipeline = case.model
    calibration = sc.calibrate(
        pipeline,
        lambda i: case.training(pipeline, i),
        options.calibration,
        max_gap=1,
        granularity="model",
        progress=False,
    )
    numbers = range(options.generations)
    uncached = [case.sample(pipeline, i) for i in numbers]
    converged = [case.sample(pipeline, i, num_inference_steps=500) for i in numbers]
    second = multistep_solvers(pipeline.scheduler)["DPM-Solver++ 2M"]
    first = type(second).from_config(second.config, solver_order=1)
    rows: list[dict[str, Any]] = []
    print(f"uncached: {_mean(uncached, converged)[0]:.2f} dB to converged")
    for count in options.counts:
        ways = _ways(case, calibration, count, first, second)
        for name, way in ways.items():
            samples = [way(i) for i in numbers]
            to_uncached, margin = _mean(samples, uncached)
            to_converged, _ = _mean(samples, converged)
            row = {
                "steps": count,
                "name": name,
                "to_uncached": round(to_uncached, 2),
                "margin": round(margin, 2),
                "to_converged": round(to_converged, 2),
            }
            rows.append(row)
            print(
                f"{count:3} calls  {name:34} {to_uncached:6.2f} dB to uncached  "
                f"{to_converged:6.2f} dB to converged",
                flush=True,
            )
    if options.write:
        document = {
            "samples": options.generations * NUM_CLASSES,
            "calibration_samples": options.calibration,
            "rows": rows,
            "environment": environment(),
        }
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _ways(
    case: Case, calibration: sc.Calibration, count: int, first: Any, second: Any
) -> dict[str, Callable[[int], Tensor]]:
    """Name of a row -> what runs generation number i with so many calls of the denoiser."""
    pipeline = case.model

    def with_solver(scheduler: Any) -> Callable[[int], Tensor]:
        def sample(i: int) -> Tensor:
            return case.sample(pipeline, i, num_inference_steps=count, scheduler=scheduler)

        return sample

    def planned(scheduler: Any, order: int) -> Callable[[int], Tensor]:
        grid = sc.plan_timesteps(calibration, count, order=order)
        return with_solver(scheduler_on_grid(scheduler, grid))

    plan = sc.plan_trajectory(calibration, steps_computed=count)
    schedule = sc.fit(
        pipeline, lambda i: case.training(pipeline, i), plan, calibration, progress=False
    )

    def cached(i: int) -> Tensor:
        with sc.cached(pipeline, schedule):
            return case.sample(pipeline, i)

    return {
        "first order, even": with_solver(first),
        "first order, planned": planned(first, 1),
        "second order, even": with_solver(second),
        "second order, planned for order 1": planned(second, 1),
        "second order, planned for order 2": planned(second, 2),
        "50 steps, trajectory plan, fitted": cached,
    }


def _mean(samples: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[float, float]:
    """Mean PSNR, and half its 95 % interval."""
    every = torch.cat([psnr(a, b) for a, b in zip(samples, references, strict=True)])
    return float(every.mean()), 1.96 * float(every.std()) / len(every) ** 0.5


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--calibration", type=int, default=5, help="samples, of ten images each")
    parser.add_argument("--generations", type=int, default=4, help="to compare, of ten images")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
