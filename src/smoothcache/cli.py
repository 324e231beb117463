"""The ``smoothcache`` command: each command reads its options, calls the library, shows the result.

Results go to stdout; progress, warnings and errors to stderr. With ``--json`` nothing but one JSON
document goes to stdout. Bad input ends in one line and exit code 2, Ctrl-C in exit code 130.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import _cli_tables as tables
from . import _files
from ._media import encoded
from ._resample import CARRIED_OVER
from .apply import cached
from .calibrate import calibrate as run_calibration
from .calibration import Calibration
from .costs import human_macs
from .diffusers_io import PipelineSampler, load_pipeline, sampling_rate, silence_libraries
from .errors import InvalidArgumentError, SmoothCacheError, SmoothCacheWarning
from .layers import find_layers, identify
from .planners import plan as plan_threshold
from .schedule import Schedule
from .search import search as run_search
from .version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table
    from torch import Tensor

    from .compare import Comparison, Variant
    from .report import Report

_BAD_INPUT, _INTERRUPTED = 2, 130
_MOST_SHOWN = 8  # samples in a picture


class _OneLineErrors(typer.core.TyperGroup):
    """Ends in one line on stderr for everything that the user can put right."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the packages below us
            warnings.simplefilter("always", SmoothCacheWarning)
            warnings.showwarning = _show_warning
            try:
                code = super().main(
                    args, prog_name, complete_var, False, windows_expand_args, **extra
                )
            except (KeyboardInterrupt, typer.Abort):
                code = _INTERRUPTED
            except (SmoothCacheError, OSError) as error:
                _to_stderr(f"error: {_one_line(error)}")
                code = _BAD_INPUT
            except Exception as error:
                if not hasattr(error, "format_message"):  # not one of the option parser's
                    raise
                _to_stderr(f"error: {_one_line(error.format_message())}")
                code = _BAD_INPUT
        if code == _INTERRUPTED:
            _to_stderr("interrupted")
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Per(str, Enum):
    """For which layers a plan decides together."""

    kind = "kind"
    block = "block"


class Grain(str, Enum):
    """What is reused as one."""

    auto = "auto"
    layer = "layer"
    block = "block"
    model = "model"


class Modality(str, Enum):
    """What the demo samples: names of the modules in `demo`, each with a ``run_demo``."""

    image = "image"
    video = "video"
    audio = "audio"


class Dtype(str, Enum):
    """Of the weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local folder with a diffusers pipeline, or owner/name on the Hugging Face hub.",
        show_default=False,
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="For pipelines that take text. Repeatable."),
]
ClassLabels = Annotated[
    list[int] | None,
    typer.Option(
        "--class-label", metavar="INT", help="For class-conditional pipelines. Repeatable."
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance-scale", metavar="X", help="Default: the pipeline's own."),
]
Seed = Annotated[
    int, typer.Option(metavar="N", min=0, help="Sample i starts from the noise of seed + i.")
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="For example cuda or cpu. Default: cuda where there is one."),
]
GrainOption = Annotated[
    Grain,
    typer.Option(
        "--granularity", help="What is reused as one. Default: layers, and blocks without any."
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Faster sampling from diffusion transformers, without training.

    The way to a faster pipeline: [bold]calibrate[/bold] measures what reusing each layer costs,
    [bold]plan[/bold] decides what to reuse, [bold]generate[/bold] and [bold]compare[/bold] run it.
    """
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


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
    _check_output_folder(folder)
    run_demo = importlib.import_module(f"{__package__}.demo.{name}").run_demo
    chosen = {"num_samples": samples, "num_steps": steps}

    with _status("starting"):
        silence_libraries()
    result = run_demo(
        folder,
        **{option: value for option, value in chosen.items() if value is not None},
        seed=seed,
        progress=sys.stderr.isatty(),
        tell=_to_stderr,
    )
    if as_json:
        typer.echo(result.report.to_json())
        return
    _print_report(result.report)
    _print(f"pictures, tables, calibration and schedules: {result.folder}")


