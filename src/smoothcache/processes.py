"""Work in several processes, as ``torchrun`` and ``accelerate launch`` begin them.

Only small Python objects go from rank to rank, over gloo, so that nothing here needs a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # ranks wait for the slowest; one that dies is noticed at once


def join_processes() -> None:
    """Joins the processes of ``accelerate launch`` or ``torchrun`` into one group.

    Does nothing in a single process, or if there is a group already.
    """
    size = _from_environment("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE") or 1
    if size > 1 and not dist.is_initialized():
        rank = _from_environment("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK") or 0
        dist.init_process_group("gloo", timeout=PATIENCE, rank=rank, world_size=size)


def leave_processes() -> None:
    """Ends the group of this process, if it is in one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int | None:
    """The number of this process on its machine; None if it is not one of several."""
    if (_from_environment("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE") or 1) == 1:
        return None
    return _from_environment("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID") or 0


def _from_environment(*names: str) -> int | None:
    """What ``torchrun`` calls by the first name, Open MPI and MPICH by the others."""
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


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


def gather_to_zero(value: Any) -> list[Any]:
    """The values of all processes, by rank, in rank 0; an empty list elsewhere."""
    rank, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size if rank == 0 else []
    dist.gather_object(value, values if rank == 0 else None)
    return values


def from_rank_zero(make: Callable[[], T]) -> T:
    """Calls a function in rank 0 and returns its result, or raises its exception, on all ranks."""
    made: Any = None
    failure: Exception | None = None
    if rank_and_size()[0] == 0:
        try:
            made = make()
        except Exception as error:
            failure = error
    made, failure = gather_from_all((made, failure))[0]
    if failure is not None:
        raise failure
    result: T = made
    return result


def on_all_ranks(make: Callable[[], T]) -> T:
    """Calls a function in every rank and returns its own result, or raises on all ranks if one did.

    The others end their work before they raise it, so that nothing of it is lost.
    """
    if rank_and_size()[1] == 1:
        return make()
    failure: Exception | None = None
    try:
        made = make()
    except Exception as error:
        failure = error
    for reason in gather_from_all(failure):
        if reason is not None:
            raise reason
    return made


def decided_by_rank_zero(value: bool) -> bool:
    """The value of rank 0, in every process."""
    return bool(from_rank_zero(lambda: value))
