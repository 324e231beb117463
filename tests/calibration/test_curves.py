"""Calibration: its curves, its validation, and its file."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from safetensors import safe_open
from safetensors.numpy import save_file
from support.golden import assert_golden
from support.made_up import calibration_of, calibrations, errors_of, layers_of

from smoothcache.calibration.curves import Calibration
from smoothcache.calibration.statistics import student_t_95
from smoothcache.errors import FileFormatError, InvalidArgumentError

rng = np.random.default_rng(0)


def test_properties_describe_the_table() -> None:
    calibration = calibration_of(samples=4, layers=layers_of(3), max_gap=2, steps=5)
    assert (calibration.num_samples, calibration.max_gap, calibration.num_steps) == (4, 2, 5)
    assert calibration.kinds == ("self_attn", "ffn")
    assert calibration.blocks == ("blocks.0", "blocks.1", "blocks.2")


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        ({}, [0, 1, 2, 3]),
        ({"kind": "ffn"}, [1, 3]),
        ({"block": "blocks.1"}, [2, 3]),
        ({"kind": "ffn", "block": "blocks.1"}, [3]),
        ({"layer": "blocks.1.attn"}, [2]),
    ],
)
def test_curve_averages_exactly_the_chosen_layers(choice: dict[str, str], meant: list[int]) -> None:
    values = rng.random((3, 4, 3, 8))
    curve = calibration_of(values, samples=3).curve(gap=2, **choice)
    for step in range(8):
        chosen = [values[i, layer, 1, step] for i in range(3) for layer in meant]
        expected = sum(chosen) / len(chosen) if step >= 2 else np.nan
        np.testing.assert_allclose(curve.mean[step], expected)


def test_interval_is_student_t_over_samples() -> None:
    # Three samples whose means over the two chosen layers are 1, 2 and 3: the standard error is
    # 1 / sqrt(3) and Student's t of 2 degrees of freedom reaches 4.302653 of them.
    values = (
        np.array([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1) + np.array([-0.5, 0.5] * 2)[:, None, None]
    )
    curve = calibration_of(values, samples=3).curve(gap=1, kind="ffn")
    np.testing.assert_allclose(curve.mean[1:], 2.5)
    np.testing.assert_allclose(curve.high[1:] - curve.mean[1:], 4.302653 / np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(curve.mean - curve.low, curve.high - curve.mean)
    both = calibration_of(values, samples=3).curve(gap=1)
    np.testing.assert_allclose(both.mean[1:], 2.0)
    np.testing.assert_allclose(both.high[1:], 2 + 4.302653 / np.sqrt(3), rtol=1e-6)


def test_one_sample_has_no_interval() -> None:
    curve = calibration_of(samples=1).curve(gap=1)
    assert np.isnan(curve.low).all() and np.isnan(curve.high).all()
    assert np.isfinite(curve.mean[1:]).all()


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706205), (4, 2.776445), (9, 2.262157), (1000, 1.962339)]
)
def test_student_t_as_tabulated(degrees: int, quantile: float) -> None:
    assert student_t_95(degrees) == pytest.approx(quantile, abs=1e-6)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"gap": 4}, ["gap 4", "3"]),
        ({"gap": 0}, ["gap", "0"]),
        ({"gap": True}, ["gap", "True"]),
        ({"gap": 1, "kind": "attn"}, ["'attn'", "'self_attn'", "'ffn'"]),
        ({"gap": 1, "layer": "blocks.9.attn"}, ["'blocks.9.attn'", "'blocks.0.attn'"]),
        ({"gap": 1, "block": "blocks.9"}, ["'blocks.9'", "'blocks.0'"]),
        ({"gap": 1, "layer": "blocks.0.attn", "kind": "self_attn"}, ["combined"]),
    ],
)
def test_unknown_curves_are_refused_with_what_exists(
    choice: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        calibration_of().curve(**choice)
    assert all(word in str(caught.value) for word in words)


def test_kind_that_a_block_lacks_is_refused() -> None:
    layers = layers_of(1) + layers_of(1, [("ff", "ffn")], stack="single")
    with pytest.raises(InvalidArgumentError, match=r"'single.0'.*'self_attn'.*only 'ffn'"):
        calibration_of(layers=layers).curve(gap=1, kind="self_attn", block="single.0")


def test_text_tells_the_essentials() -> None:
    several = calibration_of(samples=4, layers=layers_of(2))
    unknown = calibration_of(steps=1, model=None, total_macs=0)
    texts = (several, several.resample(12), unknown)
    assert_golden("\n\n".join(map(str, texts)), "calibration/calibration")


def with_error(value: float, index: tuple[int, int, int, int]) -> np.ndarray[Any, Any]:
    errors = errors_of(0.1, 2, 4, 3, 8)
    errors[index] = value
    return errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"errors": with_error(np.nan, (1, 2, 0, 5))}, ["errors[1, 2, 0, 5]", "nan"]),
        ({"errors": with_error(np.inf, (1, 2, 0, 5))}, ["errors[1, 2, 0, 5]", "inf"]),
        ({"errors": with_error(-0.5, (0, 0, 2, 3))}, ["errors[0, 0, 2, 3]", "-0.5"]),
        ({"errors": with_error(0.5, (0, 0, 2, 2))}, ["errors[0, 0, 2, 2]", "0.5"]),
        ({"errors": errors_of(0.1, 2, 3, 3, 8)}, ["(2, 3, 3, 8)", "4 layers"]),
        ({"errors": errors_of(0.1, 2, 4, 3, 7)}, ["(2, 4, 3, 7)", "8 steps"]),
        ({"errors": errors_of(0.1, 2, 4, 3, 8)[0]}, ["(4, 3, 8)"]),
        ({"errors": errors_of(0.1, 2, 4, 3, 8)[:0]}, ["(0, 4, 3, 8)"]),
        ({"errors": "none"}, ["errors"]),
        ({"layers": (*layers_of(2)[:3], layers_of(2)[0])}, ["'blocks.0.attn'", "repeated"]),
        ({"total_macs": 39}, ["40", "39"]),
        ({"total_macs": -1}, ["total_macs"]),
        ({"total_macs": 1.5}, ["total_macs"]),
        ({"timesteps": (np.nan,) * 8}, ["timestep"]),
        ({"peak_bytes": -1}, ["peak_bytes"]),
        ({"tokens": 0}, ["tokens"]),
        ({"provenance": {"created": 2026}}, ["provenance", "2026"]),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        replace(calibration_of(), **change)
    assert all(word in str(caught.value) for word in words), caught.value


def test_table_is_a_read_only_copy() -> None:
    errors = errors_of(0.1, 2, 4, 3, 8)
    calibration = replace(calibration_of(), errors=errors)
    errors[:] = 7.0
    assert calibration.errors[0, 0, 0, 1] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        calibration.errors[0, 0, 0, 1] = 1.0


def assert_equal(left: Calibration, right: Calibration) -> None:
    np.testing.assert_array_equal(left.errors, right.errors)
    left_rest, right_rest = ({**vars(x), "errors": None} for x in (left, right))
    assert left_rest == right_rest


@given(calibration=calibrations())
def test_save_then_load_is_identity(
    tmp_path_factory: pytest.TempPathFactory, calibration: Calibration
) -> None:
    path = tmp_path_factory.getbasetemp() / "calibration.safetensors"
    calibration.save(path)
    assert_equal(Calibration.load(path), calibration)


def test_every_field_survives_the_file(tmp_path: Path) -> None:
    calibration = calibration_of(
        layers=(*layers_of(1), *layers_of(1, macs=None, stack="më")),
        solver="DDIMScheduler",
        peak_bytes=12,
        tokens=64,
        provenance={"created": "2026-01-01"},
    )
    for each in (calibration, replace(calibration, model=None, solver=None, tokens=None)):
        each.save(tmp_path / "c.safetensors")
        assert_equal(Calibration.load(str(tmp_path / "c.safetensors")), each)


def damaged(path: Path, **changes: Any) -> Path:
    """Rewrites the document in a calibration file; a field set to `...` is removed."""
    with safe_open(path, framework="np") as file:
        document = json.loads(file.metadata()["smoothcache"])
        errors = file.get_tensor("errors")
    document = {k: v for k, v in {**document, **changes}.items() if v is not ...}
    save_file({"errors": errors}, path, {"smoothcache": json.dumps(document)})
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    calibration_of().save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "smoothcache.schedule"}, ["smoothcache.calibration", "smoothcache.schedule"]),
        ({"format": ...}, ["smoothcache.calibration", "none"]),
        ({"version": 2, "layers": ...}, ["newer smoothcache", "2", "Upgrade"]),
        ({"version": "1"}, ["version", "integer"]),
        ({"version": ...}, ["version", "missing"]),
        ({"total_macs": ...}, ["'total_macs'", "missing"]),
        ({"colour": "red"}, ["'colour'", "unknown"]),
        ({"total_macs": 100.0}, ["total_macs", "integer"]),
        ({"total_macs": True}, ["total_macs", "integer"]),
        ({"peak_bytes": -1}, ["peak_bytes"]),
        ({"timesteps": [1.0, "x"]}, ["timesteps[1]", "number"]),
        ({"timesteps": [1.0]}, ["(2, 4, 3, 8)", "1 steps"]),
        ({"layers": {}}, ["layers", "list"]),
        ({"layers": [{"path": "a"}]}, ["layers[0]", "'kind'"]),
        ({"model": {"class_name": "X", "fingerprint": 5}}, ["model.fingerprint", "string"]),
        ({"provenance": ["x"]}, ["provenance", "object"]),
        ({"tokens": 0}, ["tokens"]),
    ],
)
def test_damaged_documents_are_refused(
    saved: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(FileFormatError) as caught:
        Calibration.load(damaged(saved, **changes))
    assert all(word in str(caught.value) for word in [str(saved), *words]), caught.value


def test_unchanged_rewrite_is_accepted(saved: Path) -> None:
    assert_equal(Calibration.load(damaged(saved)), calibration_of())


@pytest.mark.parametrize("keep", [0, 4, 100, 1000, -1])
def test_truncated_files_are_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match="cut short"):
        Calibration.load(saved)


@pytest.mark.parametrize("content", [b"{}", b"\x80\x04]\x94.", pickle.dumps([1, 2]), b"x" * 500])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        Calibration.load(path)


def test_other_safetensors_files_are_refused(saved: Path) -> None:
    with safe_open(saved, framework="np") as file:
        metadata, errors = file.metadata(), file.get_tensor("errors")
    for tensors, data in [
        ({"weight": errors}, {"format": "pt"}),
        ({"errors": errors}, None),
        ({"errors": errors, "more": errors}, metadata),
        ({"weight": errors}, metadata),
    ]:
        save_file(tensors, saved, data)
        with pytest.raises(FileFormatError, match="not a calibration"):
            Calibration.load(saved)
    save_file({"errors": errors.astype(np.float32)}, saved, metadata)
    with pytest.raises(FileFormatError, match="float32"):
        Calibration.load(saved)
    save_file({"errors": errors}, saved, {"smoothcache": metadata["smoothcache"][:-5]})
    with pytest.raises(FileFormatError, match="not valid JSON"):
        Calibration.load(saved)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        Calibration.load(tmp_path / "nowhere.safetensors")


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="full"):
        calibration_of(0.9).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_saving_into_a_missing_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        calibration_of().save(tmp_path / "nowhere" / "c.safetensors")
