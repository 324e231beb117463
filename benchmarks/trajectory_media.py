"""Plans from trajectories beside fewer steps, on the demo's pipelines of video and sound.

    python benchmarks/trajectory_media.py --modality video --write
    python benchmarks/trajectory_media.py --modality audio --write

Every row is the mean signal-to-noise ratio against the uncached samples of the same seeds.
Rows of fewer steps call the denoiser as often as the budget allows, with every solver that suits
the pipeline.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare_methods import environment
from torch import Tensor

import smoothcache as sc
from smoothcache.diffusers_io import load_pipeline, silence_libraries, suitable_solvers

RESULTS = Path(__file__).parent / "results"
CALIBRATION_SEEDS = 10_000
BUDGETS = (0.5, 0.36, 0.28)


@dataclass(frozen=True)
class Media:
    """A demo pipeline, and how it runs generation number i with so many steps."""

    pipeline: Any
    sample: Callable[[int, int], Tensor]
    steps: int
    solvers: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    silence_libraries()
    media = _video() if options.modality == "video" else _audio()
    pipe, steps = media.pipeline, media.steps

    def training(i: int) -> Tensor:
        return media.sample(CALIBRATION_SEEDS + i, steps)

    calibration = sc.calibrate(pipe, training, options.calibration, max_gap=1, progress=False)
    print(calibration.provenance.get("no_trajectories", "trajectories were recorded"))
    numbers = range(options.generations)
    references = [media.sample(i, steps) for i in numbers]
    rows = []
    for budget in options.budgets:
        count = int(steps * budget + 1e-9)
        ways = {
            **{f"{count} steps, {name}": _with_solver(media, count, x)
               for name, x in media.solvers.items()},
            **{
                name: _cached(media, schedule)
                for name, schedule in _schedules(media, calibration, training, count).items()
            },
        }  # fmt: skip
        for name, way in ways.items():
            every = torch.cat([_ratio(way(i), references[i]) for i in numbers])
            row = {
                "budget": budget,
                "name": name,
                "snr": round(float(every.mean()), 2),
                "margin": round(1.96 * float(every.std()) / len(every) ** 0.5, 2),
            }
            rows.append(row)
            print(f"<= {budget:.2f}  {name:40} {row['snr']:6.2f} ± {row['margin']:.2f} dB")
    if options.write:
        document = {
            "samples": sum(len(x) for x in references),
            "calibration_samples": options.calibration,
            "steps": steps,
            "rows": rows,
            "environment": environment(),
        }
        file = RESULTS / f"trajectory_{options.modality}.json"
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _schedules(
    media: Media, calibration: sc.Calibration, training: Callable[[int], Tensor], count: int
) -> dict[str, sc.Schedule]:
    pipe, steps = media.pipeline, media.steps
    interval = -(-steps // count)
    found = {
        f"layers, every {interval}, {predictor}": sc.Schedule.uniform(
            pipe, steps, interval, predictor=predictor, last=True
        )
        for predictor in ("taylor", "taylor2")
    }
    if calibration.trajectories is not None:
        plan = sc.plan_trajectory(calibration, steps_computed=count)
        found["trajectory, open loop"] = plan
        found["trajectory, closed loop"] = sc.fit(pipe, training, plan, calibration, progress=False)
    return found


def _with_solver(media: Media, count: int, scheduler: Any) -> Callable[[int], Tensor]:
    def sample(i: int) -> Tensor:
        own, media.pipeline.scheduler = media.pipeline.scheduler, scheduler
        try:
            return media.sample(i, count)
        finally:
            media.pipeline.scheduler = own

    return sample


def _cached(media: Media, schedule: sc.Schedule) -> Callable[[int], Tensor]:
    def sample(i: int) -> Tensor:
        with sc.cached(media.pipeline, schedule):
            return media.sample(i, media.steps)

    return sample


def _ratio(samples: Tensor, references: Tensor) -> Tensor:
    """Signal-to-noise ratio of each sample in dB."""
    noise = (samples - references).flatten(1).double().norm(dim=1)
    signal = references.flatten(1).double().norm(dim=1)
    return 20 * torch.log10(signal / noise.clamp_min(1e-12))


def _video() -> Media:
    from smoothcache.demo.video import FOLDER, sample_clips, spread_labels

    pipe = load_pipeline(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    labels = spread_labels(48)

    def sample(i: int, steps: int) -> Tensor:
        place = 4 * i % len(labels)
        return sample_clips(pipe, labels[place : place + 4], i, steps)

    return Media(pipe, sample, 30, {"own solver": pipe.scheduler, **suitable_solvers(pipe)})


def _audio() -> Media:
    from smoothcache.demo.audio import batch_attributes, load_tones, sample_tones

    pipe = load_tones()

    def sample(i: int, steps: int) -> Tensor:
        place = 4 * i % 20
        return sample_tones(pipe, batch_attributes(i)[place : place + 4], 100 * i, steps)

    return Media(pipe, sample, 100, {"own solver": pipe.scheduler})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--modality", choices=("video", "audio"), default="video")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--calibration", type=int, default=5, help="samples, of four each")
    parser.add_argument("--generations", type=int, default=5, help="to compare, of four each")
    parser.add_argument("--write", action="store_true", help="write the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
