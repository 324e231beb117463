"""The journal: an interrupted search continues as if it had never stopped."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.searches import Sampler, distance, same, search, state_of
from support.toys import Toy, build
from torch import Tensor

import smoothcache as sc

OPTIONS: dict[str, Any] = {"speedup": 2.0, "max_cost": 20, "num_validation": 1}


def test_an_interrupted_search_is_taken_up_again(toy: Toy, tmp_path: Path) -> None:
    whole = Sampler(toy)
    expected = search(toy, whole.stepped, **OPTIONS)
    for k in (1, 7, 12, len(whole.calls) - 1):
        journal = tmp_path / f"{k}.jsonl"
        first = Sampler(toy)
        first.stop_after = k
        with pytest.raises(KeyboardInterrupt):
            search(toy, first.stepped, journal=journal, **OPTIONS)
        assert state_of(toy) == state_of(build("single", depth=2))
        second = Sampler(toy)
        assert same(search(toy, second.stepped, journal=journal, **OPTIONS), expected)
        known = max(0, k - 7)  # 2 of the calibration, 4 references, and one of those again
        assert len(second.calls) == len(whole.calls) - known
        third = Sampler(toy)
        text = journal.read_text()
        assert same(search(toy, third.stepped, journal=journal, **OPTIONS), expected)
        assert len(third.calls) == 7 and journal.read_text() == text


def test_a_journal_changes_nothing(toy: Toy, tmp_path: Path) -> None:
    with_journal = search(toy, Sampler(toy).stepped, journal=tmp_path / "a.jsonl", **OPTIONS)
    assert same(with_journal, search(toy, Sampler(toy).stepped, **OPTIONS))


def test_a_journal_serves_another_budget(toy: Toy, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    search(toy, Sampler(toy).stepped, speedup=2, journal=journal)
    again, anew = Sampler(toy), Sampler(toy)
    for sampler, path in ((again, journal), (anew, None)):
        search(toy, sampler.stepped, max_error=0.005, max_cost=60, journal=path)
    assert len(again.calls) < len(anew.calls)


@cache
def journal_text() -> str:
    """What a short search writes."""
    with tempfile.TemporaryDirectory() as folder:
        journal, toy = Path(folder) / "journal.jsonl", build("single", depth=2)
        search(toy, Sampler(toy).alone, speedup=2, max_cost=1, journal=journal)
        return journal.read_text()


def other_objective(output: Tensor, reference: Tensor) -> float:
    return 2 * distance(output, reference)


@pytest.mark.parametrize(
    "other",
    [
        lambda: (build("single", depth=3), {}),
        lambda: (build("single", seed=1, depth=2), {}),
        lambda: (build("dual", depth=2), {}),
        lambda: (build("single", depth=2), {"num_steps": 9}),
        lambda: (build("single", depth=2), {"branches": 2}),
        lambda: (build("single", depth=2), {"objective": other_objective}),
    ],
    ids=["depth", "weights", "model", "steps", "sampler", "objective"],
)
def test_the_journal_of_another_search(other: Callable[[], Any], tmp_path: Path) -> None:
    journal, text = tmp_path / "journal.jsonl", journal_text()
    journal.write_text(text)
    toy, options = other()
    before = state_of(toy)
    objective = options.pop("objective", "latent_l2")
    with pytest.raises(sc.InvalidArgumentError, match=r"journal .* of another search.*remove it"):
        search(toy, Sampler(toy, **options).alone, speedup=2, objective=objective, journal=journal)
    assert journal.read_text() == text and state_of(toy) == before


@pytest.mark.parametrize("text", ["hello\n", "{}\n", '{"format": "smoothcache search"}\n[1, 2]\n'])
def test_a_file_that_is_no_journal(toy: Toy, tmp_path: Path, text: str) -> None:
    (tmp_path / "journal.jsonl").write_text(text)
    with pytest.raises(sc.InvalidArgumentError, match="remove it, or name another file"):
        search(toy, Sampler(toy).alone, speedup=2, journal=tmp_path / "journal.jsonl")
    assert (tmp_path / "journal.jsonl").read_text() == text


def test_a_journal_cut_short(toy: Toy, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    expected = search(toy, Sampler(toy).stepped, journal=journal, **OPTIONS)
    whole = journal.read_text()
    length = len(whole.splitlines()[-1])
    for cut in (1, 2, length // 2, length, length + 1):
        journal.write_text(whole[: -cut - 1])
        assert same(search(toy, Sampler(toy).stepped, journal=journal, **OPTIONS), expected)
        last = journal.read_text().splitlines()[-1]
        assert last == whole.splitlines()[-1] and json.loads(last)


def test_an_empty_journal_is_begun(toy: Toy, tmp_path: Path) -> None:
    journal = tmp_path / "empty.jsonl"
    journal.touch()
    search(toy, Sampler(toy).alone, speedup=2, max_cost=1, journal=str(journal))
    assert journal.read_text() == journal_text()


def test_a_journal_in_a_folder_that_is_missing(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder of the journal .*missing"):
        search(toy, Sampler(toy).alone, speedup=2, journal=tmp_path / "missing" / "journal.jsonl")


@pytest.mark.parametrize("lines", [0, 1, 7])
def test_a_disk_that_is_full(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    journal, written, open_ = tmp_path / "journal.jsonl", [], Path.open

    def open_until_full(path: Path, mode: str = "r", **options: Any) -> Any:
        if path == journal and mode == "a":
            written.append(path)
            if len(written) > lines:
                raise OSError(28, "No space left on device")
        return open_(path, mode, **options)

    monkeypatch.setattr(Path, "open", open_until_full)
    with pytest.warns(sc.SmoothCacheWarning, match="No space left .* goes on") as caught:
        schedule = search(toy, Sampler(toy).stepped, journal=journal, **OPTIONS)
    assert len(caught) == 1
    monkeypatch.undo()
    assert same(schedule, search(toy, Sampler(toy).stepped, **OPTIONS))
    if lines:
        again = Sampler(toy)
        assert same(schedule, search(toy, again.stepped, journal=journal, **OPTIONS))
