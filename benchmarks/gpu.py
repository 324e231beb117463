"""How much of the saved arithmetic becomes saved time on a GPU: real architectures at full size.

    python benchmarks/gpu.py --json gpu.json [--cases dit-8 flux ...] [--ways eager whole ...]
                             [--no-rivals] [--rounds 5] [--seconds 510]
    python benchmarks/gpu.py --tiny --device cpu --rounds 1     # shows that the script runs

Models have random weights (the time does not depend on them) in bfloat16, and are sampled by a
plain loop: as they are (eager), with their blocks compiled, compiled as a whole, and compiled with
CUDA graphs (``mode="reduce-overhead"``). A row has the median time of a sample and its range, by
how much it is faster than the same way of running without a cache, the share of the MACs that ran
(counted), and the *efficiency*, speed-up x MACs: 1.00 is the limit. Then the peak of memory, by how
much it exceeds that of the run without a cache, the bytes kept, the graphs, and the seconds that
warming up took longer than the same samples afterwards, which is compiling.

What the aims need comes first, then rivals at equal MACs, then the rest. A row is begun only if the
dearest of its case and way so far would still fit; what was left out is said, and measured by
another call with ``--cases``, ``--ways`` and ``--no-rivals``. The JSON file is written anew after
every row.

Nothing is downloaded: on a machine without network, `pip download diffusers torch cache-dit`
elsewhere and `pip install --no-index --find-links DIR`, or put the source folder of smoothcache on
PYTHONPATH beside them. Without cache-dit its rows say that it is missing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from full_size.caches import ALL, NO_CACHE, caches, every
from full_size.cases import CASES
from full_size.sampling import WAYS, Sampler, compile_in
from torch._dynamo.utils import counters

ALPHA = "published alpha 0.18"
HEADER = (
    "| case | way | cache | ms a sample (range) | speed-up | MACs | efficiency | peak MB "
    "| extra MB | kept MB | graphs | compile s |\n|" + 12 * "---|"
)


class Task(NamedTuple):
    """One row to be measured."""

    case: str
    way: str
    cache: str


# ---------------------------------------------------------------------------------------- order


def _aims() -> Iterable[Task]:
    """What an aim is set for, the cheap first."""
    both = (NO_CACHE, ALPHA, ALL)
    yield from (Task("dit-8", way, cache) for way in ("eager", "whole") for cache in both)
    for case in ("stable-audio", "flux", "wan-1.3b"):
        yield from (Task(case, "blocks", cache) for cache in (NO_CACHE, every(2), every(3)))
    yield from (Task("dit-32", way, cache) for cache in both for way in ("eager", "whole"))


def _rivals() -> Iterable[Task]:
    """Rivals beside the row of ours that computes about as much."""
    for case, way in (
        ("dit-8", "eager"),
        ("flux", "eager"),
        ("dit-8", "whole"),
        ("flux", "blocks"),
    ):
        names = caches(CASES[case])
        others = [name for name, cache in names.items() if cache.is_rival]
        for cache in (NO_CACHE, every(2), every(3), "model, every 3. step", *others):
            yield Task(case, way, cache)


def _open_sora() -> Iterable[Task]:
    yield from (Task("open-sora", "blocks", cache) for cache in (NO_CACHE, every(2), every(3)))


def _rest() -> Iterable[Task]:
    for name, case in CASES.items():
        for way in sorted(WAYS, key=lambda way: way != case.compiled):
            for cache, what in caches(case).items():
                if not (what.is_rival and way == "graphs"):
                    yield Task(name, way, cache)


def plan(cases: Sequence[str], ways: Sequence[str], *, has_rivals: bool = True) -> list[Task]:
    """Gives all rows of these cases and ways; a model without a cache comes before its caches."""
    found = dict.fromkeys([*_aims(), *_rivals(), *_open_sora(), *_rest()])
    tasks = [task for task in found if task.case in cases and task.way in ways]
    return [task for task in tasks if has_rivals or not is_rival(task)]


def is_rival(task: Task) -> bool:
    return caches(CASES[task.case])[task.cache].is_rival


# ------------------------------------------------------------------------------------ measuring


@dataclass
class Bench:
    """Measures rows, one model at a time.

    Attributes:
        options: Of the command line.
        macs: MACs of a sample, by case and cache; counted the first time, uncompiled.
        plain: The row without a cache, by case and way.
    """

    options: argparse.Namespace
    macs: dict[tuple[str, str], int] = field(default_factory=dict)
    plain: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def row(self, task: Task) -> dict[str, Any]:
        """Measures a row; one that fails says why."""
        try:
            row = {**task._asdict(), **self._measured(task)}
            if task.cache == NO_CACHE:
                self.plain[task.case, task.way] = row
            return _compared(row, self.plain.get((task.case, task.way)))
        except Exception as error:  # the others are still worth having
            return {**task._asdict(), "failed": f"{type(error).__name__}: {error}"}
        finally:  # of the memory that the next one is measured by, this one holds nothing
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()

    def _measured(self, task: Task) -> dict[str, Any]:
        case = CASES[task.case]
        cache = caches(case)[task.cache]
        sampler = Sampler(case, tiny=self.options.tiny, device=self.options.device)
        run = cache.enable(sampler)
        if (task.case, task.cache) not in self.macs:
            self.macs[task.case, task.cache] = sampler.macs()
        breaks = cache.is_rival or not (case.is_one_graph or task.way == "blocks")
        compile_in(task.way, sampler.model, breaks=breaks)
        row = self._timed(sampler, warm_up=3 if task.way == "graphs" else 2)
        summary = run.summary() if run else None
        return {
            "steps": sampler.steps,
            "macs": self.macs[task.case, task.cache],
            **row,
            "kept_bytes": summary.peak_bytes if summary else 0,
            "reused": summary.reused_fraction if summary else 0.0,
            "note": sampler.note,
        }

    def _timed(self, sampler: Sampler, warm_up: int) -> dict[str, Any]:
        counters.clear()
        start = time.perf_counter()
        for _ in range(warm_up):  # CUDA graphs record in the second
            sampler()
        sampler.wait()
        warm_up_seconds = time.perf_counter() - start
        graphs = counters["stats"]["unique_graphs"]
        sampler.forget_peak()
        times = [sampler.seconds() for _ in range(self.options.rounds)]
        middle = statistics.median(times)
        return {
            "seconds": middle,
            "lowest": min(times),
            "highest": max(times),
            "all_seconds": times,
            "peak_bytes": sampler.peak(),
            "graphs": graphs,
            "recompiled": counters["stats"]["unique_graphs"] - graphs,
            "compile_seconds": max(0.0, warm_up_seconds - warm_up * middle),
        }


def _compared(row: dict[str, Any], plain: Mapping[str, Any] | None) -> dict[str, Any]:
    if plain is None:
        raise RuntimeError("the row without a cache, which it is compared with, failed")
    speedup, fraction = plain["seconds"] / row["seconds"], row["macs"] / plain["macs"]
    return {
        **row,
        "speedup": speedup,
        "mac_fraction": fraction,
        "efficiency": speedup * fraction,
        "extra_bytes": row["peak_bytes"] - plain["peak_bytes"],
    }


@dataclass
class Clock:
    """Says whether a row still fits: as long as the dearest of its case and way, or of all.

    Attributes:
        limit: Seconds for all rows.
        start: When it began.
        took: The dearest row, by case and way, in seconds.
    """

    limit: float
    start: float = field(default_factory=time.perf_counter)
    took: dict[tuple[str, str], float] = field(default_factory=dict)

    def has_time_for(self, task: Task) -> bool:
        dearest = max(self.took.values(), default=0.0)
        expected = self.took.get((task.case, task.way), dearest)
        return time.perf_counter() - self.start + expected < self.limit

    def note(self, task: Task, seconds: float) -> None:
        key = task.case, task.way
        self.took[key] = max(seconds, self.took.get(key, 0.0))


# ---------------------------------------------------------------------------------------- output


def printed(row: Mapping[str, Any]) -> str:
    begin = f"| {row['case']} | {row['way']} | {row['cache']} "
    if "failed" in row:
        return begin + f"| failed: {row['failed'].splitlines()[0][:80]} |"
    return begin + (
        f"| {1000 * row['seconds']:.1f} "
        f"({1000 * row['lowest']:.1f}-{1000 * row['highest']:.1f}) "
        f"| {row['speedup']:.2f} | {row['mac_fraction']:.3f} | {row['efficiency']:.2f} "
        f"| {row['peak_bytes'] / 1e6:.0f} | {row['extra_bytes'] / 1e6:.1f} "
        f"| {row['kept_bytes'] / 1e6:.1f} | {row['graphs']} | {row['compile_seconds']:.1f} |"
    )


def environment(device: str) -> dict[str, Any]:
    """Versions and the device; clocks as `nvidia-smi` has them, where there is one."""
    found: dict[str, Any] = {
        "versions": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda"):
        found["cudnn"] = torch.backends.cudnn.version()
        found["nvidia-smi"] = _nvidia_smi()
    return found


PACKAGES = ("torch", "triton", "diffusers", "cache-dit", "smoothcache")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # absent, or on PYTHONPATH as source
        return getattr(sys.modules.get(package), "__version__", None)


def _nvidia_smi() -> dict[str, str] | None:
    """Clocks, power and temperature at this moment."""
    names = (
        *("name", "driver_version", "memory.total", "power.limit", "power.draw", "temperature.gpu"),
        *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    )
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = ran.stdout.splitlines()
    return dict(zip(names, lines[0].split(", "), strict=False)) if lines else None


@dataclass
class Report:
    """All rows so far, on disk as well.

    Attributes:
        options: Of the command line.
        rows: As measured.
        left_out: For want of time.
        environment: At the start.
    """

    options: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[Task] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Writes the file anew; a process that is killed meanwhile leaves the last one."""
        file: Path | None = self.options.json
        if file is None:
            return
        settings = {name: value for name, value in vars(self.options).items() if name != "json"}
        report = {
            "environment": self.environment,
            "settings": settings,
            "rows": self.rows,
            "left_out": [task._asdict() for task in self.left_out],
        }
        new = file.with_name(file.name + ".new")
        new.write_text(json.dumps(report, indent=2) + "\n")
        new.replace(file)

    def failures(self) -> list[str]:
        """Rows of ours that failed; rivals may."""
        tasks = [
            Task(row["case"], row["way"], row["cache"]) for row in self.rows if "failed" in row
        ]
        return [" ".join(task) for task in tasks if not is_rival(task)]

    def say_what_is_missing(self) -> None:
        missing: dict[str, list[str]] = {}
        for task in self.left_out:
            missing.setdefault(f"{task.case} {task.way}", []).append(task.cache)
        for which, names in missing.items():
            print(f"left out of {which}: {', '.join(names)}", file=sys.stderr)


