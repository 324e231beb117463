"""Agreement between processes that search together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def join_processes() -> None:
    """Makes the processes of ``accelerate launch`` or ``torchrun`` one group, if there are more."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group()


def rank_and_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_from_all(mine: Any) -> list[Any]:
    size = rank_and_size()[1]
    if size == 1:
        return [mine]
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, mine)
    return everyone


def from_first(make: Callable[[], Any]) -> Any:
    """What the first process makes or raises, in every process."""
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


def agreed(value: bool) -> bool:
    """The first process's answer, in every process."""
    return bool(from_first(lambda: value))
