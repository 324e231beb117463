"""Plans from trajectories on the demo's pipeline of images, beside even spacing.

    python benchmarks/trajectory.py --write

Calibrates on seeds of its own, plans, fits and searches at every budget, and compares images of
other seeds with the uncached ones. What each plan cost is counted in uncached generations (of ten
images, as a sample is), by the calls of the denoiser, the calibration apart. `search` calibrates
by itself, which counts. With `--only`, `--write` keeps the other rows that were written before.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_methods import environment
from torch import Tensor

import smoothcache as sc
from smoothcache.comparison.benchmark import Case
from smoothcache.demo.image import NUM_CLASSES, shapes_case
from smoothcache.diffusers_io.loading import silence_libraries
from smoothcache.metrics.fidelity import psnr

RESULTS = Path(__file__).parent / "results" / "trajectory_image.json"
BUDGETS = (0.52, 0.36, 0.28, 0.22, 0.18)
STEPS = 50


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    silence_libraries()
    case = shapes_case(options.steps)
    calls = _Calls(case)

    def sample(i: int) -> Tensor:
        return case.training(case.model, i)

    started = time.perf_counter()
    calibration = sc.calibrate(
        case.model, sample, options.calibration, max_gap=1, granularity="model", progress=False
    )
    calibrating = {"generations": calls.taken(), "seconds": time.perf_counter() - started}
    print(
        f"calibration: {calibrating['generations']:.1f} generations, {calibrating['seconds']:.0f} s"
    )
    references = [case.sample(case.model, i) for i in range(options.generations)]
    rows = []
    for budget in options.budgets:
        count = int(options.steps * budget + 1e-9)
        ways = _ways(case, calibration, sample, count, budget, options)
        for name, make in ways.items():
            if options.only and not any(part in name for part in options.only):
                continue
            calls.taken()
            started = time.perf_counter()
            schedule = make()
            seconds, cost = time.perf_counter() - started, calls.taken()
            if isinstance(schedule, sc.SearchedSchedule) and schedule.result is not None:
                cost = schedule.result.cost  # a step of layers is no whole one
            mean, margin = _quality(case, schedule, references)
            row = next(iter(schedule.rows.values())).computed
            rows.append(
                {
                    "budget": budget,
                    "name": name,
                    "steps_computed": sum(row),
                    "predictor": next(iter(schedule.rows.values())).predictor,
                    "compute": schedule.compute,
                    "psnr": round(mean, 2),
                    "margin": round(margin, 2),
                    "generations": round(cost, 2),
                    "seconds": round(seconds, 1),
                    "quality": dict(schedule.quality),
                    "compute_steps": [t for t, x in enumerate(row) if x],
                }
            )
            print(_line(rows[-1]), flush=True)
        if options.write:
            _write(case, options, calibrating, rows)


def _write(
    case: Case, options: argparse.Namespace, calibrating: dict[str, float], rows: list[Any]
) -> None:
    document = {
        "case": case.name,
        "samples": options.generations * NUM_CLASSES,
        "calibration_samples": options.calibration,
        "calibration": calibrating,
        "max_cost": options.max_cost,
        "rows": [*_kept(rows), *rows] if options.only else rows,
        "environment": environment(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _kept(rows: Sequence[Any]) -> list[Any]:
    """The rows of the results so far that these do not replace."""
    if not RESULTS.is_file():
        return []
    known = {(row["budget"], row["name"]) for row in rows}
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return [row for row in before if (row["budget"], row["name"]) not in known]


def _ways(
    case: Case,
    calibration: sc.Calibration,
    sample: Callable[[int], Tensor],
    count: int,
    budget: float,
    options: argparse.Namespace,
) -> dict[str, Callable[[], sc.Schedule]]:
    """Name of a row -> what makes its schedule."""
    model, interval = case.model, -(-options.steps // count)

    def even(predictor: str, granularity: Any) -> Callable[[], sc.Schedule]:
        return lambda: sc.Schedule.uniform(
            model, options.steps, interval, predictor=predictor, granularity=granularity
        )

    def planned() -> sc.Schedule:
        return sc.plan_trajectory(calibration, steps_computed=count)

    return {
        f"layers, every {interval}, taylor2": even("taylor2", "auto"),
        f"model, every {interval}, taylor2": even("taylor2", "model"),
        f"model, every {interval}, fitted": lambda: sc.fit(
            model, sample, even("taylor2", "model")(), calibration, progress=False
        ),
        "trajectory, open loop": planned,
        "trajectory, closed loop": lambda: sc.fit(
            model, sample, planned(), calibration, progress=False
        ),
        "trajectory, searched": lambda: sc.search_trajectory(
            model,
            sample,
            calibration,
            steps_computed=count,
            max_cost=options.max_cost,
            progress=False,
        ),
        "search, 20 generations": lambda: sc.search(
            model, sample, compute=budget, objective="typical_l2", max_cost=20, progress=False
        ),
    }


class _Calls:
    """Counts calls of the denoiser that really run."""

    def __init__(self, case: Case) -> None:
        self._steps, self._count = case.num_steps, 0
        case.model.transformer.pos_embed.register_forward_hook(self._called)

    def _called(self, *_: Any) -> None:
        self._count += 1

    def taken(self) -> float:
        """Generations since this was asked last."""
        count, self._count = self._count, 0
        return count / self._steps


def _quality(
    case: Case, schedule: sc.Schedule, references: Sequence[Tensor]
) -> tuple[float, float]:
    """Mean PSNR against the uncached images, and half its 95 % interval."""
    values = []
    for i, reference in enumerate(references):
        with sc.cached(case.model, schedule):
            values.append(psnr(case.sample(case.model, i), reference))
    every = torch.cat(values)
    return float(every.mean()), 1.96 * float(every.std()) / len(every) ** 0.5


def _line(row: dict[str, Any]) -> str:
    return (
        f"<= {row['budget']:.2f}  {row['name']:28} {row['steps_computed']:3} computed  "
        f"{row['psnr']:6.2f} ± {row['margin']:.2f} dB  {row['generations']:5.1f} generations  "
        f"{row['seconds']:6.1f} s"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--calibration", type=int, default=5, help="samples, of ten images each")
    parser.add_argument("--generations", type=int, default=7, help="to compare, of ten images")
    parser.add_argument("--max-cost", type=float, default=10.0, help="of the search, generations")
    parser.add_argument("--only", nargs="+", help="ways whose names have one of these in them")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
