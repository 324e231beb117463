"""A pipeline made ready to run: solver, adapters, quantisation, offloading, compilation."""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..checks import listed
from ..errors import InvalidArgumentError, MissingPackageError
from ..model.target import Target
from .call_arguments import typed
from .loading import HUB_ID, INDEX, first_sentence, load_pipeline, moved

QUANTISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bitsandbytes_4bit": ("bitsandbytes", {"load_in_4bit": True}),
    "bitsandbytes_8bit": ("bitsandbytes", {"load_in_8bit": True}),
    "quanto": ("optimum.quanto", {"weights_dtype": "int8"}),
    "torchao": ("torchao", {"quant_type": "int8wo"}),
}
"""Name of a backend of diffusers -> the package that it needs, and what it is asked for."""
PACKAGES = {"optimum.quanto": "optimum-quanto"}
DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class Preparation:
    """How a pipeline is to be loaded and set up.

    Attributes:
        dtype: Of the weights; None for float32.
        device: Where it runs; None for the CPU.
        revision: Branch, tag or commit on the hub; None for the newest.
        variant: Of the files of weights; None for the plain ones.
        scheduler: Another noise scheduler, ``CLASS[:key=value,...]``; None for the pipeline's own.
        offload: "none", "model", "sequential" or "group".
        compile: "none", "blocks" or "model".
        quantize: ``BACKEND[:key=value,...]``; None for weights as they are.
        loras: Adapters to load, ``PATH[:SCALE]`` each.
    """

    dtype: torch.dtype | None = None
    device: str | None = None
    revision: str | None = None
    variant: str | None = None
    scheduler: str | None = None
    offload: str = "none"
    compile: str = "none"
    quantize: str | None = None
    loras: tuple[str, ...] = ()


def prepared_pipeline(name_or_path: str, how: Preparation) -> Any:
    """Loads a pipeline and sets it up.

    Args:
        name_or_path: A folder that ``save_pretrained`` wrote, or ``owner/name`` on the hub.
        how: What to do with it.

    Returns:
        The pipeline, on its device.

    Raises:
        PipelineLoadError: If it cannot be loaded.
        InvalidArgumentError: If what is asked for does not go with it.
        MissingPackageError: If a backend of quantisation, or peft, is not installed.

    Example:
        >>> from smoothcache.demo.image import FOLDER
        >>> pipeline = prepared_pipeline(str(FOLDER), Preparation(scheduler="DDIMScheduler:eta=0"))
        Traceback (most recent call last):
        ...
        smoothcache.errors.InvalidArgumentError: --scheduler: DDIMScheduler takes no 'eta'; ...
    """
    _check_offload(how)
    options: dict[str, Any] = {}
    if how.quantize is not None:
        options["quantization_config"] = quantisation(how.quantize, _parts(name_or_path))
    pipeline = load_pipeline(
        name_or_path, dtype=how.dtype, revision=how.revision, variant=how.variant, **options
    )
    if how.scheduler is not None:
        pipeline.scheduler = other_scheduler(pipeline, how.scheduler)
    if how.loras:
        load_loras(pipeline, how.loras)
    if how.offload != "none":
        offload(pipeline, how.offload, how.device)
    elif how.device is not None:
        moved(pipeline, how.device)
    if how.compile != "none":
        compile_denoisers(pipeline, how.compile)
    return pipeline


def other_scheduler(pipeline: Any, text: str) -> Any:
    """A noise scheduler of diffusers, configured like the pipeline's own.

    Args:
        pipeline: Whose noise scheduler it takes the place of.
        text: ``CLASS``, or ``CLASS:key=value,...`` with what is to differ.

    Raises:
        InvalidArgumentError: If there is no such class, or it takes no such argument.
    """
    import diffusers

    name, values = _specification(text)
    base: Any = diffusers.SchedulerMixin
    cls: Any = getattr(diffusers, name, None) if name.isidentifier() else None
    is_one: bool = inspect.isclass(cls) and issubclass(cls, base)
    if not is_one:
        own = getattr(pipeline, "scheduler", None)
        similar = sorted({x.__name__ for x in getattr(own, "compatibles", [])})
        raise InvalidArgumentError(
            f"--scheduler: diffusers has no noise scheduler {name!r}; of the kind of "
            f"{type(own).__name__} it has {listed(similar, 30) or 'no other'}"
        )
    takes = inspect.signature(cls.__init__).parameters
    for key in values:
        if key not in takes:
            known = [x for x in takes if x != "self"]
            raise InvalidArgumentError(
                f"--scheduler: {name} takes no {key!r}; it takes {listed(known, 40)}"
            )
    try:
        return cls.from_config(pipeline.scheduler.config, **values)
    except Exception as error:  # whatever a configuration can do to a class of diffusers
        raise InvalidArgumentError(
            f"--scheduler: {name} cannot take the place of {type(pipeline.scheduler).__name__}: "
            f"{first_sentence(error)}"
        ) from error


