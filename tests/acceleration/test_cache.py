"""Calibrations on disk: where they lie, how they are named, and what is done about bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.made_up import calibration_of

import smoothcache as sc
from smoothcache.acceleration import CalibrationCache
from smoothcache.acceleration.cache import default_folder


def made_up() -> sc.Calibration:
    return calibration_of(steps=4)


def test_the_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert default_folder() == tmp_path / "cache"
    monkeypatch.delenv("SMOOTHCACHE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "smoothcache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "smoothcache"


def test_what_is_saved_is_loaded(folder: Path) -> None:
    cache = CalibrationCache()
    assert cache.folder == folder and cache.entries() == () and cache.load("none") is None
    cache.save("a-1", made_up())
    cache.save("a-2", made_up())
    loaded = cache.load("a-1")
    assert loaded is not None and loaded.num_steps == 4
    assert [x.name for x in cache.entries()] == ["a-1", "a-2"]
    assert cache.entry("a-2").nbytes > 0 and cache.entry("a-2").load().num_steps == 4


def test_entries_are_named_by_how_they_begin() -> None:
    cache = CalibrationCache()
    cache.save("ab-1", made_up())
    cache.save("ac-1", made_up())
    assert cache.entry("ab").name == "ab-1"
    with pytest.raises(sc.InvalidArgumentError, match="several"):
        cache.entry("a")
    with pytest.raises(sc.InvalidArgumentError, match="there is no calibration"):
        cache.entry("x")
    with pytest.raises(sc.InvalidArgumentError, match="there is no calibration"):
        cache.entry("")


def test_clearing(folder: Path) -> None:
    cache = CalibrationCache()
    for name in ("a", "b", "c"):
        cache.save(name, made_up())
    (folder / "else.txt").write_text("mine")
    with pytest.raises(sc.InvalidArgumentError):
        cache.clear(["a", "x"])
    assert len(cache.entries()) == 3
    assert [x.name for x in cache.clear(["a"])] == ["a"]
    assert [x.name for x in cache.clear()] == ["b", "c"]
    assert cache.clear() == () and (folder / "else.txt").exists()


def test_a_file_that_is_none_is_told_of(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"nonsense")
    with pytest.warns(sc.SmoothCacheWarning, match="made again"):
        assert CalibrationCache().load("a") is None
    with pytest.raises(sc.FileFormatError):
        CalibrationCache().entry("a").load()


@pytest.mark.parametrize("key", ["", "../a", "a/b"])
def test_keys_that_are_no_names_of_files(key: str) -> None:
    with pytest.raises(sc.FileFormatError):
        CalibrationCache().save(key, made_up())
