"""The text of a summary, whole."""

from __future__ import annotations

from typing import Any

import pytest
from support.golden import assert_golden
from support.made_up import MODEL, layers_of

import smoothcache as sc
from smoothcache.runtime.summary import NOT_FINITE, OTHER_SHAPES, Summary

SCHEDULE = sc.Schedule(
    8,
    {layer.path: sc.Row.uniform(8, 2) for layer in layers_of(2)},
    layers_of(2),
    MODEL,
    compute=0.55,
)
BEFORE: dict[str, Any] = {
    **{"finished": 0, "broken_off": 0, "steps_under_way": 0, "computed": 0, "reused": 0},
    **{"outside": 0, "recomputed": {}, "peak_bytes": 0, "held_bytes": 0, "never_ran": ()},
}
STATES: dict[str, dict[str, Any]] = {
    "before_any_call": {},
    "as_planned": {"finished": 2, "computed": 32, "reused": 32, "peak_bytes": 3 << 19},
    "under_way": {
        **{"finished": 1, "broken_off": 1, "steps_under_way": 3},
        **{"computed": 30, "reused": 27, "peak_bytes": 3 << 19, "held_bytes": 1 << 19},
    },
    "not_as_planned": {
        **{"finished": 1, "computed": 14, "reused": 8, "outside": 2},
        **{"recomputed": {OTHER_SHAPES: 3, NOT_FINITE: 1}, "peak_bytes": 3 << 20},
        **{"never_ran": ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn", "blocks.3.attn")},
    },
    "nothing_reused": {"finished": 1, "computed": 16, "recomputed": {OTHER_SHAPES: 16}},
}


@pytest.mark.parametrize("state", STATES)
def test_text(state: str) -> None:
    assert_golden(Summary(SCHEDULE, **{**BEFORE, **STATES[state]}), f"runtime/summary_{state}")


def test_nothing_is_missed_where_nothing_was_to_be_reused() -> None:
    everything = sc.Schedule(2, {"attn": sc.Row((True, True))})
    finished = Summary(everything, **{**BEFORE, "finished": 1, "computed": 4})
    assert "NOTHING" not in str(finished)