@app.command()
def inspect(
    model: ModelArgument,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    costs: Annotated[
        bool, typer.Option("--costs/--no-costs", help="Run two steps to count what layers cost.")
    ] = True,
    granularity: GrainOption = Grain.auto,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Show which layers of a model can be reused, and their share of its cost.

    Costs are counted while two steps run with some input, in multiply-accumulates (MACs) of one
    step of one sample, guidance included.

    [bold]Example:[/bold] smoothcache inspect ./my-dit --layers
    """
    pipeline = _load(model, device, dtype)
    found, total = find_layers(pipeline, granularity=granularity.value), 0
    if costs:
        sampler = PipelineSampler.with_any_input(pipeline, num_steps=2)
        with _status("running two steps"):
            observed = run_calibration(
                pipeline, sampler, 1, 1, granularity=granularity.value, progress=False
            )
        found = list(observed.layers)
        total = observed.total_macs
    kinds = tables.kinds(found, total)
    identity = identify(pipeline)
    if as_json:
        _print_json(
            {
                "pipeline": type(pipeline).__name__,
                "model": asdict(identity),
                "macs_per_step": total or None,
                "kinds": kinds,
                "layers": [asdict(layer) for layer in found],
            }
        )
        return
    blocks = len({layer.block for layer in found})
    cost = f", {human_macs(total)} a step" if total else ""
    _print(
        f"{type(pipeline).__name__} with {identity.class_name}: "
        f"{len(found)} layers in {blocks} blocks{cost}"
    )
    _print(tables.kinds_table(kinds, total))
    if layers:
        _print(tables.layers_table(found, total))


@app.command()
def calibrate(
    model: ModelArgument,
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
    prompt: Prompts = None,
    class_label: ClassLabels = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Compare about this many tokens of each output. Default: all."
        ),
    ] = None,
    granularity: GrainOption = Grain.auto,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Measure on a few samples what reusing each layer would cost.

    Prompts or class labels are used in turn. Plan with the file for as many thresholds as you
    like; it fits the number of steps that it was made with.

    [bold]Example:[/bold] smoothcache calibrate ./my-dit -o dit.safetensors --class-label 0
    """
    _check_output_file(output)
    pipeline = _load(model, device, dtype)
    sampler = PipelineSampler(
        pipeline, tuple(prompt or ()), tuple(class_label or ()), steps, guidance_scale, seed
    )
    started = time.perf_counter()
    calibration = run_calibration(
        pipeline,
        sampler,
        samples,
        max_gap,
        granularity=granularity.value,
        tokens=tokens,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - started
    calibration.save(output)
    if as_json:
        _print_json(
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
    _print(str(calibration))
    _print(
        f"{seconds:.1f} s, at most {calibration.peak_bytes / 2**20:.1f} MiB of outputs kept; "
        f"written to {output}"
    )


@app.command()
def plan(
    calibration: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What calibrate wrote.", show_default=False),
    ],
    alpha: Annotated[
        float,
        typer.Option(metavar="A", help="Relative L1 error that every reuse must stay below."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Schedule to write (JSON).")
    ],
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

    Needs the calibration alone, not the model.

    [bold]Example:[/bold] smoothcache plan dit.safetensors --alpha 0.18 -o dit.json
    """
    measured = Calibration.load(calibration)
    if steps is not None:
        measured = measured.resample(steps)
    planned = partial(
        plan_threshold,
        measured,
        alpha=alpha,
        per=per.value,
        max_gap=max_gap,
        predictor=predictor,
        patterns=patterns,
    )
    schedule = planned(max_bytes=max_bytes)
    _check_output_file(output)
    if picture is not None:
        kind = _picture_kind(picture)
        from .plots import plot_schedule

        _write_picture(plot_schedule(schedule), picture, kind)
    schedule.save(output)
    if as_json:
        _print_json(
            {
                "file": str(output),
                "picture": None if picture is None else str(picture),
                "steps": schedule.num_steps,
                "alpha": alpha,
                "compute": schedule.compute,
                "layer_steps_reused": schedule.reused,
                "carried_over": schedule.provenance.get(CARRIED_OVER),
                "kinds": tables.computed_by_kind(schedule),
            }
        )
        return
    _print(tables.schedule_line(schedule))
    _print(tables.schedule_table(schedule))
    _print(f"written to {output}" + ("" if picture is None else f" and {picture}"))
    if schedule.is_all_compute and max_bytes is not None and not planned().is_all_compute:
        _to_stderr(
            f"note: nothing is reused, as no layer's outputs fit in {max_bytes} bytes; "
            "take a larger --max-bytes"
        )
    elif schedule.is_all_compute:
        _to_stderr(
            f"note: nothing is reused, as no error is below {alpha:g}; take a larger alpha "
            f"(the smallest error measured is {tables.smallest_error(measured):.3g})"
        )


@app.command()
def search(
    model: ModelArgument,
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
        float,
        typer.Option("--max-cost", metavar="N", help="In uncached generations, for all that runs."),
    ] = 60.0,
    journal: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Results; an interrupted search goes on from it."),
    ] = None,
    prompt: Prompts = None,
    class_label: ClassLabels = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Find the best schedule for a budget by trying, and say whether a cache pays at all.

    Candidates are run for real and compared with the uncached output; the winner is measured
    again on samples that the search has not seen, beside fewer steps and better solvers.

    [bold]Example:[/bold] smoothcache search ./my-dit --speedup 2 -o fast.json --class-label 0
    """
    _check_output_file(output)
    known = None if calibration is None else Calibration.load(calibration)
    pipeline = _load(model, device, dtype)
    sampler = PipelineSampler(
        pipeline, tuple(prompt or ()), tuple(class_label or ()), steps, guidance_scale, seed
    )
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
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    found.save(output)
    result = found.result
    if result is None:
        raise InvalidArgumentError("the search returned no result")
    if as_json:
        _print_json(
            {
                "file": str(output),
                "verdict": result.verdict,
                "rollouts": result.rollouts,
                "cost": result.cost,
                "num_steps": result.num_steps,
                "solver": result.best.solver,
                "best": tables.measured(result.best),
                "honest": [tables.measured(row) for row in result.honest],
                "front": [tables.measured(row) for row in result.front],
            }
        )
        return
    _print(tables.search_table(result))
    _print(result.verdict)
    _print(
        f"{result.rollouts} rollouts, as much as {result.cost:.1f} uncached generations; "
        f"written to {output}"
    )


@app.command()
def generate(
    model: ModelArgument,
    schedule: Annotated[
        Path, typer.Option("--schedule", metavar="FILE", help="What plan wrote, or a 0/1 file.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the samples.")
    ],
    prompt: Prompts = None,
    class_label: ClassLabels = None,
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
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline under a schedule; write images as PNG, clips as GIF, sounds as WAV.

    [bold]Example:[/bold] smoothcache generate ./my-dit --schedule dit.json --class-label 3 -o out
    """
    planned = Schedule.load(schedule)
    _check_output_folder(output)
    pipeline = _load(model, device, dtype)
    sampler = PipelineSampler(
        pipeline,
        tuple(prompt or ()),
        tuple(class_label or ()),
        planned.num_steps if steps is None else steps,
        guidance_scale,
        seed,
    )
    files: list[Path] = []
    started = time.perf_counter()
    with cached(pipeline, planned) as run:
        for i in _tracked(range(samples or max(1, len(sampler.inputs))), "generating"):
            files += _write_samples(output, i, sampler(i), sampling_rate(pipeline))
    seconds = time.perf_counter() - started
    summary = run.summary()
    if as_json:
        counts = {name: value for name, value in vars(summary).items() if name != "schedule"}
        _print_json(
            {
                "files": [str(file) for file in files],
                "seconds": seconds,
                "compute": summary.schedule.compute,
                **counts,
            }
        )
        return
    _print(str(summary))
    _print(f"{len(files)} file(s) in {seconds:.1f} s, written to {output}")


@app.command()
def compare(
    model: ModelArgument,
    schedule: Annotated[
        list[Path],
        typer.Option(
            "--schedule", metavar="FILE", help="What plan wrote, or a 0/1 file. Repeatable."
        ),
    ],
    prompt: Prompts = None,
    class_label: ClassLabels = None,
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
    guidance_scale: Guidance = None,
    seed: Seed = 0,
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
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Set schedules beside the uncached run and beside plain fewer steps, with the same seeds.

    Shows cost, wall clock, peak memory of kept outputs, and how far the samples are from the
    uncached ones. Every schedule is followed by a run of as many fewer steps as cost the same.

    [bold]Example:[/bold] smoothcache compare ./my-dit --schedule dit.json --class-label 3
    """
    from .compare import compare as run_comparison

    variants = _variants(schedule)
    kind = None if picture is None else _picture_kind(picture, ("png", "svg", "pdf", "gif"))
    if output is not None:
        _check_output_folder(output)
    pipeline = _load(model, device, dtype)
    rate = sampling_rate(pipeline)
    if kind == "gif" and rate is not None:
        raise InvalidArgumentError(
            f"the picture '{picture}' must end in .png, .svg or .pdf: that of sounds does not move"
        )
    sampler = PipelineSampler(
        pipeline,
        tuple(prompt or ()),
        tuple(class_label or ()),
        steps or max(x.schedule.num_steps for x in variants if x.schedule),
        guidance_scale,
        seed,
    )
    comparison = run_comparison(
        pipeline,
        sampler,
        variants,
        num_steps=sampler.steps,
        num_samples=samples or max(1, len(sampler.inputs)),
        progress=sys.stderr.isatty(),
    )
    report = comparison.report()
    if as_json:
        typer.echo(report.to_json())
    else:
        _print_report(report)
    if output is not None:
        _write_all(output, comparison, rate)
    if picture is not None and kind is not None:
        _draw_samples(picture, kind, comparison, rate)
    for what, path in {"samples": output, "picture": picture}.items():
        if path is not None and not as_json:
            _print(f"{what} written to {path}")


@app.command()
def benchmark(
    model: ModelArgument,
    prompt: Prompts = None,
    class_label: ClassLabels = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Samples each way. Default: one for each prompt or label."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Solver steps. Default: the pipeline's own."),
    ] = None,
    search: Annotated[
        list[float] | None,
        typer.Option(
            "--search", metavar="X", help="Also search for this fraction of the MACs. Repeatable."
        ),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Search over solvers and numbers of steps as well.")
    ] = False,
    max_cost: Annotated[
        float,
        typer.Option("--max-cost", metavar="N", help="Of each search, in uncached generations."),
    ] = 60.0,
    converged: Annotated[
        bool,
        typer.Option(
            "--converged/--no-converged", help="Also compare with ten times as many steps."
        ),
    ] = True,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Results to write (JSON)."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw cost and quality, as png, svg or pdf."),
    ] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Measure every method that needs no training on your own pipeline, at many costs.

    Fewer steps, better solvers, FORA, Taylor extrapolation, SmoothCache and, if asked for, a
    search, with the same seeds. Multiply-accumulates are counted while they run.

    [bold]Example:[/bold] smoothcache benchmark ./my-dit --class-label 0 --search 0.3
    """
    from . import methods
    from .benchmark import run_benchmark
    from .compare import REFERENCE
    from .plots import plot_methods

    budgets = methods.checked_budgets(search or ())
    if joint and not budgets:
        raise InvalidArgumentError(
            "--joint says how to search, and nothing is searched for; add --search 0.5, say, for "
            "half the multiply-accumulates."
        )
    if output is not None:
        _check_output_file(output)
    kind = None if picture is None else _picture_kind(picture)
    pipeline = _load(model, device, dtype)
    case = methods.pipeline_case(
        PipelineSampler(
            pipeline, tuple(prompt or ()), tuple(class_label or ()), steps, guidance_scale, seed
        )
    )
    shown = sys.stderr.isatty()
    calibration = methods.calibrated(case, methods.CALIBRATION_SAMPLES, progress=shown)
    entries = methods.training_free(case, calibration)
    entries += methods.searched(case, budgets, max_cost=max_cost)
    if joint:
        entries += methods.searched(case, budgets, joint=True, max_cost=max_cost)
    inputs = len(prompt or class_label or ()) or 1
    result = run_benchmark(
        case, entries, num_generations=samples or inputs, converged=converged, progress=shown
    )
    report = result.report()
    if output is not None:
        _files.write_atomically(output, f"{report.to_json()}\n".encode())
    if picture is not None and kind is not None:
        own = (methods.SEARCH, methods.JOINT)
        rows = [row for row in result.rows if row.family != REFERENCE]
        drawn = plot_methods(rows, emphasised=own, title=result.name)
        _write_picture(drawn, picture, kind)
    if as_json:
        typer.echo(report.to_json())
        return
    _print_report(report)
    for file in filter(None, (output, picture)):
        _print(f"written to {file}")


# --------------------------------------------------------------------------------- the library


def _variants(files: Sequence[Path]) -> list[Variant]:
    """The schedules, each named like its file."""
    from .compare import Variant

    stems = [file.stem for file in files]
    if len(set(map(str, files))) < len(files):
        raise InvalidArgumentError("the same schedule is given twice")
    return [
        Variant(file.stem if stems.count(file.stem) == 1 else str(file), Schedule.load(file))
        for file in files
    ]


def _load(model: str, device: str | None, dtype: Dtype) -> Any:
    import torch

    with _status(f"loading {model}"):
        silence_libraries()
        pipeline = load_pipeline(
            model,
            dtype=getattr(torch, dtype.value),
            device=device or ("cuda" if torch.cuda.is_available() else None),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _picture_kind(picture: Path, kinds: Sequence[str] = ("png", "svg", "pdf")) -> str:
    """The format that the name of a picture asks for; refuses a place that cannot be written."""
    kind = picture.suffix.lstrip(".").lower()
    if kind not in kinds:
        endings = ", ".join(f".{kind}" for kind in kinds[:-1])
        raise InvalidArgumentError(f"the picture '{picture}' must end in {endings} or .{kinds[-1]}")
    _check_output_file(picture)
    return kind


def _write_picture(figure: Figure, path: Path, kind: str) -> None:
    data = io.BytesIO()
    figure.savefig(data, format=kind)
    _files.write_atomically(path, data.getvalue())


def _write_samples(
    folder: Path, index: int, samples: Tensor, sampling_rate: int | None
) -> list[Path]:
    """Writes a batch of images as PNG files, of clips as animated GIF files, of sounds as WAV."""
    written = []
    for number, sample in enumerate(samples):
        ending, data = encoded(sample, sampling_rate)
        name = f"{index:04d}" if len(samples) == 1 else f"{index:04d}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{name}.{ending}")
        _files.write_atomically(written[-1], data)
    return written


def _write_all(folder: Path, comparison: Comparison, rate: int | None) -> None:
    """Writes the samples of every row into a folder of its own."""
    for row, samples in comparison.images.items():
        place = folder / re.sub(r"[^\w.-]+", "-", row).strip("-.")
        for i, sample in enumerate(samples):
            _write_samples(place, i, sample[None], rate)


def _draw_samples(picture: Path, kind: str, comparison: Comparison, rate: int | None) -> None:
    """Draws the first samples of every row; of a clip its frames, unless the picture moves."""
    from . import plots

    first = {row: samples[:_MOST_SHOWN] for row, samples in comparison.images.items()}
    (_, reference), *rows = first.items()
    if reference.ndim == 3:
        if rate is None:
            raise InvalidArgumentError(
                f"'{picture}' is not drawn: the pipeline does not say how many samples of a sound "
                "make a second"
            )
        _write_picture(plots.plot_spectrograms(rows, reference, rate), picture, kind)
    elif kind == "gif":
        if reference.ndim == 4:  # images are clips of one frame
            rows, reference = [(row, x[:, None]) for row, x in rows], reference[:, None]
        plots.animate_clip_grid(rows, reference, picture)
    else:
        if reference.ndim == 5:
            rows, reference = [(row, x[0]) for row, x in rows], reference[0]
        _write_picture(plots.plot_image_grid(rows, reference), picture, kind)


# ----------------------------------------------------------------------------------- the files


def _check_output_file(path: Path) -> None:
    """Refuses before long work what could not be written after it."""
    if path.is_dir():
        raise InvalidArgumentError(f"cannot write '{path}': it is a folder")
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"cannot write '{path}': there is no folder '{path.parent}'")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InvalidArgumentError(f"cannot write '{path}': the folder is not writable")


def _check_output_folder(path: Path) -> None:
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InvalidArgumentError(f"cannot write to '{path}': '{existing}' is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InvalidArgumentError(f"cannot write to '{path}': '{existing}' is not writable")


# -------------------------------------------------------------------------------- the terminal


def _print(what: str | Table) -> None:
    """Shows a text or a table: wrapped in a terminal, one line a line elsewhere."""
    is_terminal = sys.stdout.isatty()
    _console().print(what, soft_wrap=isinstance(what, str) and not is_terminal)


def _console() -> Console:
    """Of stdout; as wide as any table where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False)


def _print_report(report: Report) -> None:
    if report.title:
        _print(report.title)
    for table in tables.report_tables(report, _console().width):
        _print(table)
    for note in report.notes:
        _print(note)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


@contextmanager
def _status(text: str) -> Iterator[None]:
    """Says what is going on, in a terminal, for as long as it does."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def _tracked(numbers: range, text: str) -> Iterator[int]:
    """The numbers, with a progress bar in a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(numbers)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _to_stderr(f"warning: {_one_line(message)}")


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")
