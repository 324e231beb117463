"""The options of models and of sampling, defined once; a file can hold them instead.

A command takes them all by one parameter: ``setup: Setup``, under the decorator ``with_setup``.
"""

from __future__ import annotations

import difflib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer.core

from ..checks import listed
from ..diffusers_io.call_arguments import call_arguments, check_name
from ..diffusers_io.sampler import PipelineSampler, steps_to_ask_for
from ..errors import InvalidArgumentError
from ..files.document import write_atomically
from ..generation.prompts import read_prompts
from ..optional import optional_module
from .inputs import (
    MODEL,
    SAMPLING,
    Classes,
    ClassLabels,
    Device,
    Dtype,
    DtypeOption,
    Guidance,
    Prompts,
    Seed,
    class_labels_of,
    load_model,
)
from .outputs import check_output_file
from .sources import images_of

MOST_BYTES = 2**20  # of a file of options
FILES = "Files of options"
CONFIG, SAVE_CONFIG = "config", "save_config"
NOT_KEPT = {CONFIG, SAVE_CONFIG, "as_json"}


class Offload(str, Enum):
    """Which weights wait in host memory until they are needed."""

    none = "none"
    model = "model"
    sequential = "sequential"
    group = "group"


class Compile(str, Enum):
    """What of a denoiser is compiled."""

    none = "none"
    blocks = "blocks"
    model = "model"


