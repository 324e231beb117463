"""Arguments and options that several commands share, and what they stand for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer.core

from ..diffusers_io.loading import known_classes, silence_libraries
from ..diffusers_io.preparing import Preparation, prepared_pipeline
from ..errors import InvalidArgumentError
from ..generation.inputs import random_classes
from ..processes import local_rank
from ..schedule.schedule import Schedule
from .outputs import status_line

if TYPE_CHECKING:
    from ..comparison.compare import Variant


MODEL, SAMPLING = "Model", "Sampling"
"""Headings in the help of a command."""


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


class Classes(str, Enum):
    """Which labels samples have, where not each label is named."""

    all = "all"
    random = "random"


class LayoutName(str, Enum):
    """How samples lie in the folder."""

    npz = "npz"
    png = "png"
    wav = "wav"
    gif = "gif"
    mp4 = "mp4"


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
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="For pipelines that take text. Repeatable.",
        rich_help_panel=SAMPLING,
    ),
]
ClassLabels = Annotated[
    list[int] | None,
    typer.Option(
        "--class-label",
        metavar="INT",
        help="For class-conditional pipelines. Repeatable.",
        rich_help_panel=SAMPLING,
    ),
]
ClassesOption = Annotated[
    Classes | None,
    typer.Option(
        "--classes",
        help="All classes in turn (50,000 samples are 50 of each of 1000), or drawn.",
    ),
]
LayoutOption = Annotated[
    LayoutName | None,
    typer.Option(
        "--layout",
        help="npz: arrays for ADM's evaluator. gif and mp4: files named as VBench asks for. "
        "Default: wav for sounds, otherwise npz.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale",
        metavar="X",
        help="Default: the pipeline's own.",
        rich_help_panel=SAMPLING,
    ),
]
Seed = Annotated[
    int, typer.Option(metavar="N", min=0, help="Sample i starts from the noise of seed + i.")
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="For example cuda or cpu. Default: cuda where there is one.",
        rich_help_panel=MODEL,
    ),
]
GrainOption = Annotated[
    Grain,
    typer.Option(
        "--granularity", help="What is reused as one. Default: layers, and blocks without any."
    ),
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Of the weights.", rich_help_panel=MODEL)
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Also write a report: one HTML file with samples, figures and tables.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


# --------------------------------------------------------------------------------- the library
def variants_of_files(files: Sequence[Path]) -> list[Variant]:
    """The schedules, each named like its file."""
    from ..comparison.compare import Variant

    stems = [file.stem for file in files]
    if len(set(map(str, files))) < len(files):
        raise InvalidArgumentError("the same schedule is given twice")
    return [
        Variant(file.stem if stems.count(file.stem) == 1 else str(file), Schedule.load(file))
        for file in files
    ]


def class_labels_of(
    pipeline: object,
    given: Sequence[int] | None,
    classes: Classes | None,
    num_samples: int,
    seed: int,
) -> tuple[int, ...]:
    """Labels, which are used in turn."""
    if classes is None:
        return tuple(given or ())
    if given:
        raise InvalidArgumentError("give either --class-label or --classes")
    known = known_classes(pipeline)
    if known is None:
        raise InvalidArgumentError("the pipeline does not say which classes it has; name them")
    labels = sorted(known)
    if classes is Classes.all:
        return tuple(labels)
    return tuple(labels[i] for i in random_classes(num_samples, len(labels), seed))


def load_model(model: str, device: str | None, dtype: Dtype, **how: Any) -> Any:
    """A pipeline, set up as asked for and without a progress bar of its own.

    Args:
        model: A folder, or owner/name on the hub.
        device: Where it runs; None for the accelerator, where there is one.
        dtype: Of the weights.
        how: Other attributes of a ``Preparation``.

    Raises:
        PipelineLoadError: If it cannot be loaded.
        InvalidArgumentError: If an option does not go with it.
        MissingPackageError: If what an option needs is not installed.
    """
    import torch

    device = device or own_device()
    with status_line(f"loading {model}"):
        silence_libraries()
        pipeline = prepared_pipeline(model, Preparation(getattr(torch, dtype.value), device, **how))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def own_device() -> str | None:
    """The device of this process: of several on a machine, each has its own."""
    import torch

    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return None
    own = local_rank()
    return "cuda" if own is None else f"cuda:{own % torch.cuda.device_count()}"
