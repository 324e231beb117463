"""How much of the saved arithmetic becomes saved time on a GPU: real architectures at full size.

    python benchmarks/gpu.py [--cases dit-8 flux ...] [--rounds 5] [--seconds 540] [--json FILE]
    python benchmarks/gpu.py --tiny --device cpu --rounds 1     # shows that the script runs

Models have random weights (the time does not depend on them) in bfloat16, and are sampled by a
plain loop as they are, compiled (`fullgraph=True`), and compiled with CUDA graphs
(`mode="reduce-overhead"`); without a schedule and under several; and, as they are, with the caches
of diffusers, where the model takes them. A row has the median time of a sample and its range, by
how much it is faster than the same way of running without a cache, the share of the MACs that ran
(counted), and the *efficiency*, speed-up x MACs: 1.00 is the limit. Then the peak of memory beyond
that of the run without a cache, the bytes kept, the graphs, and the seconds until all was compiled.

A case is begun only while there are seconds left; what was left out is said. Nothing is downloaded:
on a machine without network, `pip download diffusers torch` elsewhere and `pip install --no-index
--find-links DIR`, or put the source folder of smoothcache on PYTHONPATH beside them.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import hooks
from torch import Tensor, nn
from torch._dynamo.utils import counters

import smoothcache as sc
from smoothcache.costs import MacCounter

PUBLISHED = Path(__file__).parents[1] / "tests" / "data" / "published_schedules"
Call = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """An architecture and how it is sampled.

    Attributes:
        model: Class in diffusers.
        full: Its configuration at full size.
        tiny: What differs in the tiny one.
        shape: Of the latents, with the batch (guidance included).
        small: The same of the tiny one.
        call: Calls the model once; returns what is subtracted from the latents.
        steps: Of a sample.
        published: Files of published schedules.
        rivals: Whether the caches of diffusers take it.
        is_one_graph: Whether PyTorch can compile it with ``fullgraph=True``.
    """

    model: str
    full: Mapping[str, Any]
    tiny: Mapping[str, Any]
    shape: tuple[int, ...]
    small: tuple[int, ...]
    call: Call
    steps: int
    published: Mapping[str, str] = field(default_factory=dict)
    rivals: bool = False
    is_one_graph: bool = True


# --------------------------------------------------------------------------------- architectures


def _dit(model: Any, x: Tensor, t: Tensor) -> Tensor:
    classes = torch.arange(len(x), device=x.device) % 10
    out: Tensor = model(x, t, classes).sample[:, : x.shape[1]]
    return out


def _like(x: Tensor, *shape: int) -> Tensor:
    """Conditions, the same in every call."""
    return torch.linspace(-1, 1, shape[-1], device=x.device, dtype=x.dtype).expand(shape)


def _audio(model: Any, x: Tensor, t: Tensor) -> Tensor:
    config, batch = model.config, len(x)
    angles = torch.linspace(0, 1, x.shape[-1] + 1, device=x.device)[:, None]
    angles = angles * torch.ones(config.attention_head_dim // 2, device=x.device)
    out: Tensor = model(
        x,
        t.to(x.dtype) / 1000,
        encoder_hidden_states=_like(x, batch, 130, config.cross_attention_input_dim),
        global_hidden_states=_like(x, batch, 1, config.global_states_input_dim),
        rotary_embedding=(angles.cos(), angles.sin()),
    ).sample
    return out


def _wan(model: Any, x: Tensor, t: Tensor) -> Tensor:
    out: Tensor = model(x, t, _like(x, len(x), 512, model.config.text_dim)).sample
    return out


def _flux(model: Any, x: Tensor, t: Tensor) -> Tensor:
    config, batch, tokens = model.config, len(x), x.shape[1]
    side = round(tokens**0.5)
    places = torch.arange(tokens, device=x.device)
    ids = torch.stack([0 * places, places // side, places % side], dim=1).to(x.dtype)
    out: Tensor = model(
        x,
        encoder_hidden_states=_like(x, batch, 512, config.joint_attention_dim),
        pooled_projections=_like(x, batch, config.pooled_projection_dim),
        timestep=t.to(x.dtype) / 1000,
        img_ids=ids,
        txt_ids=torch.zeros(512, 3, device=x.device, dtype=x.dtype),
        guidance=torch.full_like(t, 3.5, dtype=x.dtype),
    ).sample
    return out


XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}
OF_DIT = {"in_channels": 4, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000}
FILES = {
    "published alpha 0.08": "50-N-3-threshold-0.08.json",
    "published alpha 0.18": "50-N-3-threshold-0.18.json",
}


def _dit_case(images: int) -> Case:
    return Case(
        "DiTTransformer2DModel",
        {**XL, **OF_DIT},
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 28, "sample_size": 8},
        (2 * images, 4, 32, 32),
        (2 * images, 4, 8, 8),
        _dit,
        steps=50,
        published=FILES,
    )


CASES: Mapping[str, Case] = {
    "dit-8": _dit_case(8),
    "dit-32": _dit_case(32),
    "dit-1": _dit_case(1),
    "stable-audio": Case(
        "StableAudioDiTModel",
        {"num_layers": 24},
        {
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 8,
            "cross_attention_input_dim": 8,
            "global_states_input_dim": 8,
            "time_proj_dim": 8,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
        },
        (2, 64, 1024),
        (2, 4, 16),
        _audio,
        steps=100,
        is_one_graph=False,  # diffusers 0.42 warns while it makes the output
    ),
    "flux": Case(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
            "in_channels": 4,
        },
        (1, 4096, 64),
        (1, 16, 4),
        _flux,
        steps=28,
        rivals=True,
    ),
    "wan-1.3b": Case(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "ffn_dim": 32,
            "num_layers": 2,
            "text_dim": 16,
            "freq_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
        },
        (2, 16, 21, 60, 104),
        (2, 4, 2, 4, 4),
        _wan,
        steps=12,  # of 50 in earnest: more of the same would not fit the time
        rivals=True,
    ),
}


# --------------------------------------------------------------------------------------- running


class Sampler:
    """Samples one case by a plain loop, and takes its time."""

    def __init__(self, case: Case, *, tiny: bool, device: str) -> None:
        torch.manual_seed(0)
        config = {**case.full, **case.tiny} if tiny else dict(case.full)
        self.steps = min(case.steps, 6) if tiny and not case.published else case.steps
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.model: Any = getattr(diffusers, case.model)(**config)
        finally:
            torch.set_default_dtype(before)
        self.model.eval().requires_grad_(False)
        self._call = case.call
        shape = case.small if tiny else case.shape
        self._x = torch.randn(shape, device=device, dtype=dtype)
        self._is_cuda = device.startswith("cuda")

    def __call__(self) -> None:
        x, context = self._x, getattr(self.model, "cache_context", None)
        if getattr(self.model, "is_cache_enabled", False):  # a rival, which remembers the last one
            self.model._reset_stateful_cache()
        for step in range(self.steps):
            t = torch.full((len(x),), 1000 * (self.steps - step) // self.steps, device=x.device)
            if self._is_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            with context("cond") if context else nullcontext():
                x = x - self._call(self.model, x, t) / self.steps

    def macs(self) -> int:
        with MacCounter() as counter:
            self()
        return counter.total

    def seconds(self) -> float:
        if not self._is_cuda:
            start = time.perf_counter()
            self()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def peak(self) -> int:
        """The most memory of the device in a sample; 0 on the CPU."""
        if not self._is_cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        self()
        return torch.cuda.max_memory_allocated()


def schedules(case: Case, sampler: Sampler) -> Iterator[tuple[str, sc.Schedule]]:
    """What is compared, by name."""
    uniform = partial(sc.Schedule.uniform, sampler.model, sampler.steps)
    yield "all computed", uniform(1)
    for n in (2, 3):
        yield f"every {n}. step (FORA)", uniform(n, last=True)
    for name, file in case.published.items():
        yield name, sc.Schedule.load(PUBLISHED / file)
    for n in (3, 5):
        yield f"model, every {n}. step", uniform(n, granularity="model")


def rivals(case: Case) -> Iterator[tuple[str, Any]]:
    if case.rivals:
        yield "FirstBlockCache 0.1", hooks.FirstBlockCacheConfig(0.1)
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=3, max_order=1
        )
        yield "TaylorSeer, every 3.", config


def compile_in(way: str, model: nn.Module, *, fullgraph: bool) -> None:
    if way != "eager":
        mode = {"compiled": None, "graphs": "reduce-overhead"}[way]
        model.compile(fullgraph=fullgraph, mode=mode)


@dataclass
class Bench:
    """Rows of a case run in one way.

    Attributes:
        options: Of the command line.
        macs: MACs of a sample, by schedule; counted the first time, uncompiled.
    """

    options: argparse.Namespace
    macs: dict[tuple[str, str], int] = field(default_factory=dict)

    def rows(self, name: str, way: str) -> Iterator[dict[str, Any]]:
        case = CASES[name]
        bare: dict[str, Any] = {}
        for what, schedule in [("no cache", None), *self._planned(case)]:
            sampler = self._sampler(case)
            run = sc.enable(sampler.model, schedule) if schedule else None
            self._count(name, what, sampler)
            compile_in(way, sampler.model, fullgraph=case.is_one_graph)
            row = self._measured(name, what, way, sampler)
            row["kept_bytes"] = run.summary().peak_bytes if run else 0
            row["reused"] = run.summary().reused_fraction if run else 0.0
            bare = bare or row
            yield _compared(row, bare)
        for what, config in rivals(case) if way == "eager" else ():
            sampler = self._sampler(case)
            try:
                sampler.model.enable_cache(config)
                self._count(name, what, sampler)
                yield _compared(self._measured(name, what, way, sampler), bare)
            except Exception as error:  # a rival that fails is a row too
                yield {"case": name, "way": way, "cache": what, "failed": f"{error}"}

    def _planned(self, case: Case) -> list[tuple[str, sc.Schedule]]:
        return list(schedules(case, self._sampler(case)))

    def _sampler(self, case: Case) -> Sampler:
        return Sampler(case, tiny=self.options.tiny, device=self.options.device)

    def _count(self, name: str, what: str, sampler: Sampler) -> None:
        """Counts MACs where that was not done yet; the model must not be compiled."""
        if (name, what) not in self.macs:
            self.macs[name, what] = sampler.macs()

    def _measured(self, name: str, what: str, way: str, sampler: Sampler) -> dict[str, Any]:
        torch.compiler.reset()
        counters.clear()
        start = time.perf_counter()
        for _ in range(3 if way == "graphs" else 2):  # CUDA graphs record in the second run
            sampler()
        if sampler._is_cuda:
            torch.cuda.synchronize()
        warm_up = time.perf_counter() - start
        graphs = counters["stats"]["unique_graphs"]
        peak = sampler.peak()
        times = [sampler.seconds() for _ in range(self.options.rounds)]
        return {
            "case": name,
            "way": way,
            "cache": what,
            "steps": sampler.steps,
            "seconds": statistics.median(times),
            "lowest": min(times),
            "highest": max(times),
            "macs": self.macs[name, what],
            "peak_bytes": peak,
            "graphs": graphs,
            "recompiled": counters["stats"]["unique_graphs"] - graphs,
            "warm_up_seconds": warm_up,
        }


def _compared(row: dict[str, Any], bare: dict[str, Any]) -> dict[str, Any]:
    speedup, fraction = bare["seconds"] / row["seconds"], row["macs"] / bare["macs"]
    return {
        **row,
        "speedup": speedup,
        "mac_fraction": fraction,
        "efficiency": speedup * fraction,
        "extra_bytes": row["peak_bytes"] - bare["peak_bytes"],
    }


# ----------------------------------------------------------------------------------------- output


def printed(row: Mapping[str, Any]) -> str:
    begin = f"| {row['case']} | {row['way']} | {row['cache']} "
    if "failed" in row:
        return begin + f"| failed: {row['failed'].splitlines()[0][:80]} |"
    return begin + (
        f"| {1000 * row['seconds']:.1f} "
        f"({1000 * row['lowest']:.1f}-{1000 * row['highest']:.1f}) "
        f"| {row['speedup']:.2f} | {row['mac_fraction']:.3f} | {row['efficiency']:.2f} "
        f"| {row['extra_bytes'] / 1e6:.1f} | {row.get('kept_bytes', 0) / 1e6:.1f} "
        f"| {row['graphs']} | {row['warm_up_seconds']:.1f} |"
    )


def environment(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "smoothcache": sc.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda") and shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        command = ["nvidia-smi", query, "--format=csv"]
        found["nvidia-smi"] = subprocess.run(
            command, capture_output=True, text=True, check=False
        ).stdout
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=("eager", "compiled", "graphs"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5, help="timings of every row")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing after so many")
    parser.add_argument("--tiny", action="store_true", help="tiny models, only to try the script")
    parser.add_argument("--json", type=Path, help="write all figures and the environment here")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("No CUDA device; `--tiny --device cpu` tries the script.")  # as in `make bench`
        return
    ways = options.ways or ["eager", "compiled", *(["graphs"] if options.device != "cpu" else [])]
    bench, start = Bench(options), time.perf_counter()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    print("| case | way | cache | ms a sample (range) | speed-up | MACs | efficiency ", end="")
    print("| extra MB | kept MB | graphs | warm-up s |\n|" + 11 * "---|")
    with torch.inference_mode():
        for name in options.cases:
            for way in ways:
                if time.perf_counter() - start > options.seconds:
                    left_out.append(f"{name} {way}")
                    continue
                for row in bench.rows(name, way):
                    rows.append(row)
                    print(printed(row), flush=True)
    if left_out:
        print(f"left out, after {options.seconds:.0f} s: {', '.join(left_out)}", file=sys.stderr)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        report = {
            "environment": environment(options.device),
            "settings": settings,
            "rows": rows,
            "left_out": left_out,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
