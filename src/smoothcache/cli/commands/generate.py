"""``smoothcache generate``: samples under a schedule."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer.core

from ...diffusers_io.sampler import sampling_rate
from ...runtime.run import cached
from ...schedule.schedule import Schedule
from ..app import app
from ..inputs import AsJson, ModelArgument
from ..options import Setup, with_setup
from ..outputs import check_output_folder, show, show_json, with_progress, write_samples


@app.command()
@with_setup
def generate(
    model: ModelArgument,
    setup: Setup,
    schedule: Annotated[
        Path, typer.Option("--schedule", metavar="FILE", help="What plan wrote, or a 0/1 file.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the samples.")
    ],
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Samples to make. Default: one for each prompt or label."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Solver steps. Default: those of the schedule."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline under a schedule; write images as PNG, clips as GIF, sounds as WAV.

    [bold]Example:[/bold] smoothcache generate ./my-dit --schedule dit.json --class-label 3 -o out
    """
    planned = Schedule.load(schedule)
    check_output_folder(output)
    pipeline = setup.load(model)
    sampler = setup.sampler(pipeline, steps, runs=planned.num_steps)
    files: list[Path] = []
    started = time.perf_counter()
    with cached(pipeline, planned) as run:
        for i in with_progress(range(samples or sampler.count), "generating"):
            files += write_samples(output, i, sampler(i), sampling_rate(pipeline))
    seconds = time.perf_counter() - started
    summary = run.summary()
    if as_json:
        counts = {name: value for name, value in vars(summary).items() if name != "schedule"}
        show_json(
            {
                "files": [str(file) for file in files],
                "seconds": seconds,
                "compute": summary.schedule.compute,
                **counts,
            }
        )
        return
    show(str(summary))
    show(f"{len(files)} file(s) in {seconds:.1f} s, written to {output}")
