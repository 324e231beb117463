"""Every method and every rival on the demo pipeline: which is closest at which cost?

    python benchmarks/compare_methods.py [--quick] [--samples 70] [--steps 50] [--write]

Prints a table and, for every budget, how our search does against the best of all others. With
``--write``, benchmarks/results/compare_image.json and what is made of it, the tables and the
picture of docs/which-method.md, are written anew. Caches of other packages need
``pip install '.[rivals]'``; one that is not installed, or does not run, is listed with
its error.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _rivals import rivals
from learned_cache import learned_schedule

from smoothcache import plots
from smoothcache.calibration.curves import Calibration
from smoothcache.comparison import methods
from smoothcache.comparison.benchmark import Aim, Benchmark, Case, Method, Verdict, run_benchmark
from smoothcache.comparison.result import REFERENCE
from smoothcache.comparison.trial import Way
from smoothcache.demo.image import NUM_CLASSES, shapes_case
from smoothcache.diffusers_io.loading import silence_libraries
from smoothcache.metrics.report import COLUMNS, Report, ReportRow

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PICTURE = ROOT / "docs" / "which-method.md", ROOT / "docs" / "images" / "which-method.png"

SEARCH_COST = 60.0  # uncached generations, of ten images each
SEARCH_SAMPLES = 1  # generations that a search compares candidates on, and as many to validate
SEARCH_OBJECTIVE = "typical_l2"  # what a mean PSNR over images goes by
LEARNED = "Learning-to-Cache (trained)"
OWN = (methods.SEARCH, methods.JOINT)
AIMS = (
    Aim("psnr", (methods.SEARCH,), apart=(methods.JOINT,), margin={0.22: 2.0, 0.18: 2.0}),
    Aim("converged_psnr", (methods.JOINT,)),
    Aim("class_accuracy", OWN),
    Aim("frechet_distance", OWN),
)
PACKAGES = ("smoothcache", "torch", "diffusers", "transformers", "cache-dit", "numpy")


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        steps: Solver steps of the uncached run.
        generations: Of ten images each.
        budgets: Fractions of the uncached MACs.
        intervals: Of uniform schedules.
        costs: For which thresholds are chosen.
        search_cost: What a search may spend, in uncached generations.
        learned: Budgets that routers are trained for.
        learning: Options of ``learn_routers``.
        calibration_samples: Generations that thresholds are planned from.
        rival_settings: Of each rival; all if None.
    """

    steps: int = 50
    generations: int = 7
    budgets: Sequence[float] = methods.BUDGETS
    intervals: Sequence[int] = methods.INTERVALS
    costs: Sequence[float] = methods.THRESHOLD_COSTS
    search_cost: float = SEARCH_COST
    calibration_samples: int = 3
    learned: Sequence[float] = (0.75, 0.52, 0.36)
    learning: Mapping[str, int] = field(default_factory=lambda: {"num_samples": 5, "epochs": 3})
    rival_settings: int | None = None


QUICK = Plan(
    8,
    1,
    (0.5,),
    (2,),
    (0.5,),
    search_cost=12.0,
    calibration_samples=2,
    learned=(0.75,),
    learning={"num_samples": 1, "epochs": 1},
    rival_settings=1,
)

Maker = Callable[[Case, Calibration, Plan], list[Method]]
METHODS: Mapping[str, Maker] = {
    "training-free": lambda case, calibration, plan: methods.training_free(
        case, calibration, budgets=plan.budgets, intervals=plan.intervals, costs=plan.costs
    ),
    "learned": lambda case, calibration, plan: learned(case, calibration, plan),
    "search": lambda case, _, plan: searched(case, plan),
    "joint": lambda case, _, plan: searched(case, plan, joint=True),
    "rivals": lambda case, _, plan: rivals(case, plan.rival_settings),
}
"""What is compared, by a name for ``--only``."""


def searched(case: Case, plan: Plan, joint: bool = False) -> list[Method]:
    """Our search, of which a generation is ten images already."""
    return methods.searched(
        case,
        plan.budgets,
        joint=joint,
        max_cost=plan.search_cost,
        num_samples=SEARCH_SAMPLES,
        objective=SEARCH_OBJECTIVE,
    )


