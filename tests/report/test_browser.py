"""Reports in a real browser: nothing asked for, nothing complained of, usable by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Tab, browser, chromium
from support.pages import HOSTILE, calibration, comparison, schedules

from smoothcache.report import comparison_page, environment, write_page

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
NAME = "every 2nd step, extrapolated"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    for kind in ("image", "video", "audio"):
        for name, file in ((NAME, f"{kind}.html"), (HOSTILE, f"{kind}-hostile.html")):
            page = comparison_page(
                comparison(kind, name),
                title="A report",
                schedules=schedules(name),
                calibration=calibration(name),
                sampling_rate=8000,
                inputs=[name],
                environment=environment(),
                command=f"smoothcache compare {name}",
            )
            write_page(page, folder / file)
    return folder


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("file", ["image", "video", "audio", "image-hostile", "audio-hostile"])
def test_nothing_is_asked_for_and_nothing_overflows(
    tab: Tab, folder: Path, file: str, width: int
) -> None:
    tab.open(folder / f"{file}.html", width=width, dark=width < 500)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.images].every(x => x.complete && x.naturalWidth > 0)")
    tab.screenshot(shot := folder / f"{file}-{width}.png")
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 20_000
    assert tab.complaints() == []
    assert tab.requests() <= {"file", "data"}
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") is (width > 500)


def test_a_slider_moves_by_keyboard_and_another_way_is_shown(tab: Tab, folder: Path) -> None:
    tab.open(folder / "image.html", width=1200)
    share = "document.querySelector('[data-slider]').style.getPropertyValue('--share')"
    tab.evaluate("document.querySelector('[data-slider] input').focus()")
    assert tab.evaluate(share) == "50%"
    tab.press("ArrowRight", 39)
    assert tab.evaluate(share) == "51%"
    shown = "document.querySelector('[data-slider] .after:not([hidden]) img').alt"
    first = tab.evaluate(shown)
    tab.evaluate("document.querySelector('[data-choose]').focus()")
    tab.press("ArrowDown", 40)
    tab.wait(f"{shown} !== {first!r}")
    assert "6 steps" in tab.evaluate(
        "(() => { const x = document.querySelector('[data-choose]'); x.value = '2';"
        " x.dispatchEvent(new Event('change')); return " + shown + "})()"
    )


def test_a_point_tells_its_values_when_it_is_focused(tab: Tab, folder: Path) -> None:
    tab.open(folder / "image.html", width=390)
    tab.evaluate("document.querySelector('.point').focus()")
    assert "compute 50.0 %" in tab.evaluate("document.getElementById('tip').textContent")
    assert tab.evaluate("document.getElementById('tip').hidden") is False
    place = "document.getElementById('tip').getBoundingClientRect()"
    assert tab.evaluate(f"{place}.right") <= 390 and tab.evaluate(f"{place}.left") >= 0
    tab.press("Escape", 27)
    assert tab.evaluate("document.getElementById('tip').hidden") is True


def test_videos_play_and_can_be_sought(tab: Tab, folder: Path) -> None:
    tab.open(folder / "video.html", width=1200)
    tab.wait("[...document.querySelectorAll('video')].every(x => x.readyState > 0)")
    video = "document.querySelector('video')"
    assert tab.evaluate(f"{video}.duration") == pytest.approx(5 / 6, abs=0.01)
    assert tab.evaluate(f"[{video}.videoWidth, {video}.videoHeight]") == [192, 192]
    tab.evaluate(f"{video}.currentTime = 0.6")
    tab.wait(f"!{video}.seeking && {video}.readyState >= 2")
    assert tab.evaluate(f"{video}.error") is None
    tab.evaluate("document.querySelector('[data-play]').click()")
    tab.wait(f"!{video}.paused && {video}.currentTime > 0.1")
    assert tab.evaluate("document.querySelector('[data-play]').textContent") == "Stop"


def test_sounds_can_be_played(tab: Tab, folder: Path) -> None:
    tab.open(folder / "audio.html", width=1200)
    tab.wait("[...document.querySelectorAll('audio')].every(x => x.readyState > 0)")
    assert tab.evaluate("document.querySelector('audio').duration") == pytest.approx(
        0.512, abs=0.01
    )
    assert tab.complaints() == []
