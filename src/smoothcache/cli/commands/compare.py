"""``smoothcache compare``: ways of sampling side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer.core

from ...diffusers_io.sampler import sampling_rate
from ...errors import InvalidArgumentError
from ..app import app
from ..inputs import AsJson, Html, ModelArgument, variants_of_files
from ..options import Setup, with_setup
from ..outputs import (
    check_html_file,
    check_output_folder,
    draw_samples,
    picture_suffix,
    show,
    show_report,
    write_files,
    write_html,
)


@app.command()
@with_setup
def compare(
    model: ModelArgument,
    setup: Setup,
    schedule: Annotated[
        list[Path],
        typer.Option(
            "--schedule", metavar="FILE", help="What plan wrote, or a 0/1 file. Repeatable."
        ),
    ],
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Samples each way. Default: one for each prompt or label."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Steps of the uncached run. Default: those of the schedules."
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also draw the samples side by side: png, svg or pdf, of clips the frames of the "
            "first; or gif, of clips in motion.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Also write the samples, a folder for each row."
        ),
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Set schedules beside the uncached run and beside plain fewer steps, with the same seeds.

    Shows cost, wall clock, peak memory of kept outputs, and how far the samples are from the
    uncached ones. Every schedule is followed by a run of as many fewer steps as cost the same.

    [bold]Example:[/bold] smoothcache compare ./my-dit --schedule dit.json --class-label 3
    """
    from ...comparison.compare import compare as run_comparison

    variants = variants_of_files(schedule)
    kind = None if picture is None else picture_suffix(picture, ("png", "svg", "pdf", "gif"))
    if output is not None:
        check_output_folder(output)
    check_html_file(html)
    pipeline = setup.load(model)
    rate = sampling_rate(pipeline)
    if kind == "gif" and rate is not None:
        raise InvalidArgumentError(
            f"the picture '{picture}' must end in .png, .svg or .pdf: that of sounds does not move"
        )
    longest = max(x.schedule.num_steps for x in variants if x.schedule)
    sampler = setup.sampler(pipeline, steps, runs=longest)
    comparison = run_comparison(
        pipeline,
        sampler,
        variants,
        num_steps=sampler.steps,
        num_samples=samples or sampler.count,
        progress=sys.stderr.isatty(),
    )
    report = comparison.report()
    if as_json:
        typer.echo(report.to_json())
    else:
        show_report(report)
    if output is not None:
        write_files(output, comparison, rate)
    if picture is not None and kind is not None:
        draw_samples(picture, kind, comparison, rate)
    if html is not None:
        from ...report import comparison_page, environment

        page = comparison_page(
            comparison,
            title=f"{type(pipeline).__name__} under a schedule",
            subtitle=model,
            schedules={x.name: x.schedule for x in variants if x.schedule},
            sampling_rate=rate,
            inputs=[str(one) for one in sampler.inputs],
            environment=environment(pipeline),
        )
        write_html(html, page)
    for what, path in {"samples": output, "picture": picture, "report": html}.items():
        if path is not None and not as_json:
            show(f"{what} written to {path}")
