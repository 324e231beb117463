"""Reports: well-formed, self-contained, escaped, readable; what each page says."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from support.made_up import layers_of
from support.markup import Document
from support.pages import HOSTILE, calibration, comparison, samples, schedules

from smoothcache import InvalidArgumentError, MissingPackageError, Row, SearchedSchedule
from smoothcache.comparison.benchmark import Benchmark
from smoothcache.metrics.report import Report, ReportRow
from smoothcache.report import (
    Page,
    benchmark_page,
    comparison_page,
    environment,
    search_page,
    table_page,
    write_page,
)
from smoothcache.report import page as page_module
from smoothcache.searching.result import Measured, SearchResult

ADDRESSES = {"src", "href", "xlink:href", "poster", "srcset", "action", "data"}


def full_page(kind: str = "image", name: str = "every 2nd step") -> Page:
    return comparison_page(
        comparison(kind, name),
        title=name,
        subtitle=name,
        schedules=schedules(name),
        calibration=calibration(name),
        sampling_rate=8000,
        inputs=[name],
        environment={name: name, **environment()},
        command=name,
    )


def searched_page(name: str = "found") -> Page:
    best = Measured(name, 0.5, 0.1, 0.2)
    rows = (Measured(f"6 steps of {name}", 0.5, 0.2, 0.3), Measured("5 steps", 0.4, 0.3, 0.3))
    result = SearchResult(best, rows, (best,), 3, 2.0, f"the schedule pays off: {name}")
    return search_page(SearchedSchedule(4, {name: Row.uniform(4, 2)}, result=result), title=name)


def benchmarked_page(name: str = "FORA") -> Page:
    rows = [ReportRow("uncached", family="uncached", compute=1.0, time=1.0, psnr=math.inf)]
    rows += [
        ReportRow(f"{name} {i}", family=family, compute=0.5 / i, psnr=40.0 / i, time=0.6 / i)
        for family in (name, "fewer steps")
        for i in (1, 2)
    ]
    rows = [row for i, row in enumerate(rows) if i < 3] + [
        ReportRow("6 steps", family="fewer steps", compute=0.5, psnr=30.0, time=0.5)
    ]
    return benchmark_page(Benchmark(name, tuple(rows), {name: name}, {name: name}, {}), title=name)


def evaluated_page(name: str = "a") -> Page:
    report = Report((ReportRow(name, compute=0.5, psnr=30.0),), name, (name,))
    return table_page(
        report,
        title=name,
        verdict=name,
        samples={name: samples("image", 0), f"{name} 2": samples("image", 1)},
    )


PAGES = {
    "images": lambda name: full_page("image", name),
    "clips": lambda name: full_page("video", name),
    "sounds": lambda name: full_page("audio", name),
    "search": searched_page,
    "benchmark": benchmarked_page,
    "evaluation": evaluated_page,
    "nothing": lambda name: Page(name, name),
}


@pytest.mark.parametrize("name", ["every 2nd step", HOSTILE], ids=["plain", "hostile"])
@pytest.mark.parametrize("kind", list(PAGES))
def test_pages_are_well_formed_self_contained_and_escaped(kind: str, name: str) -> None:
    html = PAGES[kind](name).to_html()
    document = Document(html)
    identifiers = [x["id"] for _, x in document.elements if x.get("id")]
    assert len(set(identifiers)) == len(identifiers), "an identifier comes twice"
    for tag, attributes in document.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), f"{tag} has a handler {key}"
            if key in ADDRESSES:
                assert value and value.startswith(("data:", "#")), f"{tag} {key}={value[:80]}"
        assert tag not in ("iframe", "object", "embed", "base", "form")
        if tag == "img":
            assert attributes.get("alt")
        if tag in ("video", "audio", "input", "select"):
            labelled = attributes.get("aria-label") or f'for="{attributes.get("id")}"' in html
            assert labelled, f"{tag} has no name"
    referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', html))
    assert referred <= set(identifiers)
    assert not re.search(r"url\((?!#)", html) and "@import" not in html
    assert [tag for tag, _ in document.elements].count("script") == 1
    assert [tag for tag, _ in document.elements].count("h1") == 1
    assert (
        "<script>alert" not in html and "49" not in document.text.partition("Environment")[0][:80]
    )
    if kind != "nothing" or name != HOSTILE:
        assert name in document.text


def test_the_policy_forbids_all_but_the_own_script() -> None:
    html = full_page().to_html()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy and policy[1].startswith("default-src 'none'; img-src data:; media-src data:;")
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy[1]
    assert "://" not in re.sub(r"data:[^\"]+", "", html)


def test_the_summary_comes_first_and_is_of_the_best_schedule() -> None:
    made = comparison()
    page = full_page()
    best = max(made.duels(), key=lambda duel: duel.gain)
    row = made.row(best.name)
    assert [fact.label for fact in page.facts] == [
        "speed-up",
        "compute",
        "PSNR",
        "over fewer steps",
    ]
    assert page.facts[0].value == f"{1 / row.time:.2f} ×" and row.name in page.facts[0].note
    assert page.verdict == made.verdict()[-1] and page.tone == "good"
    html = page.to_html()
    places = [html.index(x) for x in (page.facts[0].value, "verdict good", "<h2>", "<table>")]
    assert places == sorted(places)


def test_a_comparison_in_which_fewer_steps_win_says_so() -> None:
    made = comparison()
    images = dict(made.images)
    images["6 steps"] = images["uncached"]
    lost = type(made)(made.rows, images, made.rivals)
    page = comparison_page(lost)
    assert page.tone == "bad" and "Use fewer steps instead" in page.verdict


def test_media_of_each_kind() -> None:
    image, clip, sound = (full_page(kind).to_html() for kind in ("image", "video", "audio"))
    assert image.count('type="range"') == 3 and image.count("data:image/") == 3 * 4
    assert clip.count("data:video/webm") == 2 * 4 and clip.count("<video") == 2 * 4
    assert sound.count("data:audio/wav") == 2 * 4 and sound.count("Log-mel spectrogram") == 2 * 4
    without = comparison_page(comparison("audio"))
    assert not [x for x in without.sections if x.kind == "samples"], "no rate, no sounds"


def test_a_page_carries_no_more_samples_than_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smoothcache.report.pages.MOST_CHARACTERS", 1)
    html = full_page().to_html()
    assert html.count('type="range"') == 1 and "1 of 3 samples" in html


def test_points_tell_their_values() -> None:
    html = full_page().to_html()
    tips = re.findall(r'data-tip="([^"]+)"', html)
    assert len(tips) == 3 and any(x.startswith("α = 0.2: steps 12, compute 50.0 %") for x in tips)
    assert html.count('tabindex="0" role="img"') == 3


def test_long_schedules_are_cut() -> None:
    from smoothcache import Schedule
    from smoothcache.schedule.html import MOST_ROWS, schedule_map

    layers = layers_of(60)
    rows = {x.path: Row.uniform(200, 2 + i) for i, x in enumerate(layers)}
    drawn = schedule_map(Schedule(200, rows, layers))
    assert drawn.count("sc-row") == MOST_ROWS and f"and {120 - MOST_ROWS} more rows" in drawn


def test_a_benchmark_names_the_best_at_each_cost() -> None:
    page = benchmarked_page()
    assert page.facts[0].value == "FORA 1" and page.tone == "good"
    assert "closest to the uncached samples at 2 of 2 budgets" in page.verdict


def test_a_plot_of_many_families_keeps_its_size() -> None:
    rows = [
        ReportRow(f"r{i}", family=f"family number {i}", compute=0.5, psnr=30.0 + i, time=0.5)
        for i in range(24)
    ]
    page = benchmark_page(Benchmark("many", tuple(rows), {}, {}, {}))
    figure = next(x for x in page.sections if x.kind == "figure")
    assert figure.svg.count("<li>") == 24 and 'viewBox="0 0 324 ' in figure.svg
    assert figure.svg.count("data-tip") == 24


@pytest.mark.parametrize(
    ("verdict", "tone"),
    [
        ("the schedule pays off: it ends closer", "good"),
        ("the schedule pays off: closer; HOWEVER, 6 steps end closer", "open"),
        ("SAMPLING WITHOUT A CACHE IS BETTER: 6 steps", "bad"),
        ("no cache is needed: 6 steps has the smallest error", "bad"),
    ],
)
def test_the_verdict_of_a_search_is_marked(verdict: str, tone: str) -> None:
    best = Measured("found", 0.5, 0.1)
    result = SearchResult(best, (Measured("6 steps", 0.5, 0.2),), (best,), 3, 2.0, verdict)
    found = SearchedSchedule(4, {"attn": Row.uniform(4, 2)}, result=result)
    assert search_page(found).tone == tone


def test_a_search_without_a_result_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="no result of a search"):
        search_page(SearchedSchedule(4, {"attn": Row.uniform(4, 2)}))


def test_a_missing_jinja2_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page_module._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingPackageError, match=r"\[report\]"):
        write_page(Page("a", "b"), tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_the_environment_names_no_user_and_no_folder() -> None:
    told = " ".join(f"{name} {value}" for name, value in environment(torch.nn.Identity()).items())
    assert "torch" in told and "Identity" in told
    assert str(Path.home()) not in told and "/" not in told.replace("w/", "")


def luminance(colour: str) -> float:
    text = colour.lstrip("#")
    text = "".join(2 * x for x in text) if len(text) == 3 else text
    channels = [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_have_contrast(scheme: int) -> None:
    style = page_module._template("style.css")
    blocks = re.findall(r":root\{([^}]*)\}", style)
    colours = dict(re.findall(r"--([\w-]+):(#[0-9a-f]{3,6})", blocks[scheme]))
    pairs = [(ink, paper) for ink in ("ink", "muted", "blue") for paper in ("paper", "card")]
    pairs += [(ink, f"{ink}-bg") for ink in ("good", "bad", "open")]
    pairs += [("ink", f"{tone}-bg") for tone in ("good", "bad", "open")]
    for ink, paper in pairs:
        light, dark = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{ink} on {paper}"
