"""Ranks as torchrun, Open MPI and MPICH name them."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from smoothcache.processes import (
    from_rank_zero,
    gather_to_zero,
    join_processes,
    local_rank,
    on_all_ranks,
    rank_and_size,
)


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"},
        {
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        },
        {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1"},
    ],
)
def test_ranks_are_read_from_the_environment(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[Any] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **x: joined.append(x))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join_processes()
    assert [(x["rank"], x["world_size"]) for x in joined] == [(3, 4)]
    assert local_rank() == 1


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    join_processes()
    assert not dist.is_initialized()
    assert rank_and_size() == (0, 1) and local_rank() is None
    assert on_all_ranks(lambda: 1) == from_rank_zero(lambda: 1) == 1
    assert gather_to_zero(1) == [1]
