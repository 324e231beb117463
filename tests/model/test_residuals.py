"""Which input an output of a block continues."""

from __future__ import annotations

import pytest
import torch
from support.reference import STEPS, sample
from support.toys import DualStreamToy
from torch import Tensor

import smoothcache as sc


class CrossingToy(DualStreamToy):
    """Two streams of one shape, which its blocks take in one order and return in the other."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.condition(t, y)
        h, text = self.x_embedder(x), self.y_embedder(y)[:, None].expand(-1, x.shape[1], -1)
        for block in self.blocks:
            text, h = block(h, text, c)
        return self.head(h)


@pytest.mark.parametrize("compiled", [False, True])
def test_streams_of_one_shape_that_come_out_in_the_other_order(compiled: bool) -> None:
    """The little that these blocks add is reused with little error if the right stream gets it."""
    torch.manual_seed(0)
    toy = CrossingToy(depth=1).eval().requires_grad_(False)
    block = toy.blocks[0]
    for last in (block.attn.to_out, block.attn.to_add_out, block.ff.fc2, block.ff_context.fc2):
        last.weight.mul_(0.05), last.bias.mul_(0.05)
    with torch.no_grad():
        plain = sample(toy)
        schedule = sc.Schedule.uniform(toy, STEPS, 4, granularity="block")
        if compiled:
            torch.compiler.reset()
            toy.compile(backend="eager", fullgraph=True)
        with sc.cached(toy, schedule) as run:
            reused = sample(toy)
        torch.compiler.reset()
    assert run.summary().reused == schedule.reused
    assert (reused[-1] - plain[-1]).norm() < 0.01 * (plain[-1] - plain[0]).norm()
