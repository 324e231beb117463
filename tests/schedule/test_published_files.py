"""The schedules that the authors of SmoothCache published, and their names on other models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.made_up import MODEL, layers_of

from smoothcache.errors import FileFormatError, ScheduleMismatchError
from smoothcache.schedule.row import Row
from smoothcache.schedule.schedule import Schedule

FOLDER = Path(__file__).parents[1] / "data" / "published_schedules"
FILES = sorted(FOLDER.glob("*.json"))
OWN_NAMES = (("attn", "self_attn"), ("mlp", "ffn"))
DIFFUSERS_NAMES = (("attn1", "self_attn"), ("ff", "ffn"))


def publish(path: Path, masks: Any) -> Path:
    path.write_text(json.dumps(masks))
    return path


def unbound(**names: str) -> Schedule:
    """Name -> mask, # computed and . reused; a name may be written with _ for -."""
    rows = {
        name.replace("_", "-"): Row(tuple(mark == "#" for mark in marks))
        for name, marks in names.items()
    }
    return Schedule(len(next(iter(rows.values())).computed), rows)


def drawn(schedule: Schedule) -> dict[str, str]:
    return {
        path: "".join("#" if on else "." for on in row.computed)
        for path, row in schedule.rows.items()
    }


def test_all_nine_are_here() -> None:
    assert len(FILES) == 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("leaves", [OWN_NAMES, DIFFUSERS_NAMES], ids=["own", "diffusers"])
def test_published_files_map_onto_a_dit(path: Path, leaves: Any) -> None:
    raw = json.loads(path.read_text())
    loaded = Schedule.load(path)
    assert loaded.layers is None
    assert dict(loaded.provenance) == {"source": "published 0/1 file", "file": path.name}
    assert {name: list(map(int, row.computed)) for name, row in loaded.rows.items()} == raw

    bound = loaded.bind(layers_of(28, leaves), MODEL)
    assert bound.model == MODEL
    for block in range(28):
        for (leaf, kind), own in zip(leaves, ("attn", "mlp"), strict=True):
            names = {own, f"{own}-{block}"} | ({"attn1"} if kind == "self_attn" else set())
            wanted = next((raw[name] for name in names if name in raw), [1] * loaded.num_steps)
            assert list(bound.rows[f"blocks.{block}.{leaf}"].computed) == [x == 1 for x in wanted]
    assert not bound.is_all_compute


def test_what_the_files_are_known_for() -> None:
    schedule = Schedule.load(FOLDER / "50-N-3-threshold-0.18.json")
    assert drawn(schedule)["attn"].startswith("#...#..#")
    for path in FILES:
        marks = set(drawn(Schedule.load(path)).values())
        assert all(mark.endswith("#") and "...." not in mark for mark in marks)


@pytest.mark.parametrize("steps", [30, 50, 70])
def test_published_fora_is_uniform_with_the_last_step(steps: int) -> None:
    published = Schedule.load(FOLDER / f"{steps}-N-2-fora.json")
    assert set(published.rows.values()) == {Row.uniform(steps, 2, last=True)}


def test_learned_schedule_needs_its_number_of_blocks() -> None:
    learned = Schedule.load(FOLDER / "50-N-2-l2c.json")
    with pytest.raises(ScheduleMismatchError, match="'attn-27' is for block 27, but there are 27"):
        learned.bind(layers_of(27))
    with pytest.raises(ScheduleMismatchError, match=r"no row for the blocks 'blocks\.28'"):
        learned.bind(layers_of(29))


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"attn": [1, 0, 1], "mlp": [1, 0]}, ["mlp", "2 steps", "'attn'", "3"]),
        ({"attn": [1, 2]}, ["attn[1]", "2"]),
        ({"attn": [1, True]}, ["attn[1]", "True"]),
        ({"attn": [1, 1.0]}, ["attn[1]", "1.0"]),
        ({"attn": [1, "0"]}, ["attn[1]", "'0'"]),
        ({"attn": [0, 1]}, ["attn", "step 0"]),
        ({"attn": []}, ["attn", "step 0"]),
        ({"attn": [1, 0], "mlp": 1}, ["mlp", "list"]),
        ({}, ["smoothcache.schedule"]),
        ([[1, 0]], ["object"]),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, masks: Any, words: list[str]) -> None:
    path = publish(tmp_path / "bad.json", masks)
    with pytest.raises(FileFormatError) as caught:
        Schedule.load(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_a_repeated_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"attn": [1, 0], "attn": [1, 1]}')
    with pytest.raises(FileFormatError, match=r"'attn' comes twice"):
        Schedule.load(tmp_path / "bad.json")


