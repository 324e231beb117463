"""Schedule: its rules, its file, and whether it fits a model."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from support.golden import assert_golden
from support.made_up import MODEL, layers_of, schedules
from torch import nn

from smoothcache.errors import FileFormatError, InvalidArgumentError, ScheduleMismatchError
from smoothcache.layers.layer import CacheLayer, ModelIdentity
from smoothcache.schedule.expected_cost import compute_fraction
from smoothcache.schedule.row import Row
from smoothcache.schedule.schedule import Schedule

LAYERS = layers_of(2)
EVERY_SECOND = Row((True, False, True, False))
ALL = Row((True,) * 4)


def make(**changes: Any) -> Schedule:
    """Two blocks and four steps; attention the same in both, feed-forward in the first alone."""
    rows = {
        "blocks.0.attn": EVERY_SECOND,
        "blocks.1.attn": EVERY_SECOND,
        "blocks.0.mlp": Row((True, False, False, False), "taylor"),
        "blocks.1.mlp": ALL,
    }
    settings: dict[str, Any] = {
        "num_steps": 4,
        "rows": rows,
        "layers": LAYERS,
        "model": MODEL,
        "solver": "DDIMScheduler",
        "timesteps": (900.0, 600.0, 300.0, 0.5),
        "compute": 0.75,
        "quality": {"psnr": 41.5},
        "provenance": {"planner": "by hand"},
    }
    return Schedule(**{**settings, **changes})


def test_equal_schedules_have_equal_hashes() -> None:
    assert hash(make()) == hash(make())
    assert len({make(), make(), make(compute=0.5), make(solver=None)}) == 3
    assert isinstance(hash(make(layers=None, model=None)), int)


def test_table_follows_the_layers_whatever_the_order_of_rows() -> None:
    expected = [[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]
    schedule = make()
    np.testing.assert_array_equal(schedule.table(), np.array(expected, dtype=bool))
    assert schedule.reused == 7 and not schedule.is_all_compute
    turned = replace(
        schedule, rows={path: schedule.rows[path] for path in reversed([*schedule.rows])}
    )
    assert turned == schedule
    np.testing.assert_array_equal(turned.table(), schedule.table())
    assert make(rows={layer.path: ALL for layer in LAYERS}).is_all_compute


def test_lists_and_numpy_are_taken_but_not_kept() -> None:
    mask = np.array([True, False])
    row = Row(mask)  # type: ignore[arg-type]
    mask[:] = True
    assert row == Row((True, False)) and type(row.computed[0]) is bool
    rows = {"attn": row}
    schedule = Schedule(np.int64(2), rows, timesteps=np.array([2, 1]))  # type: ignore[arg-type]
    rows["mlp"] = row
    assert list(schedule.rows) == ["attn"]
    assert type(schedule.num_steps) is int and schedule.timesteps == (2.0, 1.0)


def test_nothing_can_be_changed() -> None:
    schedule = make()
    with pytest.raises(FrozenInstanceError):
        schedule.num_steps = 5  # type: ignore[misc]
    for mapping in (schedule.rows, schedule.quality, schedule.provenance):
        with pytest.raises(TypeError):
            mapping["blocks.0.attn"] = ALL  # type: ignore[index]


def test_copies_are_equal() -> None:
    schedule = make()
    assert copy.deepcopy(schedule) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("computed", "predictor", "words"),
    [
        ((), "hold", ["step 0"]),
        ((False, True), "hold", ["step 0"]),
        ((1, 0), "hold", ["one per step"]),
        ((True, False), "magic", ["'magic'", "'hold'", "'taylor'"]),
    ],
)
def test_bad_rows(computed: Any, predictor: str, words: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Row(computed, predictor)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_steps": 0}, ["num_steps", "0"]),
        ({"num_steps": True}, ["num_steps", "True"]),
        ({"num_steps": 5}, ["'blocks.0.attn'", "4 steps", "5"]),
        ({"rows": {}}, ["row"]),
        ({"rows": {"blocks.0.attn": (True,) * 4}}, ["'blocks.0.attn'", "Row"]),
        ({"layers": LAYERS[:3]}, ["rows without a layer: 'blocks.1.mlp'"]),
        ({"layers": layers_of(3)}, ["layers without a row: 'blocks.2.attn', 'blocks.2.mlp'"]),
        ({"layers": (*LAYERS, LAYERS[1])}, ["'blocks.0.mlp'", "repeated"]),
        ({"timesteps": (1.0,)}, ["1 timesteps", "4"]),
        ({"timesteps": (1.0, 2.0, 3.0, float("nan"))}, ["timestep", "nan"]),
        ({"compute": 0}, ["compute", "0"]),
        ({"compute": 1.01}, ["compute", "1.01"]),
        ({"compute": float("nan")}, ["compute", "nan"]),
        ({"quality": {"psnr": float("nan")}}, ["quality", "'psnr'"]),
        ({"quality": {"psnr": "high"}}, ["quality", "'psnr'"]),
        ({"provenance": {"alpha": 0.18}}, ["provenance", "'alpha'"]),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make(**changes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_text_draws_each_distinct_row_once() -> None:
    unbound = Schedule(3, {"attn": Row((True, False, True))})
    assert_golden(f"{make()}\n\n{unbound}", "schedule/schedule")


def test_compute_fraction_counts_layers_and_the_rest() -> None:
    layers = (CacheLayer("a", "ffn", "x", 30), CacheLayer("b", "ffn", "x", 50))
    rows = {"a": EVERY_SECOND, "b": Row((True, False, False, False))}
    # Per run: 2 x 30 and 1 x 50 in the layers, 4 x 20 outside of them, of 4 x 100.
    assert compute_fraction(rows, layers, 100) == pytest.approx((60 + 50 + 80) / 400)
    assert compute_fraction({"a": ALL, "b": ALL}, layers, 100) == 1
    assert compute_fraction(rows, layers, 0) is None
    assert compute_fraction(rows, (layers[0], replace(layers[1], macs=None)), 100) is None


def test_uniform_covers_all_layers_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "smoothcache.schedule.schedule.find_layers", lambda model, **_: list(LAYERS)
    )
    monkeypatch.setattr("smoothcache.schedule.schedule.identify", lambda model: MODEL)
    schedule = Schedule.uniform(
        nn.Identity(), num_steps=4, interval=3, predictor="taylor", last=False
    )
    assert schedule == Schedule(
        num_steps=4,
        rows={layer.path: Row((True, False, False, True), "taylor") for layer in LAYERS},
        layers=LAYERS,
        model=MODEL,
        provenance={"planner": "uniform", "interval": "3", "predictor": "taylor", "last": "False"},
    )
    assert Schedule.uniform(nn.Identity(), 4, 1).is_all_compute
    assert Schedule.uniform(nn.Identity(), 4, 9).table().sum() == len(LAYERS)
    assert Schedule.uniform(nn.Identity(), 4, 9, last=True).table().sum() == 2 * len(LAYERS)
    with pytest.raises(InvalidArgumentError, match="'magic'"):
        Schedule.uniform(nn.Identity(), 4, 2, predictor="magic")


def test_bind_keeps_the_schedule_and_takes_order_and_costs() -> None:
    given_layers = [replace(layer, macs=None) for layer in reversed(LAYERS)]
    given_layers[0] = replace(given_layers[0], macs=77)
    bound = make(model=None).bind(given_layers, MODEL)
    assert [layer.path for layer in bound.layers or ()] == [x.path for x in reversed(LAYERS)]
    assert [layer.macs for layer in bound.layers or ()] == [77, 10, 10, 10]
    assert bound.rows == make().rows and bound.model == MODEL
    np.testing.assert_array_equal(bound.table(), make().table()[::-1])


def test_bind_to_the_same_changes_nothing() -> None:
    assert make().bind(LAYERS, MODEL) == make()
    assert make().bind(LAYERS) == make()


@pytest.mark.parametrize(
    "other", [ModelIdentity("OtherDiT", MODEL.fingerprint), replace(MODEL, fingerprint="ff")]
)
def test_bind_refuses_another_model(other: ModelIdentity) -> None:
    with pytest.raises(ScheduleMismatchError) as caught:
        make().bind(LAYERS, other)
    for word in (MODEL.class_name, MODEL.fingerprint, other.class_name, other.fingerprint, "plan"):
        assert word in str(caught.value)


def test_bind_refuses_other_layers_and_lists_them() -> None:
    other = [*layers_of(1, [("attn", "cross_attn")]), *layers_of(9, [("mlp", "ffn")])]
    with pytest.raises(ScheduleMismatchError) as caught:
        make().bind(other, MODEL)
    text = str(caught.value)
    assert "missing from the model: 'blocks.1.attn';" in text
    assert "not in the schedule: 'blocks.2.mlp'" in text and "'blocks.6.mlp' and 2 more" in text
    assert "of another kind: 'blocks.0.attn (cross_attn, planned self_attn)'" in text


@given(schedule=schedules())
def test_save_then_load_is_identity(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule
) -> None:
    path = tmp_path_factory.getbasetemp() / "schedule.json"
    schedule.save(path)
    loaded = Schedule.load(path)
    assert loaded == schedule
    np.testing.assert_array_equal(loaded.table(), schedule.table())


def test_file_is_written_for_people(tmp_path: Path) -> None:
    make().save(tmp_path / "s.json")
    assert (
        (tmp_path / "s.json").read_text()
        == """\
{
  "format": "smoothcache.schedule",
  "version": 1,
  "num_steps": 4,
  "model": {"class_name": "ToyDiT", "fingerprint": "0123456789abcdef"},
  "solver": "DDIMScheduler",
  "timesteps": [900.0, 600.0, 300.0, 0.5],
  "compute": 0.75,
  "quality": {"psnr": 41.5},
  "provenance": {"planner": "by hand"},
  "layers": [
    {"path": "blocks.0.attn", "kind": "self_attn", "block": "blocks.0", "macs": 10},
    {"path": "blocks.0.mlp", "kind": "ffn", "block": "blocks.0", "macs": 10},
    {"path": "blocks.1.attn", "kind": "self_attn", "block": "blocks.1", "macs": 10},
    {"path": "blocks.1.mlp", "kind": "ffn", "block": "blocks.1", "macs": 10}
  ],
  "rows": [
    {"kind": "self_attn", "predictor": "hold", "compute_steps": [0, 2]},
    {"layer": "blocks.0.mlp", "predictor": "taylor", "compute_steps": [0]},
    {"layer": "blocks.1.mlp", "predictor": "hold", "compute_steps": [0, 1, 2, 3]}
  ]
}
"""
    )


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A schedule file after an edit by hand."""
    make().save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def test_order_of_keys_does_not_matter(tmp_path: Path) -> None:
    def turn(document: dict[str, Any]) -> None:
        items = list(reversed(document.items()))
        document.clear()
        document.update(items)
        document["rows"].reverse()

    assert Schedule.load(rewrite(tmp_path / "s.json", turn)) == make()


