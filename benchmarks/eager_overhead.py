"""What smoothcache costs in Python for each layer and call, uncompiled (aim: 2 us when reused).

A model of many layers that do nothing is called under schedules, and so is the same model whose
layers return a copy of a ready tensor, which is the least that a reuse can be. The difference, over
the number of layers, is ours: telling that the call is reused, checking the shapes of its inputs,
counting it. Times are those of the thread alone (other processes do not count), the lowest of all
rounds; what a call of the denoiser costs once is shown apart.

    python benchmarks/eager_overhead.py [--layers 100] [--rounds 200] [--profile] [--json FILE]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import smoothcache as sc

AIM = 2.0  # microseconds
STEPS = 6


class Nothing(nn.Module):
    """A layer with the arguments of an attention."""

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return hidden_states


class Ready(nn.Module):
    """A layer that returns a copy of a ready tensor."""

    def __init__(self, ready: Tensor) -> None:
        super().__init__()
        self.ready = ready

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.ready.clone()


class Chain(nn.Module):
    """A denoiser that calls its layers one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, t: float) -> Tensor:
        for layer in self.layers:
            layer(x, mask=None)
        return x


def lowest(model: Chain, x: Tensor, rounds: int) -> list[float]:
    """Microseconds of each step of a generation, the lowest of all rounds."""
    times = [float("inf")] * STEPS
    for _ in range(rounds):
        for step in range(STEPS):
            start = time.thread_time_ns()
            model(x, 1000.0 - step)
            times[step] = min(times[step], (time.thread_time_ns() - start) / 1000)
    return times


def under(model: Chain, x: Tensor, rounds: int, predictor: str, interval: int) -> list[float]:
    """The same under a schedule."""
    layers = [sc.CacheLayer(path, "ffn", path) for path, _ in model.named_modules() if "." in path]
    schedule = sc.Schedule.uniform(model, STEPS, interval, predictor=predictor, layers=layers)
    with sc.cached(model, schedule):
        return lowest(model, x, rounds)


def measure(count: int, rounds: int) -> dict[str, float]:
    """Microseconds for each layer and call, by what happens in it; and once for each call."""
    x = torch.zeros(1)
    model, ready = Chain([Nothing() for _ in range(count)]), x.clone()
    copies = min(lowest(Chain([Ready(ready) for _ in range(count)]), x, rounds))
    nothing = min(lowest(model, x, rounds))
    hold = under(model, x, rounds, "hold", STEPS)
    taylor = under(model, x, rounds, "taylor", STEPS // 2)
    everything = under(model, x, rounds, "hold", 1)
    few = under(Chain([Nothing()]), x, rounds, "hold", STEPS)
    return {
        "reused, hold": (hold[2] - copies) / count,
        "reused, taylor": (taylor[4] - copies) / count,
        "computed, not kept": (everything[2] - nothing) / count,
        "computed and kept": (taylor[3] - copies) / count,
        "a call of the denoiser, once": few[2],
        "a copy of a ready tensor": copies / count,
    }


def profile(count: int) -> None:
    """Prints where the time of reused steps goes, by function."""
    model, x = Chain([Nothing() for _ in range(count)]), torch.zeros(1)
    profiler = cProfile.Profile()
    layers = [sc.CacheLayer(path, "ffn", path) for path, _ in model.named_modules() if "." in path]
    with sc.cached(model, sc.Schedule.uniform(model, 200, 200, layers=layers)):
        model(x, 1000.0)
        profiler.enable()
        for step in range(1, 200):
            model(x, 1000.0 - step)
        profiler.disable()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(14)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=100, help="of the model")
    parser.add_argument("--rounds", type=int, default=200, help="generations of 6 steps")
    parser.add_argument("--profile", action="store_true", help="print a profile of reused steps")
    parser.add_argument("--json", type=Path, help="write the times and the environment here")
    arguments = parser.parse_args()
    with torch.inference_mode():
        times = measure(arguments.layers, arguments.rounds)
        if arguments.profile:
            profile(arguments.layers)
    print("microseconds" + " " * 20 + "    aim")
    for name, value in times.items():
        aim = f"{AIM:7.1f}" if name.startswith("reused") else ""
        print(f"{name:<29} {value:6.2f} {aim}".rstrip())
    if arguments.json:
        environment = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        }
        report = {"environment": environment, "layers": arguments.layers, "microseconds": times}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