def run(options: argparse.Namespace) -> Report:
    """Measures as many rows as there is time for."""
    bench, clock, report = Bench(options), Clock(options.seconds), Report(options)
    report.environment = environment(options.device)
    print(HEADER)
    for task in plan(options.cases, options.ways, has_rivals=not options.no_rivals):
        if clock.has_time_for(task):
            start = time.perf_counter()
            row = bench.row(task)
            if options.device.startswith("cuda"):
                row["nvidia-smi"] = _nvidia_smi()
            report.rows.append(row)
            print(printed(row), flush=True)
            clock.note(task, time.perf_counter() - start)
        else:
            report.left_out.append(task)
        report.save()
    report.say_what_is_missing()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--no-rivals", action="store_true", help="only smoothcache")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5, help="timings of every row")
    parser.add_argument("--seconds", type=float, default=510, help="for all rows together")
    parser.add_argument("--tiny", action="store_true", help="tiny models, only to try the script")
    parser.add_argument("--json", type=Path, help="write all figures and the environment here")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("No CUDA device; `--tiny --device cpu` tries the script.")  # as in `make bench`
        return
    if options.ways is None:
        options.ways = [way for way in WAYS if way != "graphs" or options.device != "cpu"]
    with torch.inference_mode():
        report = run(options)
    if report.failures():
        sys.exit(f"failed: {', '.join(report.failures())}")


if __name__ == "__main__":
    main()
