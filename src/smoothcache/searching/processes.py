"""Collective operations for a search that runs in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def join_processes() -> None:
    """Joins the processes of ``accelerate launch`` or ``torchrun`` into one group.

    Does nothing in a single process, or if there is a group already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group()


def rank_and_size() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) without a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_from_all(value: Any) -> list[Any]:
    """The values of all processes, by rank, in every process."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """Calls a function in rank 0 and returns its result, or raises its exception, on all ranks."""
    made, failure = None, None
    if rank_and_size()[0] == 0:
        try:
            made = make()
        except Exception as error:
            failure = error
    made, failure = gather_from_all((made, failure))[0]
    if failure is not None:
        raise failure
    return made


def decided_by_rank_zero(value: bool) -> bool:
    """The value of rank 0, in every process."""
    return bool(from_rank_zero(lambda: value))
