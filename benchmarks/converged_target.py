"""Plans that aim at the converged sample, on the demo's pipeline of images.

    python benchmarks/converged_target.py --write

Every row is the PSNR against the converged sample of the same noise (500 steps of DDIM). Plans
reuse the whole denoiser's output over 50 steps of DDIM; solvers run as many steps as plans compute.
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
from smoothcache.demo.image import NUM_CLASSES, shapes_case
from smoothcache.diffusers_io import multistep_solvers, silence_libraries
from smoothcache.metrics.fidelity import psnr

RESULTS = Path(__file__).parent / "results" / "converged_target.json"
COUNTS = (25, 18, 14, 11, 9)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    silence_libraries()
    case = shapes_case(options.steps)
    pipeline = case.model

    def training(i: int, num_inference_steps: int | None = None) -> Tensor:
        return case.training(pipeline, i, num_inference_steps)

    calibration = sc.calibrate(
        pipeline,
        training,
        options.calibration,
        max_gap=1,
        granularity="model",
        trajectory=True,
        converged_steps=options.converged,
        progress=False,
    )
    numbers = range(options.generations)
    references = [case.sample(pipeline, i, options.converged) for i in numbers]
    rows: list[dict[str, Any]] = []

    def note(count: int, name: str, sample: Callable[[int], Tensor]) -> None:
        every = torch.cat([psnr(sample(i), references[i]) for i in numbers])
        margin = 1.96 * float(every.std()) / len(every) ** 0.5
        row = {"steps": count, "name": name, "psnr": round(float(every.mean()), 2)}
        rows.append({**row, "margin": round(margin, 2)})
        print(f"{count:3} calls  {name:26} {row['psnr']:6.2f} ± {margin:.2f} dB", flush=True)

    note(options.steps, "uncached", lambda i: case.sample(pipeline, i))
    solvers = {"own solver": None, **multistep_solvers(pipeline.scheduler)}
    for count in options.counts:
        for name, solver in solvers.items():
            note(count, name, lambda i, n=count, x=solver: case.sample(pipeline, i, n, x))
        for target in ("uncached", "converged"):
            plan = sc.plan_trajectory(calibration, steps_computed=count, target=target)
            fitted = sc.fit(pipeline, training, plan, calibration, target=target, progress=False)

            def cached(i: int, schedule: sc.Schedule = fitted) -> Tensor:
                with sc.cached(pipeline, schedule):
                    return case.sample(pipeline, i)

            note(count, f"plan, target {target}", cached)
    if options.write:
        document = {
            "samples": options.generations * NUM_CLASSES,
            "calibration_samples": options.calibration,
            "converged_steps": options.converged,
            "rows": rows,
            "environment": environment(),
        }
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--converged", type=int, default=500)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--calibration", type=int, default=4, help="samples, of ten images each")
    parser.add_argument("--generations", type=int, default=3, help="to compare, of ten images")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