def learned(case: Case, calibration: Calibration, plan: Plan) -> list[Method]:
    """Learning-to-Cache, which no other method here is as dear to prepare as."""

    def make(budget: float) -> Way:
        schedule, cost = learned_schedule(
            case.model, lambda i: case.training(case.model, i), calibration, budget, **plan.learning
        )
        return case.under(schedule, note=f"trained at the cost of {cost:.0f} uncached generations")

    return [
        Method(f"Learning-to-Cache, ≤ {budget:g}", LEARNED, partial(make, budget))
        for budget in plan.learned
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    plan = _plan(options)
    silence_libraries()
    started = time.perf_counter()
    case = shapes_case(plan.steps)
    calibration = methods.calibrated(case, plan.calibration_samples, progress=options.progress)
    entries = [x for name in options.only for x in METHODS[name](case, calibration, plan)]
    result = run_benchmark(
        case, entries, num_generations=plan.generations, progress=options.progress
    )
    kept = _written_before() if options.keep else None
    result = with_kept(result, kept) if kept else result
    verdicts = result.verdicts(plan.budgets, AIMS)
    document = {
        **result.report().document(),
        "samples": plan.generations * NUM_CLASSES,
        "failures": dict(result.failures),
        "row_notes": dict(result.notes),
        "verdicts": [_told(verdict) for verdict in verdicts],
        "environment": environment(),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "kept": kept and _kept_from(kept, options.only),
    }
    print(result.report())
    print(*("", *map(sentence, verdicts)), sep="\n")
    print(f"\n{document['minutes']} minutes")
    if options.json:
        _write(options.json, document)
    if options.write:
        _write(RESULTS / "compare_image.json", document)
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result, verdicts, document))
        draw(result, PICTURE)


def _written_before() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "compare_image.json").read_text(encoding="utf-8"))
    return found


