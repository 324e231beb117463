"""What smoothcache itself costs: a random DiT of 12 blocks, width 384 and 256 tokens on the CPU.

Prints three ratios, each the median over rounds in which everything is timed once, in turn:

- all-compute: a schedule that computes everything, over the bare model (at most 1.01);
- reuse: a schedule's time over its MAC fraction of the bare model's time (at most 1.10);
- calibration: N calibration samples over N uncached samples (at most 1.25).

    python benchmarks/overhead.py [--rounds 9] [--steps 12] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from tqdm.auto import tqdm

import smoothcache as sc

LIMITS = {"all-compute": 1.01, "uniform-2": 1.10, "uniform-3": 1.10, "calibration": 1.25}


def build() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        num_layers=12,
        sample_size=32,
        patch_size=2,
    )
    return model.eval().requires_grad_(False)


def sampler(model: DiTTransformer2DModel, steps: int) -> Callable[[int], torch.Tensor]:
    def sample(i: int) -> torch.Tensor:
        x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(i))
        for step in range(steps):
            t = torch.tensor([1000 * (steps - step) // steps])
            x = x - model(x, t, torch.tensor([i])).sample / steps
        return x

    return sample


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """The ratios of every round, by name."""
    model = build()
    sample = sampler(model, steps)
    calibration = sc.calibrate(model, sample, num_samples=1)  # also the warm-up
    everything = sc.Schedule.uniform(model, steps, 1)
    reuse = {
        f"uniform-{n}": sc.planners.plan_uniform(calibration, interval=n) for n in (2, 3)
    }
    ratios: dict[str, list[float]] = {name: [] for name in LIMITS}

    def under(schedule: sc.Schedule) -> float:
        with sc.cached(model, schedule):
            return seconds(lambda: sample(0))

    for _ in tqdm(range(rounds), "rounds"):
        bare = seconds(lambda: sample(0))
        ratios["all-compute"].append(under(everything) / bare)
        bare = (bare + seconds(lambda: sample(0))) / 2
        for name, schedule in reuse.items():
            assert schedule.compute is not None
            ratios[name].append(under(schedule) / (schedule.compute * bare))
        calibrating = seconds(lambda: sc.calibrate(model, sample, num_samples=1, progress=False))
        bare = (bare + seconds(lambda: sample(0))) / 2
        ratios["calibration"].append(calibrating / bare)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timings of everything, in turn")
    parser.add_argument("--steps", type=int, default=12, help="steps of a sample")
    parser.add_argument("--json", type=Path, help="write all ratios and the environment here")
    arguments = parser.parse_args()
    with torch.no_grad():
        ratios = measure(arguments.rounds, arguments.steps)
    print(f"{'ratio':<12} {'median':>7} {'lowest':>7} {'highest':>7} {'limit':>6}")
    for name, values in ratios.items():
        middle = statistics.median(values)
        print(
            f"{name:<12} {middle:7.3f} {min(values):7.3f} {max(values):7.3f} {LIMITS[name]:6.2f}"
        )
    if arguments.json:
        environment = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
        report = {"environment": environment, "rounds": arguments.rounds, "ratios": ratios}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