def quantisation(text: str, parts: list[str]) -> Any:
    """How diffusers is to quantise the denoisers of a pipeline while it loads them.

    Args:
        text: ``BACKEND``, or ``BACKEND:key=value,...`` with what its configuration takes.
        parts: Names of the denoisers in the pipeline.

    Raises:
        InvalidArgumentError: If there is no such backend, or it takes no such argument.
        MissingPackageError: If its package is not installed.
    """
    name, values = _specification(text)
    if name not in QUANTISERS:
        raise InvalidArgumentError(
            f"--quantize: there is no backend {name!r}; there are {listed(QUANTISERS, 20)}"
        )
    package, wanted = QUANTISERS[name]
    if find_spec(package.partition(".")[0]) is None or find_spec(package) is None:
        install = PACKAGES.get(package, package)
        raise MissingPackageError(
            f"--quantize {name} needs {package}, which is not installed: pip install {install}"
        )
    config = importlib.import_module("diffusers").PipelineQuantizationConfig
    try:
        return config(
            quant_backend=name, quant_kwargs={**wanted, **values}, components_to_quantize=parts
        )
    except Exception as error:  # what a backend says of its arguments
        raise InvalidArgumentError(f"--quantize {text}: {first_sentence(error)}") from error


def load_loras(pipeline: Any, texts: Sequence[str]) -> None:
    """Loads LoRA weights into a pipeline; several act together.

    Args:
        pipeline: What takes them.
        texts: A folder, a file, or owner/name on the hub each; after a colon the scale, else 1.

    Raises:
        InvalidArgumentError: If the pipeline takes none, or they cannot be loaded.
        MissingPackageError: If peft is not installed.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise InvalidArgumentError(f"--lora: {type(pipeline).__name__} takes no LoRA weights")
    if find_spec("peft") is None:
        raise MissingPackageError("--lora needs peft, which is not installed: pip install peft")
    weights: dict[str, float] = {}
    for i, text in enumerate(texts):
        place, scale = _place_and_scale(text)
        path = Path(place).expanduser()
        if not path.exists() and not HUB_ID.fullmatch(place):
            raise InvalidArgumentError(f"--lora {place}: there is no such file or folder")
        where = {"weight_name": path.name} if path.is_file() else {}
        folder = str(path.parent) if path.is_file() else str(path) if path.is_dir() else place
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                pipeline.load_lora_weights(folder, adapter_name=f"lora_{i}", **where)
        except Exception as error:  # files of weights can be wrong in any way
            raise InvalidArgumentError(f"--lora {place}: {first_sentence(error)}") from error
        weights[f"lora_{i}"] = scale
    pipeline.set_adapters(list(weights), list(weights.values()))


def _place_and_scale(text: str) -> tuple[str, float]:
    place, _, scale = text.rpartition(":")
    try:
        return (place, float(scale)) if place else (text, 1.0)
    except ValueError:  # the colon belongs to the path
        return text, 1.0


def offload(pipeline: Any, how: str, device: str | None) -> None:
    """Keeps weights in host memory until they are needed.

    Args:
        pipeline: Whose weights.
        how: "model", "sequential" or "group".
        device: The accelerator.

    Raises:
        InvalidArgumentError: If the pipeline cannot be offloaded so.
    """
    try:
        if how == "group":
            pipeline.enable_group_offload(
                onload_device=torch.device(device or "cuda"), offload_type="leaf_level"
            )
        else:
            getattr(pipeline, f"enable_{how}_cpu_offload")(device=device)
    except Exception as error:  # a part may refuse
        raise InvalidArgumentError(f"--offload {how}: {first_sentence(error)}") from error


def compile_denoisers(pipeline: Any, how: str) -> None:
    """Compiles the denoisers when they are first called.

    Args:
        pipeline: Whose denoisers.
        how: "blocks" for repeated blocks, "model" for all of each.

    Raises:
        InvalidArgumentError: If a denoiser names no repeated blocks.
    """
    for name, denoiser in Target.of(pipeline).denoisers.items():
        if how == "model":
            denoiser.compile()
            continue
        if not getattr(denoiser, "_repeated_blocks", None):
            raise InvalidArgumentError(
                f"--compile blocks: {type(denoiser).__name__} ('{name}') does not say which of its "
                "blocks repeat; use --compile model"
            )
        compile_blocks: Any = denoiser.compile_repeated_blocks
        compile_blocks()


def _check_offload(how: Preparation) -> None:
    if how.offload != "none" and (how.device is None or how.device.startswith("cpu")):
        raise InvalidArgumentError(
            f"--offload {how.offload} keeps weights in host memory until an accelerator needs "
            "them, and this runs on the CPU; leave --offload out, or give --device"
        )


def _specification(text: str) -> tuple[str, dict[str, Any]]:
    """``NAME:key=value,...`` as a name and values; a value is JSON or else a text."""
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise InvalidArgumentError(f"'{text}': expected {name}:KEY=VALUE,..., got '{part}'")
        values[key.strip()] = typed(Any, value.strip(), text)
    return name.strip(), values


def _parts(name_or_path: str) -> list[str]:
    """The denoisers that a pipeline's folder names; the usual ones of a pipeline on the hub."""
    index = Path(name_or_path).expanduser() / INDEX
    if not index.is_file():
        return list(DENOISERS[:1])
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except ValueError:  # loading it says what is wrong
        return list(DENOISERS[:1])
    return [name for name in DENOISERS if name in entries] or list(DENOISERS[:1])