def set_(*keys: Any, to: Any) -> Callable[[dict[str, Any]], object]:
    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = to

    return change


def drop(*keys: Any) -> Callable[[dict[str, Any]], object]:
    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_("version", to=2), ["newer smoothcache", "Upgrade"]),
        (set_("version", to=True), ["version", "integer"]),
        (set_("version", to=0), ["version", "0"]),
        (drop("version"), ["'version'", "missing"]),
        (set_("format", to="smoothcache.calibration"), ["smoothcache.calibration"]),
        (drop("format"), ["'smoothcache.schedule'", "none"]),
        (set_("speed", to=2), ["'speed'", "unknown"]),
        (drop("solver"), ["'solver'", "missing"]),
        (set_("num_steps", to="4"), ["num_steps", "integer"]),
        (set_("num_steps", to=3), ["rows[2].compute_steps[3]", "step 3", "0 to 2"]),
        (drop("timesteps", 0), ["3 timesteps", "4 steps"]),
        (set_("num_steps", to=0), ["num_steps", "0"]),
        (set_("compute", to=1.5), ["compute", "1.5"]),
        (set_("compute", to=False), ["compute", "number"]),
        (set_("timesteps", 2, to=None), ["timesteps[2]", "null"]),
        (set_("solver", to=7), ["solver", "string"]),
        (set_("model", to="ToyDiT"), ["model", "object"]),
        (drop("model", "fingerprint"), ["model", "'fingerprint'"]),
        (set_("quality", "psnr", to="good"), ["quality.psnr", "number"]),
        (set_("provenance", "planner", to=[]), ["provenance.planner", "string"]),
        (set_("layers", 1, "macs", to=-5), ["layers[1].macs", "-5"]),
        (set_("layers", 1, "size", to=5), ["layers[1]", "'size'"]),
        (set_("layers", 1, "path", to="blocks.0.attn"), ["rows[1]", "'blocks.0.mlp'"]),
        (drop("layers", 3), ["rows[2]", "path 'blocks.1.mlp'"]),
        (set_("rows", to={}), ["rows", "list"]),
        (set_("rows", 0, to="all"), ["rows[0]", "object"]),
        (set_("rows", 0, "kind", to="cross_attn"), ["rows[0]", "kind 'cross_attn'"]),
        (set_("rows", 1, "layer", to="blocks.7.mlp"), ["rows[1]", "path 'blocks.7.mlp'"]),
        (set_("rows", 1, "kind", to="ffn"), ["rows[1]", "exactly one", "'kind', 'layer'"]),
        (drop("rows", 1, "layer"), ["rows[1]", "exactly one"]),
        (drop("rows", 1), ["rows", "'blocks.0.mlp'", "no row"]),
        (drop("rows", 0), ["rows", "'blocks.0.attn', 'blocks.1.attn'"]),
        (lambda d: d["rows"].append(d["rows"][0]), ["rows[3]", "'blocks.0.attn' already"]),
        (
            lambda d: d["rows"].append({**d["rows"][1], "layer": "blocks.1.attn"}),
            ["rows[3]", "'blocks.1.attn' already"],
        ),
        (set_("rows", 1, "predictor", to="magic"), ["rows[1].predictor", "'magic'", "'hold'"]),
        (drop("rows", 1, "predictor"), ["rows[1]", "'predictor'"]),
        (set_("rows", 1, "note", to="x"), ["rows[1]", "'note'"]),
        (set_("rows", 0, "compute_steps", to=[0, 4]), ["rows[0].compute_steps[1]", "0 to 3"]),
        (set_("rows", 0, "compute_steps", to=[0, -1]), ["rows[0].compute_steps[1]", "-1"]),
        (set_("rows", 0, "compute_steps", to=[0, 2, 2]), ["rows[0].compute_steps[2]", "step 2"]),
        (
            set_("rows", 0, "compute_steps", to=[0, 3, 1]),
            ["rows[0].compute_steps[2]", "increasing"],
        ),
        (set_("rows", 0, "compute_steps", to=[1, 2]), ["rows[0].compute_steps[0]", "step 0"]),
        (set_("rows", 0, "compute_steps", to=[]), ["rows[0]", "step 0"]),
        (set_("rows", 0, "compute_steps", to=[0, 1.0]), ["rows[0].compute_steps[1]", "integer"]),
        (set_("rows", 0, "compute_steps", to=[0, True]), ["rows[0].compute_steps[1]", "integer"]),
        (set_("rows", 0, "compute_steps", to="all"), ["rows[0].compute_steps", "list"]),
        (set_("layers", to=None), ["rows[0]", "'name'"]),
    ],
)
def test_edited_files_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    path = rewrite(tmp_path / "s.json", change)
    with pytest.raises(FileFormatError) as caught:
        Schedule.load(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_every_truncation_is_refused(tmp_path: Path, layers: Any) -> None:
    path = tmp_path / "s.json"
    (make() if layers else Schedule(2, {"attn": Row((True, False))})).save(path)
    content = path.read_bytes()
    for length in range(len(content) - 2):
        path.write_bytes(content[:length])
        with pytest.raises(FileFormatError, match="cut short"):
            Schedule.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\xfa",
        b"[" * 100_000,
        b"[1, 2]",
        b'"schedule"',
        b"null",
        b'{"compute": NaN}',
        b'{"version": 1, "version": 1}',
        b'{"_class_name": "DiT", "sizes": {"hidden": 4}}',
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"s\.json"):
        Schedule.load(tmp_path / "s.json")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Schedule.load(tmp_path / "nowhere.json")
