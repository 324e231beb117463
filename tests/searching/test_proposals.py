"""Proposals: schedules of the user and calibrated blocks compete with the search's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.searches import STEPS, Sampler, calibrated, result_of, search
from support.toys import WIDTH, Block, Toy, build
from torch import Tensor

import smoothcache as sc


class SameAttention(Block):
    """Its attention puts out the same at every step."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        same = torch.linspace(-1, 1, WIDTH).expand(x.shape)
        x = x + self.attn(same)
        return x + self.mlp(self.norm2(x) + c[:, None])


def test_a_proposal_competes_with_what_the_search_proposes() -> None:
    """No family of the search reuses one layer alone; here that costs nothing in quality."""
    toy = build("single", depth=2)
    toy.blocks[0] = SameAttention(WIDTH).eval().requires_grad_(False)
    sample = Sampler(toy).alone
    calibration = sc.calibrate(toy, sample, 1, progress=False)
    rows = {x.path: sc.Row((True,) * STEPS) for x in calibration.layers}
    rows["blocks.0.attn"] = sc.Row((True,) + (False,) * (STEPS - 1))
    macs = {x.path: x.macs or 0 for x in calibration.layers}["blocks.0.attn"]
    given = sc.Schedule(
        STEPS,
        rows,
        calibration.layers,
        compute=1 - macs * (STEPS - 1) / (STEPS * calibration.total_macs),
        provenance={"planner": "learned"},
    )
    everything = sc.Schedule.uniform(toy, STEPS, 1, layers=calibration.layers)
    options = {"compute": given.compute, "proposals": [everything, given], "max_cost": 30.0}
    best = search(toy, sample, calibration, **options)
    result = result_of(best)
    assert result.best.name == "given 1: learned"
    assert (result.best.error, result.best.compute) == (0.0, given.compute)
    assert (best.rows, best.compute) == (given.rows, given.compute)
    assert not any(row.name.startswith("given 0") for row in result.front)  # beyond the budget


@pytest.mark.parametrize(
    ("proposal", "error", "words"),
    [
        ("dit.json", sc.InvalidArgumentError, "proposals must be schedules.*got str"),
        (
            sc.Schedule(STEPS, {"attn": sc.Row((True,) * STEPS)}),
            sc.InvalidArgumentError,
            "know their layers.*bind",
        ),
        ("shorter", sc.InvalidArgumentError, "proposal 0 has 4 steps, but a generation has 8"),
        ("other", sc.ScheduleMismatchError, "planned for"),
    ],
)
def test_proposals_that_do_not_fit_are_refused(
    toy: Toy, proposal: Any, error: type[Exception], words: str
) -> None:
    if proposal == "shorter":
        proposal = sc.Schedule.uniform(toy, 4, 2)
    if proposal == "other":
        proposal = sc.Schedule.uniform(build("dual", depth=2), STEPS, 2)
    sampler = Sampler(toy)
    with pytest.raises(error, match=words):
        search(toy, sampler.alone, calibrated(), compute=0.5, proposals=[proposal])
    assert not sampler.calls


def test_blocks_are_searched_over_if_they_were_calibrated(toy: Toy) -> None:
    sampler = Sampler(toy)
    blocks = sc.calibrate(toy, sampler.alone, 2, granularity="block", progress=False)
    ours = search(toy, sampler.alone, blocks, compute=0.6)
    tried = {row.schedule.layers for row in result_of(ours).front if row.schedule is not None}
    assert blocks.layers in tried
    assert {x.kind for x in blocks.layers} == {"block"}
    assert ours.compute is not None and ours.compute <= 0.6
