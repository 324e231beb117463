"""What smoothcache costs in Python for each layer and call, uncompiled (aim: 2 us when reused).

A model of many layers that do nothing is called under schedules, and so is the same model whose
layers return a copy of a ready tensor, or a line through two of them, which is the least that a
reuse can be (at its last use a value is handed out itself, uncopied). The difference is ours:
telling that the call is reused, checking the shapes of its inputs, counting it. What a call of the
denoiser costs once, however many layers it has, is measured with a model of one layer, taken off,
and shown apart. Times are those of the thread alone (other processes do not count), the lowest of
all rounds.

    python benchmarks/eager_overhead.py [--layers 100] [--rounds 200] [--profile] [--json FILE]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smoothcache as sc

AIM = 2.0  # microseconds
STEPS = 6


class Nothing(nn.Module):
    """A layer with the arguments of an attention.

    Its output is not its input: a layer that hands that on is reused as a difference.
    """

    def __init__(self) -> None:
        super().__init__()
        self.output = torch.zeros(1)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output


class Ready(nn.Module):
    """A layer that returns a copy of a ready tensor."""

    def __init__(self, ready: Tensor) -> None:
        super().__init__()
        self.ready = ready

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.ready.clone()


class Line(Ready):
    """A layer that returns what lies on a line through two ready tensors."""

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.lerp(self.ready, self.ready, 1.5)


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

    def each(layer: Callable[[], nn.Module], step: int, *schedule: Any) -> float:
        """The time that one further layer takes."""
        many, one = Chain([layer() for _ in range(count)]), Chain([layer()])
        times = [
            under(model, x, rounds, *schedule) if schedule else lowest(model, x, rounds)
            for model in (many, one)
        ]
        return (times[0][step] - times[1][step]) / (count - 1)

    nothing, copy = each(Nothing, 2), each(lambda: Ready(x.clone()), 2)
    line = each(lambda: Line(x.clone()), 2)
    one = Chain([Nothing()])
    return {
        "reused, hold": each(Nothing, 2, "hold", STEPS) - copy,
        "reused, taylor": each(Nothing, 4, "taylor", STEPS // 2) - line,
        "reused, hold, at its last use": each(Nothing, 3, "hold", 2) - nothing,
        "computed, not kept": each(Nothing, 2, "hold", 1) - nothing,
        "computed and kept": each(Nothing, 3, "taylor", STEPS // 2) - copy,
        "a call of the denoiser, once": under(one, x, rounds, "hold", 1)[2]
        - lowest(one, x, rounds)[2],
        "a copy of a ready tensor": copy,
        "a line through two": line,
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
