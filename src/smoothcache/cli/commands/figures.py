"""``smoothcache figures``: the paper's figures from the results of runs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer.core

from ...evaluation.figures import draw_figures
from ..app import app
from ..inputs import AsJson, Dtype, load_model
from ..outputs import check_output_folder, show, show_json, status_line


class Ending(str, Enum):
    """Format of the pictures."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


@app.command()
def figures(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the pictures.")
    ],
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Folders that evaluate, or a script of the paper's tables, wrote.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Draw which layers of this pipeline are eligible."),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option("--calibration", metavar="FILE", help="What calibrate wrote. Repeatable."),
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples in a picture, at most.")
    ] = 8,
    ending: Annotated[Ending, typer.Option("--format", help="Of the pictures.")] = Ending.png,
    as_json: AsJson = False,
) -> None:
    """Draw the paper's figures: samples, error curves, eligible layers, compute, spectrograms.

    [bold]Example:[/bold] smoothcache figures out/reproduce-table1 --model ./my-dit -o figures
    """
    check_output_folder(output)
    pipeline = None if model is None else load_model(model, "cpu", Dtype.float32)
    with status_line("drawing"):
        paths = draw_figures(
            runs or [],
            output,
            model=pipeline,
            calibrations=calibration or [],
            num_samples=samples,
            ending=ending.value,
        )
    if as_json:
        show_json({"files": [str(path) for path in paths]})
        return
    show(f"{len(paths)} picture(s): {', '.join(map(str, paths))}")
