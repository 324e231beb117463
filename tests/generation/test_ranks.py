"""Two and three processes write the folder that one writes, byte for byte."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from support.folders import content, noise, run_ranks

from smoothcache import InvalidArgumentError
from smoothcache.generation import sample_many
from smoothcache.processes import rank_and_size

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)


def work(folder: Path) -> None:
    """What every rank does."""
    rank = int(os.environ["RANK"])
    made: list[int] = []

    def sample(numbers: list[int]) -> torch.Tensor:
        made.extend(numbers)
        return noise(numbers)

    sample_many(sample, folder / "run", 23, batch_size=2, shard_size=4, progress=False)
    assert rank_and_size()[1] > 1 and len(made) < 23
    try:
        sample_many(sample, folder / "other", 23, seed=rank, progress=False)
    except InvalidArgumentError as error:
        (folder / f"refused-{rank}.txt").write_text(str(error))

    def failing(numbers: list[int]) -> torch.Tensor:
        if rank == 1:
            raise ValueError("in one rank alone")
        return noise(numbers)

    try:
        sample_many(failing, folder / "failed", 12, batch_size=2, shard_size=2, progress=False)
    except ValueError as error:
        (folder / f"failed-{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_what_one_process_writes(size: int, tmp_path: Path) -> None:
    ended = run_ranks(__file__, size, tmp_path)
    assert [code for code, _ in ended] == [0] * size, ended
    sample_many(noise, tmp_path / "one", 23, batch_size=2, shard_size=4, progress=False)
    assert content(tmp_path / "run") == content(tmp_path / "one")
    for rank in range(size):
        refusal = (tmp_path / f"refused-{rank}.txt").read_text()
        assert "rank 0 and rank 1 have different arguments: seed (here 0, there 1)" in refusal
        assert (tmp_path / f"failed-{rank}.txt").read_text() == "in one rank alone"
    assert not (tmp_path / "other" / "manifest.json").exists()
    # What the other ranks wrote is kept.
    assert len(list((tmp_path / "failed" / "records").iterdir())) >= 6 // size


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
