"""One record of a way of sampling, under everything that runs or measures one."""

from __future__ import annotations

from typing import Any

import pytest

import smoothcache as sc
from smoothcache.comparison import Variant
from smoothcache.schedule.sampling import SamplingConfig
from smoothcache.searching import Measured
from smoothcache.searching.space import Candidate

SCHEDULE = sc.Schedule(4, {"attn": sc.Row.uniform(4, 2)})


@pytest.mark.parametrize(
    "make",
    [
        lambda **way: SamplingConfig("fast", **way),
        lambda **way: Candidate("fast", 0.5, **way),
        lambda **way: Measured("fast", 0.5, 0.1, **way),
    ],
)
def test_a_way_of_sampling_has_the_same_fields_everywhere(make: Any) -> None:
    plain = make()
    assert isinstance(plain, SamplingConfig)
    assert (plain.name, plain.schedule, plain.num_steps, plain.solver) == ("fast", None, None, None)
    own = make(schedule=SCHEDULE, num_steps=4, solver="UniPC")
    assert (own.schedule, own.num_steps, own.solver) == (SCHEDULE, 4, "UniPC")
    assert "schedule" not in repr(own)


def test_a_variant_keeps_the_solver_of_the_sampler() -> None:
    variant = Variant("fast", SCHEDULE)
    assert isinstance(variant, SamplingConfig)
    assert (variant.schedule, variant.num_steps, variant.solver) == (SCHEDULE, None, None)
    with pytest.raises(TypeError, match="solver"):
        Variant("fast", SCHEDULE, solver="UniPC")  # type: ignore[call-arg]
