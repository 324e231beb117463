"""Pages of what the library measures: comparisons, searches, benchmarks, other tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..calibration.curves import Calibration
from ..comparison.benchmark import TOLERANCE, Benchmark
from ..comparison.result import REFERENCE, Comparison, Duel
from ..errors import InvalidArgumentError
from ..evaluation.table import EvaluationTable
from ..metrics.report import COLUMNS, Report, ReportRow
from ..plots.curves import plot_error_curves
from ..schedule.html import schedule_map
from ..schedule.schedule import Schedule
from ..searching.result import Measured, SearchedSchedule, SearchResult
from .figures import Point, inline_svg, plot_points
from .media import Medium, medium
from .page import Fact, Figure, Page, Samples, Table

MOST_SAMPLES = 8
MOST_CHARACTERS = 24 * 2**20  # of pictures, videos and sounds in a page
FOUND, PLAIN = "found", "without a cache"
FEWER_STEPS, SCHEDULES = "fewer steps", "schedules"
BUDGETS = (0.52, 0.36, 0.22)  # of the uncached multiply-accumulates, in the summary of a benchmark


def comparison_page(
    comparison: Comparison,
    *,
    title: str = "Comparison",
    subtitle: str = "",
    report: Report | None = None,
    schedules: Mapping[str, Schedule] | None = None,
    calibration: Calibration | None = None,
    sampling_rate: int | None = None,
    inputs: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    command: str = "",
) -> Page:
    """The page of a comparison: summary, samples, table, cost and quality, schedules.

    Args:
        comparison: What was compared.
        title: Of the page.
        subtitle: Below it.
        report: The table, if it is more than that of the comparison.
        schedules: Name of a row -> its schedule, to be drawn.
        calibration: Whose error curves are to be drawn.
        sampling_rate: Of sounds, samples a second; without it they are left out.
        inputs: What each sample was made from, used in turn; names the samples.
        environment: What it was measured with, as ``environment`` gives it.
        command: What makes it again.

    Returns:
        A page, for ``write_page``.

    Raises:
        MissingPackageError: If matplotlib or pillow is not installed.

    Example:
        >>> import torch
        >>> from smoothcache.comparison import Comparison
        >>> from smoothcache.metrics.report import ReportRow
        >>> rows = (ReportRow("uncached", compute=1.0, time=1.0),
        ...         ReportRow("half", compute=0.5, time=0.6, psnr=30.0))
        >>> images = {row.name: torch.zeros(1, 3, 8, 8) for row in rows}
        >>> comparison_page(Comparison(rows, images, {})).facts[0].value
        '1.67 ×'
    """
    duels = comparison.duels()
    chosen = _headline(comparison, duels)
    table = report or comparison.report()
    won = [duel for duel in duels if duel.is_won]
    lost = [duel for duel in duels if duel.is_won is False]
    conclusion = comparison.verdict()[-1:]
    sections: list[Table | Figure | Samples] = [
        *_samples(comparison, sampling_rate, inputs, chosen),
        _table("Every way of sampling", table, chosen.name if chosen else ""),
        *_cost_and_quality(comparison, chosen),
        *_schedule_maps(schedules or {}),
        *_error_curves(calibration, schedules or {}),
    ]
    return Page(
        title,
        " ".join(conclusion) or "Nothing was compared with fewer steps.",
        "good" if won else "bad" if len(lost) == len(duels) > 0 else "open",
        subtitle=subtitle or table.title,
        facts=_facts(chosen, duels) if chosen else (),
        sections=tuple(sections),
        environment=environment or {},
        command=command,
    )


def search_page(
    schedule: SearchedSchedule,
    *,
    title: str = "Search",
    subtitle: str = "",
    calibration: Calibration | None = None,
    environment: Mapping[str, str] | None = None,
    command: str = "",
) -> Page:
    """The page of a search: verdict, front of cost and error, the schedule found.

    Args:
        schedule: What ``search`` returned.
        title: Of the page.
        subtitle: Below it.
        calibration: Whose error curves are to be drawn.
        environment: What it was measured with, as ``environment`` gives it.
        command: What makes it again.

    Returns:
        A page, for ``write_page``.

    Raises:
        InvalidArgumentError: If the schedule carries no result of a search.
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> from smoothcache import Row, SearchedSchedule, SearchResult
        >>> from smoothcache.searching.result import Measured
        >>> best = Measured("every 2nd step", 0.5, 0.1)
        >>> result = SearchResult(best, (Measured("2 steps", 0.5, 0.2),), (best,), 3, 2.0, "pays")
        >>> found = SearchedSchedule(4, {"attn": Row.uniform(4, 2)}, result=result)
        >>> search_page(found).facts[0].value
        '50.0 %'
    """
    result = schedule.result
    if result is None:
        raise InvalidArgumentError(
            "the schedule carries no result of a search; search() returns one."
        )
    best = result.best
    facts = [
        Fact("compute", f"{best.compute:.1%}".replace("%", " %"), "of the uncached MACs"),
        Fact("error", f"{best.error:.4f}", "relative L2 error to the uncached run"),
        Fact("steps", str(result.num_steps or schedule.num_steps), best.solver or "own solver"),
        Fact("search cost", f"{result.cost:.1f}", "uncached generations"),
    ]
    points = [_measured_point(best, FOUND, is_marked=True)]
    points += [_measured_point(row, PLAIN) for row in result.baselines]
    points += [_measured_point(row, "front on the training samples") for row in result.front]
    rows = dict.fromkeys((best, *result.baselines))
    has_converged = any(row.converged_error is not None for row in rows)
    header = ("", "compute", "error", *["error to converged"] * has_converged)
    cells = tuple(
        (
            row.name,
            f"{100 * row.compute:.1f} %",
            f"{row.error:.4f}",
            *[_or_dash(row.converged_error)] * has_converged,
        )
        for row in rows
    )
    figure = Figure(
        "Cost and error",
        plot_points(
            points,
            x_label="compute, share of the uncached MACs",
            y_label="relative L2 error",
            prefix="cost-",
            unconnected=(FOUND, PLAIN),
        ),
        "Error over cost for the schedule found, for sampling without a cache, and for the front "
        "of the search.",
        "Lower and farther left is better. Point at a mark, or move to it by the tab key, for its "
        "values.",
    )
    return Page(
        title,
        result.verdict[:1].upper() + result.verdict[1:] + ".",
        _tone(result),
        subtitle=subtitle,
        facts=tuple(facts),
        sections=(
            Table("On samples that the search has not seen", header, cells, best.name),
            figure,
            *_schedule_maps({best.name: schedule}),
            *_error_curves(calibration, {}),
        ),
        environment=environment or {},
        command=command,
    )


def benchmark_page(
    benchmark: Benchmark,
    *,
    title: str = "Benchmark",
    column: str = "psnr",
    environment: Mapping[str, str] | None = None,
    command: str = "",
) -> Page:
    """The page of a benchmark: the best method at a few costs, all methods, all figures.

    Args:
        benchmark: What ``run_benchmark`` returned.
        title: Of the page.
        column: Field of the rows that is quality, the more the better.
        environment: What it was measured with, as ``environment`` gives it.
        command: What makes it again.

    Returns:
        A page, for ``write_page``.

    Raises:
        MissingPackageError: If matplotlib is not installed.

    Example:
        >>> from smoothcache.comparison import Benchmark
        >>> from smoothcache.metrics.report import ReportRow
        >>> rows = (ReportRow("n = 2", family="FORA", compute=0.5, psnr=35.0, time=0.6),)
        >>> benchmark_page(Benchmark("case", rows, {}, {}, {})).facts[0].value
        'n = 2'
    """
    report = benchmark.report()
    rows = [row for row in benchmark.rows if row.name != REFERENCE]
    best = {
        budget: row for budget in BUDGETS if (row := _best_within(rows, budget, column)) is not None
    }
    heading, written = COLUMNS[column]
    facts = tuple(
        Fact(
            f"best at ≤ {budget:.0%} of the MACs".replace("%", " %"),
            row.name,
            f"{heading.partition(',')[0]} {written(getattr(row, column))}, {_times_faster(row)}",
        )
        for budget, row in best.items()
    )
    is_plain = [row.family == FEWER_STEPS or "solver" in row.family for row in best.values()]
    verdict, tone = "No method is within the budgets.", "open"
    if best:
        count, all_of = len(is_plain) - sum(is_plain), len(is_plain)
        verdict = f"A cache is closest to the uncached samples at {count} of {all_of} budgets."
        verdict += " At the others use fewer steps or the better solver." * any(is_plain)
        tone = "good" if not any(is_plain) else "bad" if all(is_plain) else "open"
    points = [
        _row_point(row, row.family, column, is_marked=row in best.values())
        for row in rows
        if row.compute is not None and _finite(getattr(row, column))
    ]
    figures = [_plane(points, heading)] if points else []
    return Page(
        title,
        verdict,
        tone,
        subtitle=report.title,
        facts=facts,
        sections=(
            *figures,
            _table("Every method", report, next(iter(best.values())).name if best else ""),
        ),
        environment=environment or {},
        command=command,
    )


def table_page(
    report: Report | EvaluationTable,
    *,
    title: str,
    verdict: str = "",
    tone: str = "open",
    facts: Sequence[Fact] = (),
    samples: Mapping[str, Tensor] | None = None,
    sampling_rate: int | None = None,
    environment: Mapping[str, str] | None = None,
    command: str = "",
) -> Page:
    """The page of any table, as of an evaluation.

    Args:
        report: The table and the sentences below it.
        title: Of the page.
        verdict: What follows from it, in a sentence.
        tone: "good", "bad" or "open".
        facts: Figures of the summary.
        samples: Name of a way of sampling -> samples; the first is what the others are set beside.
        sampling_rate: Of sounds, samples a second.
        environment: What it was measured with, as ``environment`` gives it.
        command: What makes it again.

    Returns:
        A page, for ``write_page``.

    Raises:
        MissingPackageError: If pillow is not installed and there are samples.

    Example:
        >>> from smoothcache.metrics.report import Report, ReportRow
        >>> page = table_page(Report((ReportRow("a", compute=0.5),)), title="Evaluation")
        >>> page.sections[0].rows
        (('a', '50.0 %'),)
    """
    shown = [] if not samples else _beside(samples, sampling_rate, (), {})
    return Page(
        title,
        verdict,
        tone,
        subtitle=report.title,
        facts=tuple(facts),
        sections=(*shown, _table("Results", report, "")),
        environment=environment or {},
        command=command,
    )


# ----------------------------------------------------------------------------------- the summary
def _headline(comparison: Comparison, duels: Sequence[Duel]) -> ReportRow | None:
    """The schedule to speak of: the largest gain over fewer steps, or else the first row."""
    if duels:
        return comparison.row(max(duels, key=lambda duel: duel.gain).name)
    return next((row for row in comparison.rows if row.name != REFERENCE), None)


def _facts(row: ReportRow, duels: Sequence[Duel]) -> tuple[Fact, ...]:
    facts = []
    if row.time:
        facts.append(Fact("speed-up", f"{1 / row.time:.2f} ×", f"{row.name}: measured time"))
    if row.compute is not None:
        facts.append(Fact("compute", f"{100 * row.compute:.1f} %", "of the uncached MACs"))
    for name in ("psnr", "snr"):
        if (value := getattr(row, name)) is not None:
            heading = COLUMNS[name][0].partition(",")[0]
            text = "identical" if math.isinf(value) else f"{value:.1f} dB"
            facts.append(Fact(heading, text, "against the uncached samples"))
    duel = next((duel for duel in duels if duel.name == row.name), None)
    if duel is not None:
        interval = "" if math.isnan(duel.low) else f", 95 % in {duel.low:+.1f} … {duel.high:+.1f}"
        facts.append(
            Fact("over fewer steps", f"{duel.gain:+.1f} dB", f"against {duel.rival}{interval}")
        )
    return tuple(facts)


def _tone(result: SearchResult) -> str:
    """How the verdict of a search is marked: its own words decide."""
    verdict = result.verdict.upper()
    if "WITHOUT A CACHE IS BETTER" in verdict or verdict.startswith("NO CACHE"):
        return "bad"
    return "open" if not result.baselines or "HOWEVER" in verdict else "good"


def _times_faster(row: ReportRow) -> str:
    return f"{1 / row.time:.2f} × faster" if row.time else "time not measured"


def _best_within(rows: Sequence[ReportRow], budget: float, column: str) -> ReportRow | None:
    within = [
        row
        for row in rows
        if row.compute is not None
        and row.compute <= budget + TOLERANCE
        and getattr(row, column) is not None
    ]
    return max(within, key=lambda row: float(getattr(row, column)), default=None)


# ---------------------------------------------------------------------------------- the sections
def _table(title: str, report: Report | EvaluationTable, emphasised: str) -> Table:
    return Table(
        title,
        tuple(report.header()),
        tuple(tuple(cells) for cells in report.cells()),
        emphasised,
        report.notes,
    )


def _samples(
    comparison: Comparison, rate: int | None, inputs: Sequence[str], chosen: ReportRow | None
) -> list[Samples]:
    if REFERENCE not in comparison.images:
        return []
    names = sorted(comparison.images, key=lambda name: (name != REFERENCE, name != _name(chosen)))
    samples = {name: comparison.images[name] for name in names}
    return _beside(samples, rate, inputs, {row.name: _described(row) for row in comparison.rows})


def _name(row: ReportRow | None) -> str:
    return row.name if row else ""


def _beside(
    samples: Mapping[str, Tensor],
    rate: int | None,
    inputs: Sequence[str],
    details: Mapping[str, str],
) -> list[Samples]:
    """The first samples of each way, as many as the page can carry."""
    (first, uncached), *others = samples.items()
    media: list[tuple[Medium, ...]] = []
    total = 0
    for i in range(min(MOST_SAMPLES, len(uncached))):
        subject = f"sample {i + 1}" + (f", {inputs[i % len(inputs)]}" if inputs else "")
        line = [
            medium(values[i], f"{subject}, {name}", rate)
            for name, values in [(first, uncached), *others]
        ]
        known = tuple(one for one in line if one is not None)
        total += sum(one.size for one in known)
        if len(known) < len(line) or (media and total > MOST_CHARACTERS):
            break
        media.append(known)
    if not media or not others:
        return []
    kind = media[0][0].kind
    nouns = {"image": "Images", "video": "Clips", "audio": "Sounds"}
    how = {
        "image": "Drag the handle, or use the arrow keys: left of it is the uncached image.",
        "video": "Left is the uncached clip.",
        "audio": "First is the uncached sound.",
    }
    return [
        Samples(
            f"{nouns[kind]} before and after",
            tuple(line[0] for line in media),
            {name: tuple(line[i + 1] for line in media) for i, (name, _) in enumerate(others)},
            details,
            f"{how[kind]} {len(media)} of {len(uncached)} samples, with the same seeds.",
        )
    ]


def _described(row: ReportRow) -> str:
    parts = []
    if row.time:
        parts.append(f"{1 / row.time:.2f} × as fast")
    if row.compute is not None:
        parts.append(f"{100 * row.compute:.1f} % of the MACs")
    for name in ("psnr", "snr"):
        if _finite(value := getattr(row, name)):
            parts.append(f"{name.upper()} {value:.1f} dB")
    return ", ".join(parts)


def _cost_and_quality(comparison: Comparison, chosen: ReportRow | None) -> list[Figure]:
    column = "snr" if any(row.snr is not None for row in comparison.rows) else "psnr"
    rivals = set(comparison.rivals.values())
    points = [
        _row_point(
            row, FEWER_STEPS if row.name in rivals else SCHEDULES, column, is_marked=row is chosen
        )
        for row in comparison.rows
        if row.name != REFERENCE and row.compute is not None and _finite(getattr(row, column))
    ]
    return [_plane(points, COLUMNS[column][0])] if points else []


def _plane(points: Sequence[Point], heading: str) -> Figure:
    name, _, unit = heading.partition(", ")
    return Figure(
        "Cost and quality",
        plot_points(
            points,
            x_label="compute, share of the uncached MACs",
            y_label=f"{name} against uncached" + (f", {unit}" if unit else ""),
            prefix="cost-",
            unconnected=(SCHEDULES,),
        ),
        f"{name} over cost, a mark for each way of sampling; the table has the same values.",
        "Higher and farther left is better. Point at a mark, or move to it by the tab key, for "
        "its values.",
    )


def _row_point(row: ReportRow, family: str, column: str, *, is_marked: bool) -> Point:
    report = Report((row,))
    values = zip(report.header()[1:], report.cells()[0][1:], strict=True)
    text = ", ".join(f"{name} {value}" for name, value in values)
    return Point(row.name, family, row.compute or 0.0, getattr(row, column), text, is_marked)


def _measured_point(row: Measured, family: str, *, is_marked: bool = False) -> Point:
    text = f"{100 * row.compute:.1f} % of the MACs, error {row.error:.4f}"
    return Point(row.name, family, row.compute, row.error, text, is_marked)


def _schedule_maps(schedules: Mapping[str, Schedule]) -> Iterator[Figure]:
    for i, (name, schedule) in enumerate(schedules.items()):
        cost = "" if schedule.compute is None else f", {schedule.compute:.1%} of the MACs"
        yield Figure(
            "Schedules" if not i and len(schedules) > 1 else "The schedule" if not i else "",
            schedule_map(schedule),
            f"Map of the schedule {name}",
            f"{name}: {schedule.num_steps} steps{cost}".replace("%", " %"),
            is_plain=True,
        )


def _error_curves(
    calibration: Calibration | None, schedules: Mapping[str, Schedule]
) -> Iterator[Figure]:
    if calibration is None or calibration.num_steps < 2:
        return
    texts = (schedule.provenance.get("alpha", "") for schedule in schedules.values())
    alphas = sorted({value for text in texts if (value := _number(text)) is not None})
    figure = plot_error_curves(calibration, alphas=alphas)
    yield Figure(
        "Error curves",
        inline_svg(figure, "curves-"),
        "Relative error of a reused output at every step, for each kind of layer and age.",
        f"Measured on {calibration.num_samples} samples. Where a curve is low, reuse is cheap.",
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
