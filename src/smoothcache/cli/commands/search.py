"""``smoothcache search``: the best schedule within a budget, measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer.core

from ...calibration.curves import Calibration
from ...errors import InvalidArgumentError
from ...searching.search import search as run_search
from .. import tables as tables
from ..app import app
from ..inputs import AsJson, Html, ModelArgument
from ..options import Setup, with_setup
from ..outputs import check_html_file, check_output_file, show, show_json, write_html


@app.command()
@with_setup
def search(
    model: ModelArgument,
    setup: Setup,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Schedule to write.")
    ],
    speedup: Annotated[
        float | None, typer.Option(metavar="X", help="At most 1/X of the uncached MACs.")
    ] = None,
    compute: Annotated[
        float | None, typer.Option(metavar="X", help="The same as a fraction, in (0, 1].")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", metavar="X", help="The cheapest that keeps this error."),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Look over solvers and numbers of steps as well.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="What calibrate wrote, if you have it."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Solver steps. Default: the pipeline's own."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Stop improving after so long.")
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            "--max-cost",
            metavar="N",
            help="In uncached generations, for all that runs. Default: 20, or 60 where nothing is "
            "planned from trajectories.",
        ),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Results; an interrupted search goes on from it."),
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Find the best schedule for a budget by trying, and say whether a cache pays at all.

    Candidates are run for real and compared with the uncached output; the winner is measured
    again on samples that the search has not seen, beside fewer steps and better solvers.

    [bold]Example:[/bold] smoothcache search ./my-dit --speedup 2 -o fast.json --class-label 0
    """
    check_output_file(output)
    check_html_file(html)
    known = None if calibration is None else Calibration.load(calibration)
    pipeline = setup.load(model)
    sampler = setup.sampler(pipeline, steps)
    found = run_search(
        pipeline,
        sampler.sample,
        known,
        speedup=speedup,
        compute=compute,
        max_error=max_error,
        joint=joint,
        seconds=seconds,
        max_cost=max_cost,
        journal=journal,
        seed=setup.seed,
        progress=sys.stderr.isatty(),
    )
    found.save(output)
    result = found.result
    if result is None:
        raise InvalidArgumentError("the search returned no result")
    if html is not None:
        from ...report import environment, search_page

        page = search_page(
            found,
            title=f"Search for a schedule of {type(pipeline).__name__}",
            subtitle=model,
            calibration=known,
            environment=environment(pipeline),
        )
        write_html(html, page)
    if as_json:
        show_json(
            {
                "file": str(output),
                "verdict": result.verdict,
                "rollouts": result.rollouts,
                "cost": result.cost,
                "num_steps": result.num_steps,
                "solver": result.best.solver,
                "best": tables.measured(result.best),
                "honest": [tables.measured(row) for row in result.baselines],
                "front": [tables.measured(row) for row in result.front],
            }
        )
        return
    show(tables.search_table(result))
    show(result.verdict)
    show(
        f"{result.rollouts} rollouts, as much as {result.cost:.1f} uncached generations; "
        f"written to {output}"
    )
    if html is not None:
        show(f"report written to {html}")