def _kept_from(document: Mapping[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """What has to be said of rows that were measured in another run."""
    return {
        "methods": [name for name in METHODS if name not in only],
        "environment": document["environment"],
    }


def with_kept(result: Benchmark, document: Mapping[str, Any]) -> Benchmark:
    """A result with the rows of all families that it lacks, as they were written before.

    Seeds are equal, so only the times are of another run; single samples are not kept, and so a
    verdict over a kept row has no interval.
    """
    families = {row.family for row in result.rows}
    rows = [_row_of(told) for told in document["rows"] if told["family"] not in families]
    names = {row.name for row in rows}

    def kept(told: Mapping[str, str]) -> dict[str, str]:
        return {name: why for name, why in told.items() if name in names}

    return replace(
        result,
        rows=(*result.rows, *rows),
        notes={**result.notes, **kept(document["row_notes"])},
        failures={**document["failures"], **result.failures},
        values={**result.values, **{name: {} for name in names}},
    )


def _row_of(told: Mapping[str, Any]) -> ReportRow:
    return ReportRow(**{k: math.inf if v == "inf" else v for k, v in told.items()})


def environment() -> dict[str, Any]:
    """The machine and the packages that the numbers are of."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": versions,
    }


def sentence(verdict: Verdict) -> str:
    """A verdict in words, missed aims included."""
    aim, heading = verdict.aim, COLUMNS[verdict.aim.column][0].removesuffix(", dB")
    where = f"compute ≤ {verdict.budget:g}, {heading}"
    if verdict.own is None or verdict.rival is None:
        return f"{where}: nothing to compare."
    wanted = aim.margin.get(verdict.budget, 0.0)
    wants = f" (at least {_written(aim, wanted)} wanted)" * bool(wanted)
    margin = "" if verdict.margin is None else f" ± {_written(aim, verdict.margin)}"
    outcome = "reached" if verdict.is_met else "MISSED"
    if verdict.is_met is False and not wanted and abs(verdict.gain) <= (verdict.margin or 0.0):
        outcome = "level: closer than these samples can tell"
    return (
        f"{where}: {_named(verdict.own, aim)} against {_named(verdict.rival, aim)}: "
        f"better by {_written(aim, verdict.gain)}{margin}{wants}, {outcome}."
    )


def _named(row: ReportRow, aim: Aim) -> str:
    return f"{row.name} ({_written(aim, getattr(row, aim.column))} at {row.compute:.3f})"


def _written(aim: Aim, value: float) -> str:
    unit = " dB" if aim.column.endswith("psnr") else ""
    sign = "-" if value < 0 else ""
    return f"{sign}{COLUMNS[aim.column][1](abs(value))}{unit}"


def _told(verdict: Verdict) -> dict[str, Any]:
    return {
        "column": verdict.aim.column,
        "budget": verdict.budget,
        "own": verdict.own and verdict.own.name,
        "rival": verdict.rival and verdict.rival.name,
        "gain": None if verdict.gain != verdict.gain else verdict.gain,
        "margin": verdict.margin,
        "wanted": verdict.aim.margin.get(verdict.budget, 0.0),
        "is_met": verdict.is_met,
    }


# -------------------------------------------------------------------------------- the page


def page(
    text: str, result: Benchmark, verdicts: Iterable[Verdict], document: Mapping[str, Any]
) -> str:
    """The page with what stands between its markers made anew."""
    made = {
        "environment": _environment_line(document),
        "verdicts": "\n".join(f"- {sentence(verdict)}" for verdict in verdicts),
        "budgets": "\n\n".join(
            _best_by_family(result, budget).to_markdown()
            for budget in sorted({verdict.budget for verdict in verdicts}, reverse=True)
        ),
        "rows": Report(result.rows).to_markdown(),
        "notes": "\n".join(f"- {name}: {note}" for name, note in result.notes.items()),
        "failures": "\n".join(f"- {name}: `{why}`" for name, why in result.failures.items())
        or "All of them ran.",
    }
    for name, block in made.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = marked.subn(lambda x, block=block: f"{x[1]}{block}\n{x[2]}", text)
        if count != 1:
            raise ValueError(f"the page must have one place for {name}, it has {count}")
    return text


def _environment_line(document: Mapping[str, Any]) -> str:
    known = document["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in known["packages"].items())
    return (
        f"{document['title']}, {document['samples']} samples; {known['cpu']}, {known['cores']} "
        f"cores, {known['threads']} threads; Python {known['python']}, {packages}; "
        f"{known['date']}, {document['minutes']} minutes.{_kept_line(document.get('kept'))}"
    )


def _kept_line(kept: Mapping[str, Any] | None) -> str:
    if not kept:
        return ""
    known = kept["environment"]
    return (
        f" Rows of {' and '.join(kept['methods'])} were measured before, at the same seeds, with "
        f"{known['threads']} threads ({known['date']}): their times are of that run."
    )


def _best_by_family(result: Benchmark, budget: float) -> Report:
    """The row of each family that is closest to the uncached run within a budget."""
    found: dict[str, ReportRow] = {}
    for row in result.rows:
        if row.compute is not None and row.compute <= budget + 1e-6:
            best = found.get(row.family)
            if best is None or (row.psnr or 0) > (best.psnr or 0):
                found[row.family] = row
    rows = sorted(found.values(), key=lambda row: -(row.psnr or 0))
    return Report(tuple(rows), title=f"compute ≤ {budget:g}")


def draw(result: Benchmark, path: Path) -> None:
    """The Pareto picture: plain alternatives on the left, other packages on the right."""
    families = list(dict.fromkeys(row.family for row in result.rows))
    others = [x for x in families if x.startswith(("diffusers ", "cache-dit "))]
    plain = [x for x in families if x not in (*others, *OWN, REFERENCE)]
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.plot_methods(
        [row for row in result.rows if (row.compute or 1) < 0.95],
        path,
        panels={"plain alternatives and published methods": plain, "other packages": others},
        emphasised=OWN,
        title=result.name,
    )


# ------------------------------------------------------------------------------- the options


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few samples, steps and settings")
    parser.add_argument("--samples", type=int, help=f"a multiple of {NUM_CLASSES}")
    parser.add_argument("--steps", type=int, help="of the uncached run")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--write", action="store_true", help="write results, page and picture")
    parser.add_argument(
        "--keep", action="store_true", help="with --only: take the other rows from what is written"
    )
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    if options.samples is not None and (options.samples < 1 or options.samples % NUM_CLASSES):
        parser.error(f"--samples must be a multiple of {NUM_CLASSES}")
    is_whole = options.keep or options.only == list(METHODS)
    if options.write and (options.quick or not is_whole):
        parser.error("--write is for a whole run, or for one with --keep")
    if options.keep and (options.quick or options.samples or options.steps):
        parser.error("--keep is for runs with the settings of what is written")
    return options


def _plan(options: argparse.Namespace) -> Plan:
    plan = QUICK if options.quick else Plan()
    return replace(
        plan,
        steps=options.steps or plan.steps,
        generations=(options.samples or NUM_CLASSES * plan.generations) // NUM_CLASSES,
    )


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"model name\s*: (.+)", text)
    return named[1].strip() if named else platform.machine()


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
