"""What smoothcache itself costs: a random DiT of 12 blocks, width 384 and 256 tokens on the CPU.

Prints ratios, each the median over rounds in which everything is timed once, in turn:

- all-compute: a schedule that computes everything, over the bare model (aim: 1.01);
- uniform-n: a schedule's time over its MAC fraction of the bare model's time (aim: 1.10);
- blocks-n: the same where whole blocks are reused, their norms and modulation with them;
- limit-n: the same for a model whose reused layers cost nothing at all. What norms, modulation and
  embeddings take is no MACs, so no cache that reuses these layers can do better than this;
- calibration: N calibration samples over N uncached samples (aim: 1.25).

    python benchmarks/overhead.py [--batch 4] [--rounds 7] [--steps 8] [--json FILE]
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
from speed import build, without
from tqdm.auto import tqdm

import smoothcache as sc
from smoothcache.planners.uniform import plan_uniform

INTERVALS = (2, 3)
SAMPLES = 10  # of a calibration, as by default; its first step also counts MACs
AIMS = {
    "all-compute": 1.01,
    **{f"uniform-{n}": 1.10 for n in INTERVALS},
    **{f"blocks-{n}": 1.10 for n in INTERVALS},
    **{f"limit-{n}": None for n in INTERVALS},
    "calibration": 1.25,
}


def sampler(model: DiTTransformer2DModel, steps: int, batch: int) -> Callable[[int], torch.Tensor]:
    def sample(i: int) -> torch.Tensor:
        x = torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(i))
        for step in range(steps):
            t = torch.tensor([1000 * (steps - step) // steps] * batch)
            x = x - model(x, t, torch.arange(batch)).sample / steps
        return x

    return sample


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(rounds: int, steps: int, batch: int) -> dict[str, list[float]]:
    """The ratios of every round, by name."""
    model = build("small", "cpu")
    sample = sampler(model, steps, batch)
    everything = sc.Schedule.uniform(model, steps, 1)
    layers = sc.calibrate(model, sample, num_samples=1)  # also the warm-up
    blocks = sc.calibrate(model, sample, num_samples=1, granularity="block")
    uniform = {
        f"{name}-{n}": plan_uniform(calibration, interval=n)
        for name, calibration in (("uniform", layers), ("blocks", blocks))
        for n in INTERVALS
    }
    bare_of_layers = sampler(without("layer", model, batch), steps, batch)
    bare_of_layers(0)
    ratios: dict[str, list[float]] = {name: [] for name in AIMS}

    def under(schedule: sc.Schedule) -> float:
        with sc.cached(model, schedule):
            sample(0)  # the first generation also pays for having enabled the schedule
            return seconds(lambda: sample(0))

    for _ in tqdm(range(rounds), "rounds"):
        times = [seconds(lambda: sample(0))]

        def beside(value: float, times: list[float] = times) -> float:
            """A time over the mean of the bare ones just before and just after it."""
            times.append(seconds(lambda: sample(0)))
            return 2 * value / sum(times[-2:])

        ratios["all-compute"].append(beside(under(everything)))
        rest = beside(seconds(lambda: bare_of_layers(0)))
        for name, schedule in uniform.items():
            ratios[name].append(beside(under(schedule)) / (schedule.compute or 1.0))
        for n in INTERVALS:
            schedule = uniform[f"uniform-{n}"]
            computed = schedule.table()[0].mean()
            limit = computed + (1 - computed) * rest
            ratios[f"limit-{n}"].append(limit / (schedule.compute or 1.0))
        calibrating = seconds(lambda: sc.calibrate(model, sample, SAMPLES, progress=False))
        ratios["calibration"].append(beside(calibrating / SAMPLES))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timings of everything, in turn")
    parser.add_argument("--steps", type=int, default=8, help="steps of a sample")
    parser.add_argument("--batch", type=int, default=4, help="samples in a call, guidance included")
    parser.add_argument("--json", type=Path, help="write all ratios and the environment here")
    arguments = parser.parse_args()
    with torch.no_grad():
        ratios = measure(arguments.rounds, arguments.steps, arguments.batch)
    print(f"{'ratio':<12} {'median':>7} {'lowest':>7} {'highest':>7} {'aim':>6}")
    for name, values in ratios.items():
        aim = "" if AIMS[name] is None else f"{AIMS[name]:.2f}"
        middle = statistics.median(values)
        print(f"{name:<12} {middle:7.3f} {min(values):7.3f} {max(values):7.3f} {aim:>6}")
    if arguments.json:
        environment = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
        settings = {"rounds": arguments.rounds, "steps": arguments.steps, "batch": arguments.batch}
        report = {"environment": environment, **settings, "ratios": ratios}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
