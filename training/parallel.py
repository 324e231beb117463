"""Several processes that train one model: `torchrun --nproc-per-node 2 -m ...`.

On a CPU whose cores are shared with other work this is faster than one process with several
threads, because the processes wait for each other once per step, the threads at every operation.
Everything here also works in a single process, where it does nothing.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn


def start() -> None:
    """Join the other processes, if `torchrun` started any."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")


def stop() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def rank() -> int:
    """Number of this process; number 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    means = torch.split(flat, [g.numel() for g in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def agreed(number: float) -> float:
    """The first process's value of a number, so that all take the same decisions."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, dtype=torch.float64)
    dist.broadcast(value, src=0)
    return value.item()
