"""Loads pipelines from the hub or from disk."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import warnings
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidArgumentError, PipelineLoadError
from ..model.target import Target

INDEX = "model_index.json"
"""Name of the file that makes a folder a pipeline."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""What the name of a repository on the hub looks like."""


def load_pipeline(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    variant: str | None = None,
    quantization_config: Any = None,
) -> Any:
    """Loads a pipeline from a local folder or from the Hugging Face hub.

    Args:
        name_or_path: A folder that ``save_pretrained`` wrote, or the ``owner/name`` of a
            repository on the hub. A folder comes first where both exist.
        dtype: Of the weights; None for float32.
        device: Where to put the pipeline; None leaves it on the CPU.
        revision: Branch, tag or commit on the hub; None for the newest.
        variant: Of the files of weights, such as "fp16"; None for the plain ones.
        quantization_config: How diffusers quantises parts of it while it loads them.

    Returns:
        A ``diffusers.DiffusionPipeline`` of the class that its index names; where diffusers has
        none of that name, it is looked for in the packages that the index names for its parts.

    Raises:
        PipelineLoadError: If there is no such folder or repository, it holds no pipeline, or the
            hub cannot be reached. The message is one sentence.
        InvalidArgumentError: If the device cannot be used.

    Example:
        >>> from smoothcache.demo.image import FOLDER
        >>> type(load_pipeline(FOLDER)).__name__
        'DiTPipeline'
    """
    source = _existing_source(os.fspath(name_or_path))
    more = {
        "revision": revision,
        "variant": variant,
        "quantization_config": quantization_config,
    }
    try:
        with warnings.catch_warnings():
            # Newer versions call it dtype, the oldest that we support know this name alone.
            warnings.filterwarnings("ignore", "`torch_dtype`", FutureWarning)
            pipeline = _pipeline_class(source).from_pretrained(
                source,
                torch_dtype=dtype or torch.float32,
                **{name: value for name, value in more.items() if value is not None},
            )
    except Exception as error:  # a folder can be broken in any way
        raise PipelineLoadError(_why_not_loaded(source, error)) from error
    return pipeline if device is None else moved(pipeline, device)


def silence_libraries() -> None:
    """Keeps diffusers and transformers from writing anything but errors to the terminal.

    Example:
        >>> silence_libraries()
    """
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")  # read when they are first imported
    hub = importlib.import_module("huggingface_hub.utils")
    were_hidden = hub.are_progress_bars_disabled()
    for library in filter(find_spec, ("diffusers", "transformers")):
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    if not were_hidden:
        hub.enable_progress_bars()  # downloads may take long
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)


def known_classes(pipeline: Any) -> Collection[int] | None:
    """The classes that the pipeline has names for, or else as many as its denoiser embeds."""
    if named := getattr(pipeline, "labels", None):
        return set(named.values())
    config = getattr(next(iter(Target.of(pipeline).denoisers.values())), "config", None)
    count = config.get("num_embeds_ada_norm") if isinstance(config, Mapping) else None
    return None if count is None else range(count)


def _existing_source(name: str) -> str:
    """A folder with a pipeline in it, or what could be the name of one on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / INDEX).is_file():
            single = (path / "config.json").is_file()
            hint = "; it looks like a single model: give the folder of its pipeline" * single
            raise PipelineLoadError(f"the folder '{name}' is no pipeline: it has no {INDEX}{hint}")
        return str(path)
    if path.exists():
        raise PipelineLoadError(f"'{name}' is a file; give the folder of a pipeline")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise PipelineLoadError(f"there is no folder '{name}'")
    return name


def _pipeline_class(source: str) -> Any:
    """Diffusers' general class, which finds its own by name; or one from where its parts are."""
    import diffusers

    index = Path(source) / INDEX
    entries = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    name = entries.get("_class_name")
    if not isinstance(name, str) or hasattr(diffusers, name):
        return diffusers.DiffusionPipeline
    libraries = [x[0] for x in entries.values() if isinstance(x, list) and isinstance(x[0], str)]
    for library in filter(lambda library: "." in library, libraries):
        package = importlib.import_module(library.rpartition(".")[0])
        if hasattr(package, name):
            return getattr(package, name)
    return diffusers.DiffusionPipeline


def _why_not_loaded(source: str, error: BaseException) -> str:
    if Path(source).is_dir():
        return f"the pipeline in '{source}' cannot be loaded: {first_sentence(error)}"
    causes = _causes(error)
    names = {cls.__name__ for cause in causes for cls in type(cause).__mro__}
    nowhere = f"there is no folder '{source}', and"
    if "GatedRepoError" in names:
        return f"{nowhere} the repository on the hub asks you to accept its terms and to log in"
    if "RepositoryNotFoundError" in names:
        return f"{nowhere} the hub has no repository of that name (or it is private)"
    if "OfflineModeIsEnabled" in names:
        return f"{nowhere} the hub is not asked, as HF_HUB_OFFLINE is set"
    if names & {"ConnectionError", "NetworkError", "TimeoutException", "ProxyError", "Timeout"}:
        return f"{nowhere} the hub cannot be reached ({first_sentence(causes[-1])})"
    if "EntryNotFoundError" in names:
        return f"the repository '{source}' on the hub is no pipeline: it has no {INDEX}"
    return f"'{source}' cannot be loaded from the hub: {first_sentence(error)}"


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those that led to it, the first one last."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def first_sentence(error: BaseException) -> str:
    """What an error of another package says first, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    first = re.split(r"(?<=[a-z)'\"])\. ", text)[0].rstrip(".")
    return first if len(first) <= 200 else f"{first[:197]}..."


def moved(pipeline: Any, device: str | torch.device) -> Any:
    """The pipeline on a device.

    Raises:
        InvalidArgumentError: If the device cannot be used.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgumentError(
            f"the device '{device}' cannot be used: {first_sentence(error)}"
        ) from error
    return pipeline.to(device)
