"""``smoothcache sample``: many samples into a folder, over ranks, resumable."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer.core

from ...generation.from_pipeline import sample_pipeline
from ...generation.manifest import SAMPLES
from ...generation.reading import join_arrays
from ...processes import from_rank_zero, join_processes, leave_processes, rank_and_size
from ...schedule.schedule import Schedule
from ..app import app
from ..inputs import (
    AsJson,
    ClassesOption,
    LayoutOption,
    ModelArgument,
)
from ..options import Setup, with_setup
from ..outputs import check_output_file, check_output_folder, show, show_json


@app.command()
@with_setup
def sample(
    model: ModelArgument,
    setup: Setup,
    num_samples: Annotated[
        int, typer.Option("--num-samples", "-n", metavar="N", min=1, help="How many samples.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="New, or the folder of a run to go on with."
        ),
    ],
    schedule: Annotated[
        Path | None,
        typer.Option("--schedule", metavar="FILE", help="Default: the uncached pipeline."),
    ] = None,
    classes: ClassesOption = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Samples in one batch.")
    ] = 1,
    layout: LayoutOption = None,
    shard_size: Annotated[
        int | None,
        typer.Option(
            "--shard-size",
            metavar="N",
            min=1,
            help="Samples that are written together, a multiple of the batch. Default: about 64 "
            "for npz, otherwise a batch.",
        ),
    ] = None,
    join: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="At the end also write all images into one .npz file."),
    ] = None,
    frames_per_second: Annotated[
        float, typer.Option("--fps", metavar="X", min=0.1, help="Of clips.")
    ] = 8.0,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Solver steps. Default: those of the schedule."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Generate many samples into a folder: on one device, or over ranks; resumable.

    Begin it with torchrun or accelerate launch to use several devices or machines: the samples are
    the same for any number of ranks. After a kill, run the same command again.

    [bold]Example:[/bold] torchrun --nproc-per-node 8 -m smoothcache sample facebook/DiT-XL-2-256
    --schedule dit.json -n 50000 --classes all --batch-size 32 -o samples
    """
    planned = None if schedule is None else Schedule.load(schedule)
    check_output_folder(output)
    if join is not None:
        check_output_file(join)
    names = setup.names()
    pipeline = setup.load(model)
    setup = setup.with_classes(pipeline, classes, num_samples)
    sampler = setup.sampler(pipeline, steps, runs=planned.num_steps if planned else None)
    join_processes()
    try:
        manifest, summary = sample_pipeline(
            sampler,
            output,
            num_samples,
            schedule=planned,
            batch_size=batch_size,
            layout=None if layout is None else layout.value,
            shard_size=shard_size,
            names=names,
            frames_per_second=frames_per_second,
            progress=sys.stderr.isatty(),
        )
        if join is not None:
            from_rank_zero(lambda: join_arrays(output, join))
        is_first = rank_and_size()[0] == 0
    finally:
        leave_processes()
    if not is_first:
        return
    files = manifest.files or ()
    if as_json:
        show_json(
            {
                "folder": str(output),
                "samples": manifest.num_samples,
                "files": len(files),
                "bytes": sum(file.nbytes for file in files),
                "joined": None if join is None else str(join),
                "settings": dict(manifest.settings or {}),
            }
        )
        return
    if summary is not None:
        show(str(summary))
    show(f"{manifest.num_samples} samples in {len(files)} file(s), in {output / SAMPLES}")
