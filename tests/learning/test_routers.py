"""Routers: their validation, their file, and the schedules that are planned from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from support.golden import assert_golden
from support.made_up import MODEL, calibration_of, layers_of

from smoothcache import FileFormatError, InvalidArgumentError, Routers, Schedule, plan_learned
from smoothcache.steps.predictors import PREDICTORS


def routers_of(values: Any = 0.5, *, steps: int = 8, interval: int = 2, **others: Any) -> Routers:
    """Routers of two blocks whose free values are `values`."""
    layers = others.pop("layers", layers_of(2))
    table = np.array(np.broadcast_to(values, (len(layers), steps)), dtype=np.float64)
    table[:, ::interval] = 1
    known = {
        "timesteps": tuple(float(1000 - 10 * step) for step in range(steps)),
        "total_macs": 100,
        "model": MODEL,
        "provenance": {"created": "today"},
        **others,
    }
    return Routers(layers, table, interval, **known)


@st.composite
def some_routers(draw: st.DrawFn) -> Routers:
    steps, interval = draw(st.integers(2, 9)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.integers(0, 11, (4, steps)) / 10  # with ties, zeros and ones
    predictor = draw(st.sampled_from([name for name, x in PREDICTORS.items() if x.axis == "step"]))
    return routers_of(values, steps=steps, interval=interval, predictor=predictor)


def assert_equal(a: Routers, b: Routers) -> None:
    assert np.array_equal(a.values, b.values)
    for name in set(Routers.__dataclass_fields__) - {"values"}:
        assert getattr(a, name) == getattr(b, name), name


def test_values_are_a_read_only_copy() -> None:
    table = np.ones((4, 8))
    routers = Routers(layers_of(2), table, 2, timesteps=range(8))  # type: ignore[arg-type]
    table[0, 1] = 0
    assert routers.values[0, 1] == 1
    with pytest.raises(ValueError, match="read-only"):
        routers.values[0, 1] = 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": 1.5}, r"values\[0, 1\] is 1.5, expected a number in \[0, 1\]"),
        ({"values": -0.5}, r"values\[0, 1\] is -0.5"),
        ({"values": np.nan}, r"values\[0, 1\] is nan"),
        ({"interval": 1}, "interval must be an integer of at least 2"),
        ({"predictor": "spline"}, "predictor 'spline' is unknown.*hold"),
        ({"total_macs": -1}, "total_macs"),
        ({"timesteps": (1.0,)}, r"shape \(4, 8\).*4 layers and 1 steps"),
        ({"timesteps": (float("nan"),) * 8}, "a timestep must be a finite number"),
        ({"layers": (*layers_of(1), *layers_of(1))}, "layers are repeated"),
        ({"provenance": {"a": 1}}, "provenance maps strings"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        routers_of(**change)


def test_a_step_that_computes_everything_has_no_router() -> None:
    table = np.full((4, 8), 0.5)
    with pytest.raises(InvalidArgumentError, match=r"values\[0, 0\] is 0.5.*\(0, 2, 4"):
        Routers(layers_of(2), table, 2, timesteps=range(8))  # type: ignore[arg-type]


@pytest.mark.parametrize("values", ["many", [[1, 2], [3]], np.ones(8), np.ones((0, 8))])
def test_what_is_no_table_is_refused(values: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"values (is not an array|has the shape)"):
        Routers(layers_of(2), values, 2, timesteps=range(8))  # type: ignore[arg-type]


def test_the_text_tells_what_was_learned() -> None:
    texts = [str(routers_of(0.25, interval=interval)) for interval in (2, 3, 4)]
    assert_golden("\n\n".join(texts), "learning/routers")


@given(routers=some_routers())
def test_saving_and_loading_is_the_identity(
    routers: Routers, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("routers") / "r.safetensors"
    routers.save(path)
    assert_equal(Routers.load(path), routers)


def damaged(path: Path, old: str, new: str) -> Path:
    with safe_open(path, framework="np") as file:
        metadata, values = file.metadata(), file.get_tensor("values")
    assert old in metadata["smoothcache"]
    save_file({"values": values}, path, {"smoothcache": metadata["smoothcache"].replace(old, new)})
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"interval": 2', '"interval": "2"', "interval: expected an integer"),
        ('"interval": 2', '"interval": 3', r"values\[0, 3\] is 0.5"),
        ('"interval": 2, ', "", "'interval' is missing"),
        ('"predictor": "hold"', '"predictor": "x"', "predictor 'x' is unknown"),
        ('"version": 1', '"version": 2', "newer smoothcache"),
        ("smoothcache.routers", "smoothcache.calibration", "expected a file of the format"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    routers_of().save(tmp_path / "r.safetensors")
    with pytest.raises(FileFormatError, match=words):
        Routers.load(damaged(tmp_path / "r.safetensors", old, new))


def test_a_calibration_is_no_file_of_routers(tmp_path: Path) -> None:
    calibration_of().save(tmp_path / "c.safetensors")
    with pytest.raises(FileFormatError, match="not a routers file"):
        Routers.load(tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Routers.load(tmp_path / "nowhere")


def all_thresholds(routers: Routers) -> list[Schedule]:
    values = sorted({0.0, *routers.values.flatten()} - {1.0})
    return [plan_learned(routers, threshold=value) for value in values]


@given(routers=some_routers(), threshold=st.floats(0, 1, exclude_max=True))
def test_a_layer_is_computed_above_the_threshold(routers: Routers, threshold: float) -> None:
    schedule = plan_learned(routers, threshold=threshold)
    assert np.array_equal(schedule.table(), routers.values > threshold)
    assert schedule.table()[:, :: routers.interval].all()
    assert (schedule.layers, schedule.model) == (routers.layers, routers.model)
    assert schedule.timesteps == routers.timesteps
    reused = 10 * schedule.reused
    assert schedule.compute == pytest.approx(1 - reused / (100 * routers.num_steps))
    assert {row.predictor for row in schedule.rows.values()} == {routers.predictor}
    assert "not training-free" in schedule.provenance["planner"]
    assert schedule.provenance["routers created"] == "today"


@given(routers=some_routers(), budget=st.floats(0.3, 1))
def test_a_budget_is_spent_but_never_exceeded(routers: Routers, budget: float) -> None:
    """Against all thresholds that there are."""
    affordable = [x for x in all_thresholds(routers) if x.compute is not None]
    affordable = [x for x in affordable if (x.compute or 1) <= budget]
    if not affordable:
        with pytest.raises(InvalidArgumentError, match=r"no threshold is as cheap.*interval above"):
            plan_learned(routers, compute=budget)
        return
    schedule = plan_learned(routers, compute=budget)
    assert schedule.compute is not None and schedule.compute <= budget
    assert schedule.compute == max(x.compute or 1 for x in affordable)


def test_another_predictor_may_be_asked_for() -> None:
    schedule = plan_learned(routers_of(), threshold=0.5, predictor="taylor")
    assert {row.predictor for row in schedule.rows.values()} == {"taylor"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one of threshold and compute"),
        ({"threshold": 0.5, "compute": 0.5}, "exactly one of threshold and compute"),
        ({"threshold": 1}, r"threshold must be in \[0, 1\), got 1"),
        ({"threshold": -0.1}, "threshold must be in"),
        ({"threshold": "0.5"}, "threshold must be a finite number"),
        ({"compute": 0}, r"compute must be in \(0, 1\], got 0"),
        ({"compute": 1.5}, "compute must be in"),
        ({"compute": True}, "compute must be a finite number"),
        ({"compute": 0.5, "predictor": "spline"}, "predictor 'spline' is unknown; known pre"),
    ],
)
def test_arguments_without_sense_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        plan_learned(routers_of(), **arguments)


@pytest.mark.parametrize("others", [{"total_macs": 0}, {"layers": layers_of(2, macs=None)}])
def test_without_costs_only_a_threshold_can_be_planned_for(others: dict[str, Any]) -> None:
    routers = routers_of(**others)
    assert plan_learned(routers, threshold=0.5).compute is None
    with pytest.raises(InvalidArgumentError, match="pass a threshold"):
        plan_learned(routers, compute=0.8)
