"""``smoothcache demo``: the whole method on a trained pipeline."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer.core

from ...demo.course import PAGE
from ...diffusers_io.loading import silence_libraries
from ..app import app
from ..inputs import AsJson, Modality, Seed
from ..outputs import check_output_folder, show, show_report, status_line, to_stderr


@app.command()
def demo(
    modality: Annotated[
        Modality, typer.Option("--modality", help="What the pipeline makes.")
    ] = Modality.image,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for pictures and tables. Default: out/demo, or out/demo-MODALITY.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Samples each way, a multiple of 10 images, 12 clips or 20 sounds. Default: 100 "
            "images, 48 clips, or 40 sounds.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Solver steps of the uncached run. Default: 50 for images, 30 for video, 100 for "
            "audio.",
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run the whole method on a small trained pipeline that comes with smoothcache.

    Calibrates, plans, and compares schedules with the uncached run and with plain fewer steps.

    [bold]Example:[/bold] smoothcache demo --modality video --samples 24
    """
    name = modality.value
    folder = output or Path("out", "demo" if modality is Modality.image else f"demo-{name}")
    check_output_folder(folder)
    run_demo = importlib.import_module(f"smoothcache.demo.{name}").run_demo
    chosen = {"num_samples": samples, "num_steps": steps}

    with status_line("starting"):
        silence_libraries()
    result = run_demo(
        folder,
        **{option: value for option, value in chosen.items() if value is not None},
        seed=seed,
        progress=sys.stderr.isatty(),
        tell=to_stderr,
    )
    if as_json:
        typer.echo(result.report.to_json())
        return
    show_report(result.report)
    show(f"pictures, tables, calibration and schedules: {result.folder}")
    show(f"open the report: {result.folder / PAGE}")
