"""Folders compared byte for byte, and cheap samples to fill them with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1]
PATIENCE = 240.0  # seconds until a process that waits is a failure


def noise(numbers: Sequence[int]) -> Tensor:
    """Images [numbers, 3, 4, 6] in [0, 1], each of its own number alone."""
    generators = [torch.Generator().manual_seed(i) for i in numbers]
    return torch.stack([torch.rand(3, 4, 6, generator=generator) for generator in generators])


def content(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and below it, by its path."""
    files = [x for x in folder.rglob("*") if x.is_file()]
    return {str(x.relative_to(folder)): x.read_bytes() for x in files}


def run_ranks(script: str, size: int, *arguments: Any) -> list[tuple[int, str]]:
    """Runs a script as ``torchrun`` begins ranks; exit code and stderr of each."""
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
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), *sys.path])),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
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
    return [(x.returncode, error) for x, error in zip(processes, errors, strict=True)]
