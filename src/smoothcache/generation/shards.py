"""How the samples of a run are divided: into shards by their numbers, whatever the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import check_count
from ..errors import InvalidArgumentError


@dataclass(frozen=True)
class Shard:
    """Consecutive samples that are written together: what a kill can cost a rank at most.

    Attributes:
        number: Of the shard, from 0.
        samples: Numbers of its samples.
    """

    number: int
    samples: range

    def batches(self, batch_size: int) -> list[range]:
        """The samples that are generated together.

        Args:
            batch_size: Most samples in a batch.

        Returns:
            Numbers of samples, a range for each batch.
        """
        first, end = self.samples.start, self.samples.stop
        return [range(i, min(i + batch_size, end)) for i in range(first, end, batch_size)]


def divide(num_samples: int, batch_size: int, shard_size: int) -> list[Shard]:
    """Shards of all samples; the last one may be smaller.

    Batches are counted from the start of the run, so that they never depend on who runs them.

    Raises:
        InvalidArgumentError: If a shard does not consist of whole batches.
    """
    check_count("num_samples", num_samples, least=1)
    check_count("batch_size", batch_size, least=1)
    check_count("shard_size", shard_size, least=1)
    if shard_size % batch_size:
        raise InvalidArgumentError(
            f"shard_size must be a multiple of batch_size, got {shard_size} and {batch_size}."
        )
    starts = range(0, num_samples, shard_size)
    return [
        Shard(number, range(start, min(start + shard_size, num_samples)))
        for number, start in enumerate(starts)
    ]


def share_of(shards: Sequence[Shard], rank: int, size: int) -> Sequence[Shard]:
    """What one rank writes of the shards that are left."""
    return shards[rank::size]
