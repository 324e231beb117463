"""How much of the saved arithmetic becomes saved time, uncompiled and compiled.

A DiT with random weights (the time does not depend on them) samples under several schedules, as it
is, with its repeated blocks compiled and compiled as a whole. A row says by how much a schedule
divides the time of the same model without one, which fraction of the MACs it computes, and their
product, the *efficiency*: 1.00 is a time that falls as the MACs do. The *limit* is the efficiency
of a cache that costs nothing: norms, modulation and embeddings run at every step and are hardly any
MACs; how long they take is measured with layers that return a ready tensor, run in the same way.
Beside it the number of graphs, the seconds spent on compiling and warming up, and the most bytes
that were kept.

    python benchmarks/speed.py [--size small] [--device cpu] [--batch 4] [--steps 12] [--rounds 5]
                               [--mode default] [--ways eager blocks whole] [--profile]
                               [--json FILE]

``--size xl --device cuda --batch 32 --steps 50 --mode reduce-overhead`` is DiT-XL/2 with CUDA
graphs, in bfloat16. ``--size tiny --rounds 1`` only shows that the script runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch._dynamo.utils import counters
from tqdm.auto import tqdm

import smoothcache as sc
from smoothcache.model.costs import MacCounter

SIZES = {  # blocks, heads, width of a head, side of the latent
    "tiny": (2, 2, 8, 8),
    "small": (12, 6, 64, 32),
    "xl": (28, 16, 72, 32),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "all computed": {"interval": 1},
    "layers, every 2nd": {"interval": 2},
    "layers, every 3rd": {"interval": 3},
    "layers, every 3rd, taylor": {"interval": 3, "predictor": "taylor"},
    "blocks, every 3rd": {"interval": 3, "granularity": "block"},
    "model, every 3rd": {"interval": 3, "granularity": "model"},
}


def build(size: str, device: str) -> DiTTransformer2DModel:
    blocks, heads, width, side = SIZES[size]
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_layers=blocks,
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=4,
        sample_size=side,
        patch_size=2,
    )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return torch.nn.Module.to(model.eval().requires_grad_(False), device, dtype)  # without a word


class Ready(nn.Module):
    """In the place of a layer or a block; returns a ready tensor, or adds it to its input."""

    def __init__(self, like: Tensor, *, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        self.register_buffer("ready", torch.randn_like(like))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x + self.ready if self.adds else self.ready


def without(what: str, model: DiTTransformer2DModel, batch: int) -> DiTTransformer2DModel:
    """The model with layers or blocks that cost nothing."""
    model, config = copy.deepcopy(model), model.config
    tokens = (config.sample_size // config.patch_size) ** 2
    width = config.num_attention_heads * config.attention_head_dim
    like = torch.empty(batch, tokens, width, device=model.device, dtype=model.dtype)
    for block in model.transformer_blocks:
        if what == "block":  # of whose parts the model uses some
            block.forward = Ready(like, adds=True).forward
        else:
            block.attn1, block.ff = Ready(like, adds=False), Ready(like, adds=False)
    return model


def compile_in(way: str, model: DiTTransformer2DModel, mode: str) -> None:
    options: dict[str, Any] = {"fullgraph": True, "mode": None if mode == "default" else mode}
    if way == "whole":
        model.compile(**options)
    elif way == "blocks":
        for block in model.transformer_blocks:
            block.compile(**options)


class Sampler:
    """Runs a plain sampler and takes its time.

    Attributes:
        pipeline: The model with its noise scheduler, which counts the steps, so that nobody has to
            read timesteps in the memory of the device.
    """

    def __init__(self, model: DiTTransformer2DModel, steps: int, batch: int) -> None:
        self.model, self.steps = model, steps
        scheduler = FlowMatchEulerDiscreteScheduler()
        self.pipeline = SimpleNamespace(
            components={"transformer": model, "scheduler": scheduler}, scheduler=scheduler
        )
        side = model.config.sample_size
        self.x = torch.randn(batch, 4, side, side, device=model.device, dtype=model.dtype)
        self.y = torch.arange(batch, device=model.device) % 10

    def __call__(self, before_each: Callable[[int], object] = lambda step: None) -> None:
        x, scheduler = self.x, self.pipeline.scheduler
        scheduler.set_timesteps(self.steps, device=x.device)
        for step, t in enumerate(scheduler.timesteps):
            before_each(step)
            noise = self.model(x, t.expand(len(x)), self.y).sample
            x = scheduler.step(noise, t, x, return_dict=False)[0]

    def macs(self) -> int:
        with MacCounter() as counter:
            self()
        return counter.total

    def seconds(self) -> float:
        wait: Callable[[], Any] = (
            torch.cuda.synchronize if self.model.device.type == "cuda" else lambda: None
        )
        wait()
        start = time.perf_counter()
        self()
        wait()
        return time.perf_counter() - start


def rest(what: str, way: str, options: argparse.Namespace) -> float:
    """The time of a model whose layers, or blocks, cost nothing, over that of the model."""
    torch.compiler.reset()
    bare = build(options.size, options.device)
    samplers = []
    for model in (bare, without(what, bare, options.batch)):
        compile_in(way, model, options.mode)
        samplers.append(Sampler(model, options.steps, options.batch))
        samplers[-1]()
    pairs = [[sampler.seconds() for sampler in samplers] for _ in range(options.rounds)]
    return statistics.median(free / plain for plain, free in pairs)


def measure(
    way: str, options: argparse.Namespace, macs: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """A row for each schedule; the bare model is timed in turn with every one."""
    rests = {what: rest(what, way, options) for what in ("layer", "block")}
    for name, settings in tqdm(SCHEDULES.items(), way, disable=None):
        torch.compiler.reset()
        counters.clear()
        bare, model = build(options.size, options.device), build(options.size, options.device)
        compile_in(way, bare, options.mode)
        samplers = [Sampler(m, options.steps, options.batch) for m in (bare, model)]
        samplers[0]()
        samplers[0]()
        of_bare, start = counters["stats"]["unique_graphs"], time.perf_counter()
        schedule = sc.Schedule.uniform(model, options.steps, **settings)
        with sc.cached(samplers[1].pipeline, schedule) as run:
            compile_in(way, model, options.mode)
            samplers[1]()
            samplers[1]()
            warm_up = time.perf_counter() - start
            times = [[sampler.seconds() for sampler in samplers] for _ in range(options.rounds)]
            ratios = [plain / ours for plain, ours in times]
            kept = run.summary().peak_bytes
        computed = len(range(0, options.steps, settings["interval"])) / options.steps
        of_reused = rests.get(settings.get("granularity", "layer"), 0.0)
        yield {
            "way": way,
            "schedule": name,
            "milliseconds": 1000 * statistics.median(ours for _, ours in times) / options.steps,
            "speedup": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "macs": macs[name],
            "efficiency": statistics.median(ratios) * macs[name],
            "limit": macs[name] / (computed + (1 - computed) * of_reused),
            "graphs": counters["stats"]["unique_graphs"] - of_bare,
            "warm_up_seconds": warm_up,
            "kept_bytes": kept,
        }


def profile(way: str, options: argparse.Namespace) -> None:
    """Prints what a step runs at which all layers are reused, by operator."""
    torch.compiler.reset()
    sampler = Sampler(build(options.size, options.device), options.steps, options.batch)
    compile_in(way, sampler.model, options.mode)
    schedule = sc.Schedule.uniform(sampler.model, options.steps, options.steps)
    reused = options.steps - 1
    with sc.cached(sampler.pipeline, schedule):
        sampler()
        sampler()
        profiler = torch.profiler.profile()
        sampler(before_each=lambda step: profiler.start() if step == 1 else None)
        profiler.stop()
    of_device = "self_cpu_time_total" if options.device == "cpu" else "self_device_time_total"
    print(f"\n| {way}, all layers reused | calls a step | ms a step |\n|---|---|---|")
    rows = [(getattr(row, of_device), row) for row in profiler.key_averages()]
    for microseconds, row in sorted(rows, key=lambda pair: -pair[0])[:8]:
        print(f"| {row.key[:50]} | {row.count / reused:.0f} | {microseconds / 1000 / reused:.2f} |")


def mac_fractions(options: argparse.Namespace) -> dict[str, float]:
    """MACs under each schedule over those without one, counted in a run."""
    model = build(options.size, options.device)
    sampler = Sampler(model, options.steps, options.batch)
    plain, fractions = sampler.macs(), {}
    for name, settings in SCHEDULES.items():
        with sc.cached(sampler.pipeline, sc.Schedule.uniform(model, options.steps, **settings)):
            fractions[name] = sampler.macs() / plain
    return fractions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="samples in a call, guidance included")
    parser.add_argument("--steps", type=int, default=12, help="steps of a sample")
    parser.add_argument("--rounds", type=int, default=5, help="timings of every row")
    parser.add_argument("--mode", default="default", help="of torch.compile")
    parser.add_argument("--ways", nargs="+", default=["eager", "blocks", "whole"])
    parser.add_argument("--profile", action="store_true", help="print what reused steps run")
    parser.add_argument("--json", type=Path, help="write all figures and the environment here")
    options = parser.parse_args()
    with torch.inference_mode():
        macs = mac_fractions(options)
        print("| way | schedule | ms a step | speed-up (range) | MACs | efficiency ", end="")
        print("| limit | graphs | kept MB |\n|---|---|---|---|---|---|---|---|---|", flush=True)
        rows = []
        for way in options.ways:
            for row in measure(way, options, macs):
                rows.append(row)
                print(
                    f"| {row['way']} | {row['schedule']} | {row['milliseconds']:.1f} "
                    f"| {row['speedup']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f}) "
                    f"| {row['macs']:.3f} | {row['efficiency']:.2f} | {row['limit']:.2f} "
                    f"| {row['graphs']} | {row['kept_bytes'] / 1e6:.1f} |",
                    flush=True,
                )
        for way in options.ways if options.profile else []:
            profile(way, options)
    if options.json:
        environment = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        report = {"environment": environment, "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
