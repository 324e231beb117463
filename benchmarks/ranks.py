"""What several processes gain: calibration and generation on one and on two, a thread each.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py [--many] [--json FILE]

Runs the image demo's pipeline in one process and in two, in turns, and takes the shortest of the
repeats. Efficiency is the time of one process over twice that of two. Wall clock means something
on an idle machine with two cores or more only; the processor's time is that of the busiest rank,
waiting left out, so it shows work that is done twice or unevenly but not what ranks wait for.

--many also writes 50,000 images of 32 x 32 by two processes, measures their statistics, and prints
the peak of resident memory of each, beside that of 5,000 images. The images are random numbers: it
is about writing, reading and adding up.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SAMPLES, STEPS, REPEATS = 10, 20, 3


def calibration(folder: Path) -> None:
    import smoothcache as sc

    pipe, sampler = pipeline()
    sc.calibrate(pipe, sampler, SAMPLES, over_ranks=True, progress=False)


def generation(folder: Path) -> None:
    from smoothcache.generation import sample_pipeline

    _, sampler = pipeline()
    with tempfile.TemporaryDirectory() as place:
        shared = from_zero(place)
        sample_pipeline(
            sampler, f"{shared}/run", 16 * SAMPLES, batch_size=4, shard_size=4, progress=False
        )


def pipeline() -> Any:
    from smoothcache.demo.image import FOLDER
    from smoothcache.diffusers_io import PipelineSampler, load_pipeline

    pipe = load_pipeline(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe, PipelineSampler(pipe, class_labels=tuple(range(10)), num_steps=STEPS)


def from_zero(value: str) -> str:
    from smoothcache.processes import from_rank_zero, join_processes

    join_processes()
    return from_rank_zero(lambda: value)


def many(folder: Path, count: int) -> None:
    from smoothcache.evaluation import evaluate
    from smoothcache.generation import sample_many

    def sample(numbers: Sequence[int]) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in numbers]
        return torch.stack([torch.rand(3, 32, 32, generator=seed) for seed in seeds])

    class Pixels:
        name, digest = "256 pixels", None
        sizes = {"class_token": 256}  # noqa: RUF012

        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"class_token": images.float().flatten(1)[:, ::12]}

    sample_many(sample, folder / f"{count}", count, batch_size=50, shard_size=500, progress=False)
    evaluate(
        folder / f"{count}", folder / f"{count}", ["fd_dinov2"], networks={"dinov2": Pixels()},
        progress=False,
    )  # fmt: skip


WORK: dict[str, Callable[[Path], None]] = {
    "calibration": calibration,
    "generation": generation,
    "many 5000": lambda folder: many(folder, 5_000),
    "many 50000": lambda folder: many(folder, 50_000),
}


def as_rank(name: str, folder: Path) -> None:
    """Does the work in this process; the clock starts when everything is imported and joined."""
    from smoothcache.processes import gather_from_all, join_processes, leave_processes

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    join_processes()
    if not name.startswith("many"):
        pipeline()
    gather_from_all(None)
    wall, busy = time.perf_counter(), time.process_time()
    WORK[name](folder)
    spent = {
        "seconds": time.perf_counter() - wall,
        "busy": time.process_time() - busy,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    leave_processes()
    print(json.dumps(spent))


def run(name: str, size: int, folder: str) -> list[dict[str, float]]:
    """What each of some processes spent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--as-rank", name, folder],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [rank.communicate() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("\n".join(error for _, error in outputs))
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--many", action="store_true", help="also write and measure 50,000 images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--as-rank", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        as_rank(args.as_rank[0], Path(args.as_rank[1]))
        return
    found: dict[str, Any] = {"load": os.getloadavg()[0], "cores": os.cpu_count()}
    print(f"{found['cores']} cores, load {found['load']:.1f}")
    for name in ("calibration", "generation"):
        spent: dict[int, list[list[dict[str, float]]]] = {1: [], 2: []}
        for _ in range(REPEATS):
            for size in spent:
                spent[size].append(run(name, size, ""))
        found[name] = {}
        for what in ("seconds", "busy"):
            one, two = (
                min(max(rank[what] for rank in ranks) for ranks in spent[size]) for size in (1, 2)
            )
            found[name][what] = {"one": one, "two": two, "efficiency": one / (2 * two)}
            kind = {"seconds": "wall clock", "busy": "processor"}[what]
            print(
                f"{name}, {kind}: {one:.2f} s on one process, {two:.2f} s on two, "
                f"efficiency {one / (2 * two):.2f}"
            )
    if args.many:
        for count in (5_000, 50_000):
            with tempfile.TemporaryDirectory() as folder:
                ranks = run(f"many {count}", 2, folder)
            peaks = [rank["peak_mib"] for rank in ranks]
            found[f"many {count}"] = {"peak_mib": peaks, "seconds": ranks[0]["seconds"]}
            shown = " and ".join(f"{peak:.0f}" for peak in peaks)
            print(f"{count} images by two processes: at most {shown} MiB, "
                  f"{ranks[0]['seconds']:.0f} s")  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
