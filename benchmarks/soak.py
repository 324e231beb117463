"""Generations under faults for as long as asked: equal to fresh ones, and nothing left behind.

Every round picks a toy model, a granularity and where values are kept, enables a schedule and
generates: other seeds, batches and lengths, wrong numbers of steps, generations broken off by
exceptions, resets, threads that take turns, and enabling again. Each generation is compared with
the one that a fresh copy makes. At the end the process must have no more memory, Python objects,
file descriptors and threads than after the warm-up.

    python benchmarks/soak.py --minutes 10
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import random
import sys
import threading
import time
import tracemalloc
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.toys import TOYS, Toy, build

import smoothcache as sc

STEPS = 6
MEMORY_MIB, OBJECTS_MIB = 16.0, 1.0  # growth allowed between the warm-up and the end


class Stop(Exception):
    """What breaks a generation off."""


@dataclass
class Tally:
    """What a soak did and what was left after it."""

    rounds: int = 0
    generations: int = 0
    refused: int = 0
    broken_off: int = 0
    threads: int = 0
    wrong: list[str] = field(default_factory=list)
    resident_mib: float = 0.0
    objects_mib: float = 0.0
    descriptors: int = 0
    threads_left: int = 0

    @property
    def passed(self) -> bool:
        return (
            not self.wrong
            and self.resident_mib <= MEMORY_MIB
            and self.objects_mib <= OBJECTS_MIB
            and self.descriptors <= 0
            and self.threads_left <= 0
        )


def soak(seconds: float = 0, *, rounds: int = 2, seed: int = 0, warm_up: float = 0.3) -> Tally:
    """Runs rounds for a time, and at least so many.

    Args:
        seconds: How long in all.
        rounds: How many at least.
        seed: Of the choices.
        warm_up: Share of the time and of the rounds after which growth is measured.
    """
    choices, tally = random.Random(seed), Tally()
    with torch.no_grad():
        play(choices, Tally())  # loads what torch loads at first use
    started, before = time.monotonic(), None
    tracemalloc.start()
    try:
        while time.monotonic() - started < seconds or tally.rounds < rounds:
            with torch.no_grad():
                play(choices, tally)
            tally.rounds += 1
            is_warm = tally.rounds >= warm_up * rounds
            if before is None and is_warm and time.monotonic() - started >= warm_up * seconds:
                before = held()
        after = held()
        before = before or after
    finally:
        tracemalloc.stop()
    tally.resident_mib, tally.objects_mib = after[0] - before[0], after[1] - before[1]
    tally.descriptors, tally.threads_left = after[2] - before[2], after[3] - before[3]
    return tally


def held() -> tuple[float, float, int, int]:
    """Resident MiB, MiB of Python objects, open file descriptors, and threads."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    return (
        resident,
        tracemalloc.get_traced_memory()[0] / 2**20,
        descriptors,
        len(list(Path("/proc/self/task").iterdir())),
    )


def play(choices: random.Random, tally: Tally) -> None:
    """One round: a model, a schedule, and a handful of generations under one handle."""
    name = choices.choice(sorted(TOYS))
    toy = build(name, depth=2, seed=choices.randrange(100))
    granularity: Any = choices.choice(["auto", "block", "model"])
    schedule = sc.Schedule.uniform(
        toy,
        STEPS,
        choices.randint(2, 4),
        predictor=choices.choice(["hold", "taylor"]),
        granularity=granularity,
    )
    store: Any = choices.choice(["device", "cpu"])
    plain, twin = copy.deepcopy(toy), copy.deepcopy(toy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sc.SmoothCacheWarning)
        run = sc.enable(toy, schedule, store=store)
        for _ in range(choices.randint(3, 8)):
            act = choices.choice(["plain", "plain", "steps", "exception", "again", "thread"])
            options = {
                "seed": choices.randrange(1000),
                "batch": choices.randint(1, 3),
                "tokens": choices.choice([6, 9]),
            }
            if act == "steps":
                refuse_steps(toy, tally, run)
            elif act == "exception":
                break_off(toy, tally, choices.randrange(1, STEPS), run)
            elif act == "again":
                run.disable()
                alone = plain.generate(STEPS, **options)
                compare(toy.generate(STEPS, **options), alone, tally, act)
                run = sc.enable(toy, schedule, store=store)
            else:
                what = f"{name} {granularity} {act}"
                compare_with_fresh(toy, twin, schedule, options, tally, what)
        run.disable()
    if any(type(a) is not type(b) for a, b in zip(toy.modules(), plain.modules(), strict=True)):
        tally.wrong.append(f"{name}: a class was not restored")


def compare_with_fresh(
    toy: Toy, twin: Toy, schedule: sc.Schedule, options: dict[str, int], tally: Tally, what: str
) -> None:
    results: list[torch.Tensor] = []

    def generate() -> None:
        with torch.no_grad():
            results.append(toy.generate(STEPS, **options))

    if what.endswith("thread"):
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
        tally.threads += 1
    else:
        generate()
    with sc.cached(twin, schedule):
        fresh = twin.generate(STEPS, **options)
    compare(results[0] if results else None, fresh, tally, what)


def compare(result: torch.Tensor | None, fresh: torch.Tensor, tally: Tally, what: str) -> None:
    tally.generations += 1
    if result is None or not torch.equal(result, fresh):
        tally.wrong.append(f"{what}: generation {tally.generations} differs from a fresh one")


def refuse_steps(toy: Toy, tally: Tally, run: sc.Run) -> None:
    try:
        toy.generate(STEPS + 1)
    except sc.ScheduleMismatchError:
        tally.refused += 1
    else:
        tally.wrong.append("one step too many was not refused")
    run.reset()


def break_off(toy: Toy, tally: Tally, after: int, run: sc.Run) -> None:
    calls = iter(range(after))

    def fail(*_: Any) -> None:
        if next(calls, None) is None:
            raise Stop

    hook = toy.head.register_forward_pre_hook(fail)
    try:
        toy.generate(STEPS)
    except Stop:
        tally.broken_off += 1
    finally:
        hook.remove()
    run.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tally = soak(60 * args.minutes, seed=args.seed)
    print(f"{tally.rounds} rounds, {tally.generations} generations compared with fresh ones")
    print(f"{tally.refused} refused, {tally.broken_off} broken off, {tally.threads} in a thread")
    print(f"resident memory {tally.resident_mib:+.1f} MiB, objects {tally.objects_mib:+.2f} MiB")
    print(f"file descriptors {tally.descriptors:+d}, threads {tally.threads_left:+d}")
    for line in tally.wrong[:20]:
        print(f"WRONG: {line}")
    sys.exit(not tally.passed)


if __name__ == "__main__":
    main()
