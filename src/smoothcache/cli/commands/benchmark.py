"""``smoothcache benchmark``: caching methods and plain alternatives at equal cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer.core

from ...errors import InvalidArgumentError
from ...files.document import write_atomically
from ..app import app
from ..inputs import AsJson, Html, ModelArgument
from ..options import Setup, with_setup
from ..outputs import (
    check_html_file,
    check_output_file,
    picture_suffix,
    show,
    show_report,
    write_html,
    write_picture,
)


@app.command()
@with_setup
def benchmark(
    model: ModelArgument,
    setup: Setup,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Samples each way. Default: one for each prompt or label."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Solver steps. Default: the pipeline's own."),
    ] = None,
    search: Annotated[
        list[float] | None,
        typer.Option(
            "--search", metavar="X", help="Also search for this fraction of the MACs. Repeatable."
        ),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Search over solvers and numbers of steps as well.")
    ] = False,
    max_cost: Annotated[
        float | None,
        typer.Option(
            "--max-cost",
            metavar="N",
            help="Of each search, in uncached generations. Default: as for search.",
        ),
    ] = None,
    converged: Annotated[
        bool,
        typer.Option(
            "--converged/--no-converged", help="Also compare with ten times as many steps."
        ),
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Results to write (JSON)."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw cost and quality, as png, svg or pdf."),
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Measure every method that needs no training on your own pipeline, at many costs.

    Fewer steps, better solvers, FORA, Taylor extrapolation, SmoothCache and, if asked for, a
    search, with the same seeds. Multiply-accumulates are counted while they run.

    [bold]Example:[/bold] smoothcache benchmark ./my-dit --class-label 0 --search 0.3
    """
    from ...comparison import methods
    from ...comparison.benchmark import run_benchmark
    from ...comparison.result import REFERENCE
    from ...plots.methods import plot_methods

    budgets = methods.checked_budgets(search or ())
    if joint and not budgets:
        raise InvalidArgumentError(
            "--joint says how to search, and nothing is searched for; add --search 0.5, say, for "
            "half the multiply-accumulates."
        )
    if output is not None:
        check_output_file(output)
    check_html_file(html)
    kind = None if picture is None else picture_suffix(picture)
    pipeline = setup.load(model)
    sampler = setup.sampler(pipeline, steps)
    case = methods.pipeline_case(sampler)
    shown = sys.stderr.isatty()
    calibration = methods.calibrated(case, methods.CALIBRATION_SAMPLES, progress=shown)
    entries = methods.training_free(case, calibration)
    entries += methods.searched(case, budgets, max_cost=max_cost)
    if joint:
        entries += methods.searched(case, budgets, joint=True, max_cost=max_cost)
    result = run_benchmark(
        case, entries, num_generations=samples or sampler.count, converged=converged, progress=shown
    )
    report = result.report()
    if output is not None:
        write_atomically(output, f"{report.to_json()}\n".encode())
    if picture is not None and kind is not None:
        own = (methods.SEARCH, methods.JOINT)
        rows = [row for row in result.rows if row.family != REFERENCE]
        drawn = plot_methods(rows, emphasised=own, title=result.name)
        write_picture(drawn, picture, kind)
    if html is not None:
        from ...report import benchmark_page, environment

        page = benchmark_page(
            result, title=f"Benchmark of {model}", environment=environment(pipeline)
        )
        write_html(html, page)
    if as_json:
        typer.echo(report.to_json())
        return
    show_report(report)
    for file in filter(None, (output, picture, html)):
        show(f"written to {file}")
