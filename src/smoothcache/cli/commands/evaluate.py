"""``smoothcache evaluate``: metrics of a folder of samples, or of schedules side by side."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer.core

from ...diffusers_io.sampler import sampling_rate
from ...errors import InvalidArgumentError
from ...evaluation.evaluate import evaluate as run_evaluation
from ...evaluation.schedules import UNCACHED, Candidate, evaluate_schedules, folder_name
from ...evaluation.source import first_samples
from ...evaluation.table import EvaluationRow, EvaluationTable, check_endings
from ...processes import from_rank_zero, join_processes, leave_processes, rank_and_size
from ..app import app
from ..inputs import (
    AsJson,
    ClassesOption,
    Html,
    LayoutOption,
    own_device,
    variants_of_files,
)
from ..options import Setup, with_setup
from ..outputs import check_html_file, check_output_file, check_output_folder, show, write_html

if TYPE_CHECKING:
    from ...report.page import Page


@app.command()
@with_setup
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIR|MODEL",
            help="A folder of samples; or, with --num-samples, a pipeline to generate them with.",
            show_default=False,
        ),
    ],
    setup: Setup,
    metrics: Annotated[
        str, typer.Option(metavar="NAMES", help="Separated by commas, for example fid,sfid,is.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="STATS|DIR", help="Statistics (.npz), real samples, or the uncached ones."
        ),
    ] = None,
    schedule: Annotated[
        list[Path] | None,
        typer.Option("--schedule", metavar="FILE", help="Beside the uncached run. Repeatable."),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", "-n", metavar="N", min=1, help="Of each schedule."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for samples and tables."),
    ] = None,
    table: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Also write the table: .json or .md. Repeatable."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Weights of a network, for example inception=FILE. Repeatable. Default: they are "
            "downloaded once.",
        ),
    ] = None,
    num_groups: Annotated[
        int,
        typer.Option("--groups", metavar="N", min=1, help="For the spread of FID; 1 for none."),
    ] = 10,
    split_size: Annotated[
        int, typer.Option("--split-size", metavar="N", min=2, help="Of the Inception Score.")
    ] = 5000,
    subset_size: Annotated[
        int, typer.Option("--subset-size", metavar="N", min=2, help="Of KID.")
    ] = 1000,
    vbench_command: Annotated[
        str,
        typer.Option("--vbench", metavar="COMMAND", help="Runs VBench in its own environment."),
    ] = "",
    classes: ClassesOption = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Samples in one batch.")
    ] = 1,
    layout: LayoutOption = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Steps of the uncached run. Default: those of the schedules."
        ),
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Measure samples as papers do: of a folder, or generated under each schedule.

    With torchrun or accelerate launch, samples and features are shared out over ranks. An
    evaluation that was broken off goes on.

    [bold]Example:[/bold] smoothcache evaluate samples --reference VIRTUAL_imagenet256_labeled.npz
    --metrics fid,sfid,is
    """
    files = list(table or ())
    check_endings(files)
    for file in files:
        check_output_file(file)
    check_html_file(html)
    wanted = [name.strip() for name in metrics.split(",") if name.strip()]
    settings: dict[str, Any] = {
        "weights": _weights(weights or []),
        "device": setup.device or own_device() or "cpu",
        "num_groups": num_groups,
        "split_size": split_size,
        "subset_size": subset_size,
        "vbench_command": shlex.split(vbench_command),
        "progress": sys.stderr.isatty(),
    }
    pipeline: Any = None
    folders: dict[str, Path] = {}  # name of a row -> its samples
    join_processes()
    try:
        if num_samples is None:
            if schedule:
                raise InvalidArgumentError("to generate under a schedule, give --num-samples")
            results = run_evaluation(target, reference, wanted, **settings)
            made = EvaluationTable((EvaluationRow(Path(target).name, results=results),))
        else:
            if output is None:
                raise InvalidArgumentError("give a folder for the samples with --output")
            check_output_folder(output)
            variants = variants_of_files(schedule or [])
            names = setup.names()
            pipeline = setup.load(target)
            setup = setup.with_classes(pipeline, classes, num_samples)
            planned = [x.schedule.num_steps for x in variants if x.schedule]
            sampler = setup.sampler(pipeline, steps, runs=max(planned, default=None))
            candidates = [Candidate(UNCACHED), *(Candidate(x.name, x.schedule) for x in variants)]
            folders = {x.name: output / folder_name(x.name) for x in candidates}
            made = evaluate_schedules(
                sampler,
                candidates,
                output,
                num_samples,
                wanted,
                reference,
                batch_size=batch_size,
                layout=None if layout is None else layout.value,
                names=names,
                title=Path(target).name,
                **settings,
            )
            files += [output / f"table{ending}" for ending in (".json", ".md")]
        from_rank_zero(lambda: made.save(*files))
        is_first = rank_and_size()[0] == 0
    finally:
        leave_processes()
    if not is_first:
        return
    if html is not None:
        write_html(html, _page(made, target, pipeline, folders))
        files.append(html)
    if as_json:
        typer.echo(made.to_json().rstrip("\n"))
        return
    show(str(made))
    if files:
        show(f"written to {', '.join(map(str, files))}")


def _page(made: EvaluationTable, target: str, pipeline: Any, folders: Mapping[str, Path]) -> Page:
    """The report: the table, and the first samples of every row."""
    from ...report import environment, table_page
    from ...report.pages import MOST_SAMPLES

    samples = {name: first_samples(folder, MOST_SAMPLES) for name, folder in folders.items()}
    return table_page(
        made,
        title=f"Evaluation of {Path(target).name}",
        samples=samples,
        sampling_rate=sampling_rate(pipeline),
        environment=environment(pipeline),
    )


def _weights(given: list[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path:
            raise InvalidArgumentError(f"weights are given as NAME=PATH, got '{text}'")
        pairs[name] = path
    return pairs
