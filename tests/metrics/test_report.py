"""Tables as they are printed, word for word."""

from __future__ import annotations

import json
import math

import pytest
from support.golden import assert_golden

from smoothcache.errors import InvalidArgumentError
from smoothcache.metrics.report import COLUMNS, Report, ReportRow

REPORT = Report(
    rows=(
        ReportRow(
            "uncached", steps=50, compute=1.0, time=1.0, seconds=12.3456, psnr=math.inf, ssim=1.0,
            relative_error=0.0, class_accuracy=0.97, frechet_distance=3.14159, peak_bytes=0,
        ),
        ReportRow(
            "α = 0.08", steps=50, compute=0.613, time=0.66, seconds=8.1, psnr=41.27, ssim=0.9912,
            relative_error=0.01234, class_accuracy=0.965, frechet_distance=3.3, peak_bytes=7 << 20,
        ),
        ReportRow(
            "31 steps", steps=31, compute=0.62, time=0.63, seconds=7.8, psnr=39.9, ssim=0.98,
            relative_error=0.0567, class_accuracy=None, frechet_distance=123.4,
        ),
    ),
    title="Shapes, 100 samples",
    notes=("Against the uncached samples of the same seeds.",),
)  # fmt: skip


def test_text() -> None:
    assert_golden(REPORT.to_text(), "metrics/report")
    assert str(REPORT) == REPORT.to_text()


def test_markdown() -> None:
    assert_golden(REPORT.to_markdown(), "metrics/report_markdown")


def test_json_is_strict_and_keeps_every_digit() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(REPORT.to_json(), parse_constant=refuse)
    assert document["title"] == REPORT.title and document["notes"] == list(REPORT.notes)
    first, _, last = document["rows"]
    assert first["psnr"] == "inf"
    assert first["frechet_distance"] == 3.14159
    assert last["class_accuracy"] is None and last["peak_bytes"] is None
    assert set(first) == {"name", "family", "margins", *COLUMNS}


def test_intervals_stand_behind_their_means() -> None:
    margins = {"psnr": 0.53, "class_accuracy": 0.04, "time": 0.02}
    row = ReportRow("a", psnr=30.0, class_accuracy=0.9, time=0.5, ssim=0.9, margins=margins)
    assert Report((row,)).cells() == [
        ["a", "× 0.50 ± 0.02", "30.0 ± 0.5", "0.9000", "90.0 ± 4.0 %"]
    ]


def test_columns_without_values_are_left_out() -> None:
    report = Report((ReportRow("a", psnr=30.0), ReportRow("b")))
    assert report.to_text() == "   PSNR, dB\na      30.0\nb         -"
    assert Report((ReportRow("a"),)).to_text() == "\na"
    assert Report(()).to_text() == ""


def test_every_attribute_is_a_column() -> None:
    rows = (
        ReportRow("a", snr=12.34, accuracies={"pitch": 1.0, "rhythm": 0.25}),
        ReportRow("b", accuracies={"timbre": 0.5}),
    )
    report = Report(rows)
    assert report.header() == [
        "", "SNR, dB", "pitch accuracy", "rhythm accuracy", "timbre accuracy"
    ]  # fmt: skip
    assert report.cells() == [
        ["a", "12.3", "100.0 %", "25.0 %", "-"], ["b", "-", "-", "-", "50.0 %"]
    ]  # fmt: skip
    assert json.loads(report.to_json())["rows"][0]["accuracies"] == {"pitch": 1.0, "rhythm": 0.25}
    with pytest.raises(InvalidArgumentError, match="pitch of the row 'a' is NaN"):
        ReportRow("a", accuracies={"pitch": math.nan})


def test_a_bar_in_a_name_does_not_break_markdown() -> None:
    assert "| a\\|b | 0.5000 |" in Report((ReportRow("a|b", ssim=0.5),)).to_markdown()


@pytest.mark.parametrize(
    ("count", "written"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_sizes(count: int, written: str) -> None:
    assert Report((ReportRow("a", peak_bytes=count),)).cells() == [["a", written]]


@pytest.mark.parametrize(
    ("value", "written"),
    [(1234.6, "1235"), (12.34, "12.3"), (0.1, "0.100"), (1e-5, "0.000010"), (0.0, "0")],
)
def test_three_significant_digits(value: float, written: str) -> None:
    assert Report((ReportRow("a", relative_error=value),)).cells() == [["a", written]]


def test_nan_is_no_measurement() -> None:
    with pytest.raises(InvalidArgumentError, match="psnr of the row 'a' is NaN"):
        ReportRow("a", psnr=math.nan)
