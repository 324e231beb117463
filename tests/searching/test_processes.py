"""A search in several processes finds what one process finds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.searches import SOLVERS, Sampler, result_of, same, search, state_of
from support.toys import build
from torch import Tensor

import smoothcache as sc

PATIENCE = 120.0  # seconds until a process that waits is a failure
TESTS = Path(__file__).resolve().parents[1]  # where the processes find the helpers


def what_was_found(rank: int) -> dict[str, Any]:
    """A search in this process, and one in which a sample fails in the last process alone."""
    toy = build("single", depth=2)
    sampler = Sampler(toy)
    options = {"compute": 0.4, "solvers": SOLVERS, "journal": "journal.jsonl"}
    schedule = search(toy, sampler.full, **options)
    again = Sampler(toy)
    repeated = search(toy, again.full, **options)
    failing = Sampler(toy)

    def sample(i: int) -> Tensor:
        if rank == 1 and len(failing.calls) == 9:
            raise ValueError("in one process alone")
        return failing.alone(i)

    failure, refusal = "", ""
    try:
        search(toy, sample, speedup=2)
    except ValueError as error:
        failure = str(error)
    try:
        search(toy, failing.alone, speedup=3, journal="journal.jsonl")
    except sc.InvalidArgumentError as error:
        refusal = str(error)
    result = result_of(schedule)
    return {
        "rows": {path: (row.computed, row.predictor) for path, row in schedule.rows.items()},
        "quality": dict(schedule.quality),
        "front": [(x.name, x.compute, x.error) for x in result.front],
        "summary": (result.rollouts, result.cost, str(result)),
        "is_same_again": same(repeated, schedule),
        "calls": (len(sampler.calls), len(again.calls)),
        "failure": failure,
        "refusal": refusal,
        "is_unaltered": state_of(toy) == state_of(build("single", depth=2)),
    }


def processes_found(folder: Path, size: int) -> list[dict[str, Any]]:
    """What each of some processes found, begun as ``torchrun`` begins them."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * size, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)
def test_two_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the candidates out, write one journal, and fail together."""
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    one = what_was_found(rank=0)
    two = processes_found(tmp_path / "two", 2)
    for other in two:
        assert {x: other[x] for x in ("rows", "quality", "front", "summary")} == {
            x: one[x] for x in ("rows", "quality", "front", "summary")
        }
        assert other["is_same_again"] and other["is_unaltered"]
        assert other["failure"] == "in one process alone"
        assert "of another search" in other["refusal"]
        again = other["calls"][1]  # without one of the two samples that are calibrated on
        assert again == one["calls"][1] - 1 and again < other["calls"][0] < one["calls"][0]
    shared = sum(calls - again for calls, again in (x["calls"] for x in two))
    assert shared == one["calls"][0] - one["calls"][1]
    journals = [tmp_path / name / "journal.jsonl" for name in ("one", "two")]
    lines = [sorted(journal.read_text().splitlines()) for journal in journals]
    assert lines[0] == lines[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = int(os.environ["RANK"])
    torch.save(what_was_found(own), f"{own}.pt")
    torch.distributed.destroy_process_group()
