"""The comparison with golden files itself, and the files that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import golden

TESTS = Path(__file__).parent


def test_a_change_is_refused_until_it_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "GOLDEN", tmp_path)
    monkeypatch.delenv(golden.UPDATE, raising=False)
    with pytest.raises(AssertionError, match=f"there is no .*{golden.UPDATE}=1"):
        golden.assert_golden("a  \nb", "room/name")
    monkeypatch.setenv(golden.UPDATE, "1")
    golden.assert_golden("a  \nb", "room/name")
    assert (tmp_path / "room" / "name.txt").read_text() == "a\nb\n"
    monkeypatch.delenv(golden.UPDATE)
    golden.assert_golden("a\nb\n", "room/name")
    with pytest.raises(AssertionError, match="to accept this change"):
        golden.assert_golden("a\nc", "room/name")


def test_what_differs_between_runs_is_masked() -> None:
    text = "1 file(s) in 0.4 s, written to /tmp/x/out"
    assert golden.masked(text, Path("/tmp/x")) == "1 file(s) in N s, written to FOLDER/out"
    bar = "\rsearching: 0%|   | 0/9\rsearching: 100%|###| 9/9 [00:01<00:00, 7.5sample/s]\n"
    assert golden.last_of_bar(bar) == "searching: 100%|BAR| 9/9 [TIME, RATE]"


def test_every_file_belongs_to_a_test_of_its_room() -> None:
    for file in golden.GOLDEN.rglob("*.txt"):
        room = file.parent.name
        texts = "".join(path.read_text(encoding="utf-8") for path in (TESTS / room).glob("*.py"))
        assert f'"{room}/' in texts and re.split("[_-]", file.stem)[0] in texts, file
