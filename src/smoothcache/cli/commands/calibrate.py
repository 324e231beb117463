"""``smoothcache calibrate``: measures the error curves of a pipeline."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer.core

from ...calibration.calibrate import calibrate as run_calibration
from ...processes import leave_processes, rank_and_size
from .. import tables as tables
from ..app import app
from ..inputs import AsJson, Grain, GrainOption, ModelArgument
from ..options import Setup, with_setup
from ..outputs import check_output_file, show, show_json


@app.command()
@with_setup
def calibrate(
    model: ModelArgument,
    setup: Setup,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Calibration to write.")
    ],
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Generations to measure on.")
    ] = 10,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Solver steps. Default: the pipeline's own."),
    ] = None,
    max_gap: Annotated[
        int, typer.Option(metavar="N", min=1, help="Largest gap to measure, in steps.")
    ] = 3,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Compare about this many tokens of each output. Default: all."
        ),
    ] = None,
    granularity: GrainOption = Grain.auto,
    as_json: AsJson = False,
) -> None:
    """Measure on a few samples what reusing each layer would cost.

    Prompts or class labels are used in turn. With torchrun or accelerate launch, samples are shared
    out over ranks, with the same result. Plan with the file for as many thresholds as you
    like; it fits the number of steps that it was made with.

    [bold]Example:[/bold] smoothcache calibrate ./my-dit -o dit.safetensors --class-label 0
    """
    check_output_file(output)
    pipeline = setup.load(model)
    sampler = setup.sampler(pipeline, steps)
    started = time.perf_counter()
    calibration = run_calibration(
        pipeline,
        sampler,
        samples,
        max_gap,
        granularity=granularity.value,
        tokens=tokens,
        over_ranks=True,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - started
    is_first = rank_and_size()[0] == 0
    leave_processes()
    if not is_first:
        return
    calibration.save(output)
    if as_json:
        show_json(
            {
                "file": str(output),
                "samples": calibration.num_samples,
                "steps": calibration.num_steps,
                "max_gap": calibration.max_gap,
                "kinds": tables.kinds(calibration.layers, calibration.total_macs),
                "macs_per_step": calibration.total_macs,
                "peak_bytes": calibration.peak_bytes,
                "seconds": seconds,
                "left_out": calibration.provenance.get("left_out", ""),
            }
        )
        return
    show(str(calibration))
    show(
        f"{seconds:.1f} s, at most {calibration.peak_bytes / 2**20:.1f} MiB of outputs kept; "
        f"written to {output}"
    )
