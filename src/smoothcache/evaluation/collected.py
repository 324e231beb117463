"""What ranks collect of their samples, and how it becomes one."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InvalidArgumentError


class Collector(Protocol):
    """Takes features in, batch by batch, and what other ranks took in."""

    def update(self, features: Tensor, indices: Tensor | None = None) -> None:
        """Takes a batch in."""

    def merge(self, other: Any) -> None:
        """Takes in what another rank collected."""


class Rows:
    """Features, or a value, of every sample: kept in memory, in the order of the samples."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def update(self, features: Tensor, indices: Tensor | None = None) -> None:
        """Takes a batch in: [samples] or [samples, features], with the number of each sample.

        Raises:
            InvalidArgumentError: If a value is not finite.
        """
        if indices is None:
            raise InvalidArgumentError("rows need the numbers of their samples.")
        if not bool(torch.isfinite(features).all()):
            first = int(indices[int((~torch.isfinite(features)).nonzero()[0, 0])])
            raise InvalidArgumentError(f"what was measured of sample {first} is not finite.")
        self._parts.append((indices, features.detach().cpu()))

    def merge(self, other: Rows) -> None:
        """Takes in what another rank collected."""
        self._parts += other._parts

    def joined(self) -> Tensor:
        """All rows, in the order of the samples."""
        if not self._parts:
            raise InvalidArgumentError("there are no samples to measure.")
        indices = torch.cat([x for x, _ in self._parts])
        return torch.cat([x for _, x in self._parts])[indices.argsort(stable=True)]
