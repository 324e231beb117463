"""A short soak; ``make soak`` runs one of minutes."""

from __future__ import annotations

from soak import soak


def test_a_short_soak() -> None:
    tally = soak(rounds=12)
    assert tally.wrong == []
    assert tally.generations > 5 and tally.refused + tally.broken_off > 0
    assert tally.descriptors <= 0 and tally.threads_left <= 0
    assert tally.passed, tally
