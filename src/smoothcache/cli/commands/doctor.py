"""``smoothcache doctor``: whether a pipeline can be run under a schedule."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer.core

from .. import checkup, tables
from ..app import app
from ..inputs import AsJson, ModelArgument
from ..options import Setup, with_setup
from ..outputs import show, show_json, status_line


@app.command()
@with_setup
def doctor(
    model: ModelArgument,
    setup: Setup,
    compiling: Annotated[
        bool,
        typer.Option("--try-compile/--no-try-compile", help="Also let torch.compile trace it."),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Load a pipeline, run two tiny steps in several ways, and say what works.

    Which layers can be reused, whether reuse happens, whether the calls of guidance are told
    apart, whether it compiles under a schedule, who moves weights. Ends with exit code 1 if
    something does not work.

    [bold]Example:[/bold] smoothcache doctor ./my-dit
    """
    pipeline = setup.load(model)
    sampler = setup.any_sampler(pipeline, checkup.STEPS)
    with status_line("running two steps"):
        checks = checkup.examine(pipeline, sampler, compiling=compiling)
    fine = checkup.is_fine(checks)
    if as_json:
        show_json({"fine": fine, "checks": [asdict(check) for check in checks]})
    else:
        show(tables.checks_table(checks))
        show(
            f"next: smoothcache calibrate {model} -o curves.safetensors"
            if fine
            else "something does not work, see above; the page 'Errors' of the documentation helps"
        )
    if not fine:
        raise typer.Exit(1)