def test_a_leaf_name_comes_before_its_usual_meaning() -> None:
    layers = layers_of(1, [("attn", "cross_attn"), ("attn1", "self_attn")])
    assert drawn(unbound(attn="#.").bind(layers)) == {"blocks.0.attn": "#.", "blocks.0.attn1": "##"}


@pytest.mark.parametrize(
    ("name", "kinds", "covered"),
    [
        ("attn", ["self_attn", "cross_attn", "ffn"], ["self_attn"]),
        ("self-attn", ["self_attn", "ffn"], None),
        ("self_attn", ["self_attn", "ffn"], ["self_attn"]),
        ("attn", ["joint_attn", "ffn"], ["joint_attn"]),
        ("attn1", ["joint_attn", "self_attn"], ["self_attn"]),
        ("attn2", ["self_attn", "cross_attn"], ["cross_attn"]),
        ("cross_attn", ["self_attn", "cross_attn"], ["cross_attn"]),
        ("attn2", ["self_attn", "ffn"], None),
        *((name, ["self_attn", "ffn"], ["ffn"]) for name in ("mlp", "ff", "ffn", "feed_forward")),
        ("attn", ["spatial_self_attn", "temporal_self_attn", "spatial_cross_attn"],
         ["spatial_self_attn", "temporal_self_attn"]),
        ("mlp", ["temporal_ffn", "notffn"], ["temporal_ffn"]),
        ("attn", ["block"], None),
    ],
)  # fmt: skip
def test_usual_meanings(name: str, kinds: list[str], covered: list[str] | None) -> None:
    layers = layers_of(2, [(f"module{i}", kind) for i, kind in enumerate(kinds)])
    schedule = Schedule(2, {name: Row((True, False))})
    if covered is None:
        with pytest.raises(ScheduleMismatchError, match=f"'{name}' fits no layer"):
            schedule.bind(layers)
    else:
        bound = schedule.bind(layers)
        reused = {layer.kind for layer in layers if not all(bound.rows[layer.path].computed)}
        assert reused == set(covered)


def test_numbered_names_count_blocks_in_order_of_appearance() -> None:
    layers = layers_of(2, DIFFUSERS_NAMES, stack="b") + layers_of(1, DIFFUSERS_NAMES, stack="a")
    bound = unbound(attn_0="#..", attn_1="##.", attn_2="#.#", mlp_2="#..").bind(layers)
    assert drawn(bound) == {
        "b.0.attn1": "#..",
        "b.0.ff": "###",
        "b.1.attn1": "##.",
        "b.1.ff": "###",
        "a.0.attn1": "#.#",
        "a.0.ff": "#..",
    }


def test_everything_that_does_not_map_is_listed() -> None:
    schedule = unbound(attn_0="#.", attn_5="#.", wing="#.", attn2_1="#.")
    with pytest.raises(ScheduleMismatchError) as caught:
        schedule.bind(layers_of(3))
    text = str(caught.value)
    assert "'attn-5' is for block 5, but there are 3" in text
    assert "'wing' fits no layer" in text
    assert "'attn2-1' fits no layer" in text
    assert "'blocks.2'" in text  # has no row
    assert "'self_attn', 'ffn'" in text  # what there is


def test_two_names_for_one_layer_are_refused() -> None:
    with pytest.raises(ScheduleMismatchError, match=r"'attn' and 'attn1' both cover"):
        unbound(attn="#.", attn1="##").bind(layers_of(1, DIFFUSERS_NAMES))
    with pytest.raises(ScheduleMismatchError, match=r"'attn' and 'attn-0' both cover"):
        unbound(attn="#.", attn_0="##").bind(layers_of(1))


def test_a_long_list_of_problems_is_cut() -> None:
    names = {f"wing{letter}": "#." for letter in "abcdefghijkl"}
    with pytest.raises(ScheduleMismatchError, match="and 2 more"):
        unbound(**names).bind(layers_of(1))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ScheduleMismatchError, match="'attn' fits no layer"):
        unbound(attn="#.").bind([])
