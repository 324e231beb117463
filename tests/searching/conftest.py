"""What the tests of the search share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.searches import Sampler, state_of
from support.toys import Toy, build


@pytest.fixture
def toy() -> Iterator[Toy]:
    """A toy that no test may leave altered, whatever is raised in it."""
    toy = build("single", depth=2)
    before, output = state_of(toy), Sampler(toy).alone(0)
    yield toy
    assert state_of(toy) == before
    assert torch.equal(Sampler(toy).alone(0), output)