@dataclass(frozen=True)
class Setup:
    """What the shared options say. Each field is an option."""

    prompt: Prompts = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts from a file: txt, a line each; jsonl; csv with a column 'prompt'; or "
            "json, a list of prompts or an object of names and prompts.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            "--negative-prompt",
            metavar="TEXT",
            help="What not to show, for pipelines with guidance.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    class_label: ClassLabels = None
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="Images to start from or be controlled by, used in turn; NAME=DIR for another "
            "argument of the pipeline than its first. Repeatable.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    guidance_scale: Guidance = None
    height: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="In pixels.", rich_help_panel=SAMPLING)
    ] = None
    width: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="In pixels.", rich_help_panel=SAMPLING)
    ] = None
    num_frames: Annotated[
        int | None,
        typer.Option(
            "--num-frames", metavar="N", min=1, help="Of a video.", rich_help_panel=SAMPLING
        ),
    ] = None
    call: Annotated[
        list[str] | None,
        typer.Option(
            "--call",
            metavar="KEY=VALUE",
            help="Any other argument of the pipeline's call. Repeatable.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="CLASS[:KEY=VALUE,...]",
            help="Another noise scheduler of diffusers, configured like the pipeline's own.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    seed: Seed = 0
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Branch, tag or commit on the hub.", rich_help_panel=MODEL
        ),
    ] = None
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of the weight files, such as fp16.", rich_help_panel=MODEL
        ),
    ] = None
    device: Device = None
    dtype: DtypeOption = Dtype.float32
    offload: Annotated[
        Offload,
        typer.Option(help="Keep weights in host memory until needed.", rich_help_panel=MODEL),
    ] = Offload.none
    compile: Annotated[
        Compile,
        typer.Option(
            "--compile",
            help="Compile the repeated blocks of the denoiser, or all of it.",
            rich_help_panel=MODEL,
        ),
    ] = Compile.none
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="BACKEND[:KEY=VALUE,...]",
            help="Quantise the denoiser while loading: bitsandbytes_4bit, bitsandbytes_8bit, "
            "quanto, torchao.",
            rich_help_panel=MODEL,
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:SCALE]",
            help="LoRA weights, of a folder, a file or the hub. Repeatable.",
            rich_help_panel=MODEL,
        ),
    ] = None

    def load(self, model: str) -> Any:
        """The pipeline, with scheduler, adapters, device, offloading and compilation as asked for.

        Args:
            model: A folder, or owner/name on the hub.

        Raises:
            PipelineLoadError: If it cannot be loaded.
            InvalidArgumentError: If an option does not go with it.
            MissingPackageError: If what an option needs is not installed.
        """
        return load_model(
            model,
            self.device,
            self.dtype,
            revision=self.revision,
            variant=self.variant,
            scheduler=self.scheduler,
            offload=self.offload.value,
            compile=self.compile.value,
            quantize=self.quantize,
            loras=tuple(self.lora or ()),
        )

    def with_classes(self, pipeline: Any, classes: Classes | None, num_samples: int) -> Setup:
        """The same with the class labels that ``--classes`` stands for.

        Args:
            pipeline: What ``load`` gave.
            classes: Which labels; None for those that are named.
            num_samples: How many labels are drawn.

        Raises:
            InvalidArgumentError: If labels are named as well, or the pipeline names no classes.
        """
        labels = class_labels_of(pipeline, self.class_label, classes, num_samples, self.seed)
        return replace(self, class_label=list(labels))

    def sampler(
        self, pipeline: Any, steps: int | None, *, runs: int | None = None
    ) -> PipelineSampler:
        """Runs the pipeline with the inputs that were given.

        Args:
            pipeline: What ``load`` gave.
            steps: Solver steps to ask for; None for the pipeline's own, or for as many as make
                ``runs``.
            runs: Steps that a schedule was made for.

        Raises:
            FileFormatError: If the file of prompts cannot be read.
            InvalidArgumentError: If the pipeline does not take what is given, or needs more.
        """
        options = self._call_options(pipeline)
        if steps is None and runs is not None:
            steps = steps_to_ask_for(pipeline, runs, options)
        return PipelineSampler(
            pipeline,
            (*(self.prompt or ()), *self._of_file[0]),
            tuple(self.class_label or ()),
            steps,
            self.guidance_scale,
            self.seed,
            options,
            images_of(pipeline, self.images or ()),
        )

    def names(self) -> tuple[str, ...]:
        """Names of the prompts, for the names of files; empty if the file of prompts gives none.

        Raises:
            FileFormatError: If the file of prompts cannot be read.
            InvalidArgumentError: If only some prompts have names.
        """
        names = self._of_file[1]
        if names and self.prompt:
            raise InvalidArgumentError(
                f"the prompts in '{self.prompts}' have names, and those of --prompt have none; "
                "write them into the file too"
            )
        return names

    def any_sampler(self, pipeline: Any, steps: int) -> PipelineSampler:
        """The same for when only the cost matters: inputs that are not given are made up.

        Args:
            pipeline: What ``load`` gave.
            steps: Solver steps.
        """
        if self.prompt or self.prompts or self.class_label:
            return self.sampler(pipeline, steps)
        return PipelineSampler.with_any_input(
            pipeline,
            steps,
            guidance_scale=self.guidance_scale,
            options=self._call_options(pipeline),
            images=images_of(pipeline, self.images or ()),
        )

    @cached_property
    def _of_file(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The prompts of the file, and their names."""
        return read_prompts(self.prompts) if self.prompts else ((), ())

    def _call_options(self, pipeline: Any) -> dict[str, Any]:
        names = ("negative_prompt", "height", "width", "num_frames")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        for name in given:
            check_name(pipeline, name, f"--{name.replace('_', '-')}")
        return {**given, **call_arguments(pipeline, self.call or (), set_elsewhere=given)}


def with_setup(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter ``setup: Setup`` becomes all shared options.

    It also takes ``--config`` and ``--save-config``, as does a command without a setup.
    """
    hints = get_type_hints(command, include_extras=True)
    own = inspect.signature(command)
    shared = list(_shared_parameters()) if hints.get("setup") is Setup else []
    kept = [
        parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "setup"
    ]
    last = [x for x in kept if x.name == "as_json"]
    parameters = [*(x for x in kept if x not in last), *shared, *_file_parameters(), *last]

    def run(**values: Any) -> None:
        values.pop(CONFIG)
        target = values.pop(SAVE_CONFIG)
        written = b""
        if target is not None:
            check_output_file(target)
            defaults = {x.name: x.default for x in parameters}
            written = _toml(values, defaults, {x.name for x in shared}, command.__name__)
        if shared:
            values["setup"] = Setup(**{x.name: values.pop(x.name) for x in shared})
        command(**values)
        if target is not None:  # what did not run is nothing to run again
            write_atomically(target, written)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {x.name: x.annotation for x in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _shared_parameters() -> list[inspect.Parameter]:
    hints = get_type_hints(Setup, include_extras=True)
    return [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if one.default is MISSING else one.default,
            annotation=hints[one.name],
        )
        for one in fields(Setup)
    ]


def _file_parameters() -> list[inspect.Parameter]:
    read = typer.Option(
        "--config",
        metavar="FILE",
        help="Read options from a TOML file; those of the command line come first.",
        is_eager=True,
        callback=_use_config,
        rich_help_panel=FILES,
    )
    write = typer.Option(
        "--save-config",
        metavar="FILE",
        help="Write the options that are used as a TOML file.",
        rich_help_panel=FILES,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    options = {CONFIG: read, SAVE_CONFIG: write}
    return [
        inspect.Parameter(name, kind, default=None, annotation=Annotated[Path | None, option])
        for name, option in options.items()
    ]


# ---------------------------------------------------------------------------------- the TOML file
def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Takes the values of a file for those that the command line does not give."""
    if path is not None and context.info_name is not None:
        values = _read_toml(path)
        groups = _commands(context)
        context.default_map = _values_for(context.info_name, values, groups, path)
    return path


def _commands(context: typer.Context) -> dict[str, dict[str, str]]:
    """Name of a command -> key in a file -> name of its parameter."""
    group: Any = context.parent.command if context.parent else None
    return {
        name: {key: x.name for x in command.params for key in _keys(x)}
        for name, command in group.commands.items()
    }


def _keys(parameter: Any) -> set[str]:
    """What a parameter is called in a file: its name, or its long option without the dashes."""
    if parameter.name in NOT_KEPT or parameter.name == "help":
        return set()
    names = {parameter.name}
    names |= {x.removeprefix("--") for x in parameter.opts if x.startswith("--")}
    return names | {name.replace("_", "-") for name in names}


def _values_for(
    command: str, values: Mapping[str, Any], commands: Mapping[str, Mapping[str, str]], path: Path
) -> dict[str, Any]:
    """What a file says for one command: what is above all tables, then what is in its own."""
    own = commands[command]
    known = {key for keys in commands.values() for key in keys}
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            if key not in commands:
                raise InvalidArgumentError(
                    f"{path}: there is no command '{key}'; the tables of a file are named like "
                    f"commands: {listed(sorted(commands), 20)}"
                )
            for name in value:
                _check_key(path, f"{key}.{name}", name, commands[key])
            continue
        _check_key(path, key, key, known)
        if key in own:
            chosen[own[key]] = _checked(path, key, value)
    for key, value in values.get(command, {}).items():
        chosen[own[key]] = _checked(path, f"{command}.{key}", value)
    return chosen


def _check_key(path: Path, place: str, key: str, known: Any) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, list(known), 3)
        there_are = f"there are {listed(sorted(x for x in known if '_' not in x), 99)}"
        hint = f"did you mean {listed(close)}?" if close else there_are
        raise InvalidArgumentError(f"{path}: there is no option '{place}'; {hint}")


def _checked(path: Path, place: str, value: Any) -> Any:
    """A value as an option can have it: text, a number, yes or no, or a list of these."""
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, str | int | float | bool):
            raise InvalidArgumentError(
                f"{path}: the option '{place}' must be a text, a number, true or false, or a list "
                f"of these, got {type(part).__name__}"
            )
    return value


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidArgumentError(f"there is no file '{path}' to read options from")
    if path.stat().st_size > MOST_BYTES:
        raise InvalidArgumentError(f"'{path}' is too large for a file of options")
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    toml = optional_module(name, extra="cli")
    try:
        values: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"'{path}' is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    except ValueError as error:
        raise InvalidArgumentError(f"'{path}' is not valid TOML: {error}") from error
    return values


def _toml(
    values: Mapping[str, Any], defaults: Mapping[str, Any], shared: set[str], command: str
) -> bytes:
    """Options that differ from their defaults: shared ones above, those of the command below."""
    used = {
        name: value
        for name, value in values.items()
        if name not in NOT_KEPT and value not in (None, [], ()) and value != defaults[name]
    }
    common = {*shared, "model"}
    above = [_line(name, value) for name, value in used.items() if name in common]
    below = [_line(name, value) for name, value in used.items() if name not in common]
    table = [f"\n[{command}]", *below] if below else []
    return "\n".join([*above, *table, ""]).lstrip("\n").encode("utf-8")


def _line(name: str, value: Any) -> str:
    return f"{name.replace('_', '-')} = {_written(value)}"


def _written(value: Any) -> str:
    if isinstance(value, Enum):
        return _written(value.value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # Basic strings of TOML have the escapes of JSON, and one character more to escape.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
