"""``smoothcache plan``: a schedule from a calibration file, without running the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer.core

from ...calibration.curves import Calibration
from ...errors import InvalidArgumentError
from ...planners.threshold import plan as plan_threshold
from ...planners.trajectory import plan_trajectory
from ...steps.resample import CARRIED_OVER
from .. import tables as tables
from ..app import app
from ..inputs import AsJson, Per
from ..options import with_setup
from ..outputs import check_output_file, picture_suffix, show, show_json, to_stderr, write_picture


@app.command()
@with_setup
def plan(
    calibration: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What calibrate wrote.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Schedule to write (JSON).")
    ],
    alpha: Annotated[
        float | None,
        typer.Option(metavar="A", help="Relative L1 error that every reuse must stay below."),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Compute one step in X, chosen from the recorded trajectories, in place of alpha.",
        ),
    ] = None,
    per: Annotated[
        Per, typer.Option(help="Decide for all layers of a kind together, or for each alone.")
    ] = Per.kind,
    max_gap: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Most reuses in a row. Default: all gaps that were measured."
        ),
    ] = None,
    predictor: Annotated[
        str, typer.Option(help="How reused values are made: hold, taylor or taylor2.")
    ] = "hold",
    patterns: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Most different steps, so graphs of a compiled model. Default: any number.",
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-bytes",
            metavar="N",
            min=0,
            help="Most bytes that a run keeps, at the batch that was calibrated. Default: any.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Plan for N solver steps, with errors carried over. Default: those measured.",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the schedule, as png, svg or pdf."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decide what to reuse: every layer for as long as its measured error stays below alpha.

    With --speedup, which steps run the whole model, from the trajectories that were recorded.
    Needs the calibration alone, not the model.

    [bold]Example:[/bold] smoothcache plan dit.safetensors --alpha 0.18 -o dit.json
    """
    if alpha is None and speedup is None:
        raise InvalidArgumentError("Missing option '--alpha' or '--speedup'.")
    measured = Calibration.load(calibration)
    if steps is not None:
        measured = measured.resample(steps)
    planned = partial(
        plan_threshold,
        measured,
        alpha=0.0 if alpha is None else alpha,
        per=per.value,
        max_gap=max_gap,
        predictor=predictor,
        patterns=patterns,
    )
    if alpha is None:
        others = (max_gap, patterns, max_bytes)
        if (per, predictor, *others) != (Per.kind, "hold", None, None, None):
            raise InvalidArgumentError("only --alpha goes with --per, --max-gap and the like")
        schedule = plan_trajectory(measured, speedup=speedup)
    elif speedup is not None:
        raise InvalidArgumentError("give either --alpha or --speedup")
    else:
        schedule = planned(max_bytes=max_bytes)
    check_output_file(output)
    if picture is not None:
        kind = picture_suffix(picture)
        from ...plots.schedule import plot_schedule

        write_picture(plot_schedule(schedule), picture, kind)
    schedule.save(output)
    if as_json:
        show_json(
            {
                "file": str(output),
                "picture": None if picture is None else str(picture),
                "steps": schedule.num_steps,
                "alpha": alpha,
                "speedup": speedup,
                "compute": schedule.compute,
                "layer_steps_reused": schedule.reused,
                "carried_over": schedule.provenance.get(CARRIED_OVER),
                "kinds": tables.computed_by_kind(schedule),
            }
        )
        return
    show(tables.schedule_line(schedule))
    show(tables.schedule_table(schedule))
    show(f"written to {output}" + ("" if picture is None else f" and {picture}"))
    if schedule.is_all_compute and max_bytes is not None and not planned().is_all_compute:
        to_stderr(
            f"note: nothing is reused, as no layer's outputs fit in {max_bytes} bytes; "
            "take a larger --max-bytes"
        )
    elif schedule.is_all_compute and alpha is not None:
        to_stderr(
            f"note: nothing is reused, as no error is below {alpha:g}; take a larger alpha "
            f"(the smallest error measured is {tables.smallest_error(measured):.3g})"
        )
