"""Pipelines of diffusers: loading one, and running it with what its call asks for.

The only file that imports diffusers, and only when a pipeline is loaded.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._checks import check_count, check_number
from ._optional import optional_module
from .denoisers import find_denoisers
from .errors import InvalidArgumentError, SmoothCacheError

INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ANY_PROMPT = "a photograph"


class PipelineLoadError(SmoothCacheError, OSError):
    """There is no such pipeline, or it cannot be loaded."""


def load_pipeline(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """Loads a pipeline from a local folder or from the Hugging Face hub.

    Args:
        name_or_path: A folder that ``save_pretrained`` wrote, or the ``owner/name`` of a
            repository on the hub. A folder comes first where both exist.
        dtype: Of the weights; None for float32.
        device: Where to put the pipeline; None leaves it on the CPU.

    Returns:
        A ``diffusers.DiffusionPipeline`` of the class that its index names; where diffusers has
        none of that name, it is looked for in the packages that the index names for its parts.

    Raises:
        PipelineLoadError: If there is no such folder or repository, it holds no pipeline, or the
            hub cannot be reached. The message is one sentence.
        InvalidArgumentError: If the device cannot be used.
    """
    source = _existing_source(os.fspath(name_or_path))
    try:
        with warnings.catch_warnings():
            # Newer versions call it dtype, the oldest that we support know this name alone.
            warnings.filterwarnings("ignore", "`torch_dtype`", FutureWarning)
            pipeline = _pipeline_class(source).from_pretrained(
                source, torch_dtype=dtype or torch.float32
            )
    except Exception as error:  # a folder can be broken in any way
        raise PipelineLoadError(_why_not_loaded(source, error)) from error
    return pipeline if device is None else _moved(pipeline, device)


def silence_libraries() -> None:
    """Keeps diffusers and transformers from writing anything but errors to the terminal."""
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


def sampling_rate(pipeline: Any) -> int | None:
    """Samples a second of the sounds that a pipeline makes; None if it does not say."""
    for part in ("vae", "vocoder"):
        rate = getattr(
            getattr(getattr(pipeline, part, None), "config", None), "sampling_rate", None
        )
        if isinstance(rate, int):
            return rate
    return None


def multistep_solvers(scheduler: Any) -> dict[str, Any]:
    """Solvers that need fewer steps than most, set up for the same model as a noise scheduler.

    Args:
        scheduler: One of diffusers; its noise levels and what its model predicts are taken over.

    Returns:
        Name -> a scheduler of its own; empty if none is known to suit.
    """
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    config = dict(scheduler.config)
    if type(scheduler).__name__.startswith("FlowMatch"):
        if config.get("use_dynamic_shifting"):
            return {}
        flow = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": config.get("shift", 1.0),
        }
        return {
            "DPM-Solver++ 2M": DPMSolverMultistepScheduler(**flow),
            "UniPC": UniPCMultistepScheduler(**flow),
        }
    if not hasattr(scheduler, "alphas_cumprod"):
        return {}

    def dpm_solver(order: int, *, log_snr: bool) -> Any:
        return DPMSolverMultistepScheduler.from_config(
            config,
            algorithm_type="dpmsolver++",
            solver_order=order,
            use_lu_lambdas=log_snr,
            use_karras_sigmas=False,
        )

    return {
        "DPM-Solver++ 2M": dpm_solver(2, log_snr=False),
        "DPM-Solver++ 2M, log-SNR": dpm_solver(2, log_snr=True),
        "DPM-Solver++ 3M, log-SNR": dpm_solver(3, log_snr=True),
        "UniPC": UniPCMultistepScheduler.from_config(config),
    }


def third_order_sde(scheduler: Any) -> Any:
    """DPM-Solver++(3M) SDE, which Stable Audio Open is sampled with, for the same model.

    diffusers' ``CosineDPMSolverMultistepScheduler`` stops at the second order: it takes
    ``solver_order=3``, and then has no update for the third step. Everything else is its own, the
    noise levels as well as the seeded Brownian noise, which needs torchsde.

    Args:
        scheduler: A ``CosineDPMSolverMultistepScheduler``.

    Returns:
        A scheduler of a subclass, at the start of no generation.

    Raises:
        InvalidArgumentError: If it is another scheduler.
        MissingPackageError: If torchsde is not installed.

    Source: Lu et al., "DPM-Solver++", arXiv 2211.01095, for data prediction and the SDE; the
    weight of the second difference is that of k-diffusion's ``sample_dpmpp_3m_sde``, half of
    what integrating the parabola gives.
    """
    optional_module("torchsde", extra="audio")
    base = type(scheduler)
    if base.__name__ != "CosineDPMSolverMultistepScheduler":
        raise InvalidArgumentError(
            "the third order is known for a CosineDPMSolverMultistepScheduler, got "
            f"{base.__name__}."
        )

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        self.oldest = None

    def update(self: Any, outputs: list[Tensor], sample: Tensor, noise: Tensor) -> Tensor:
        oldest, self.oldest = self.oldest, outputs[-2]
        if oldest is None:
            second: Tensor = base.multistep_dpm_solver_second_order_update(
                self, outputs, sample=sample, noise=noise
            )
            return second
        sigmas = self.sigmas[self.step_index - 2 : self.step_index + 2]
        return _third_order_step(sigmas, (oldest, *outputs[-2:]), sample, noise)

    methods = {
        "set_timesteps": set_timesteps,
        "multistep_dpm_solver_second_order_update": update,
    }
    cls: Any = type("DPMSolver3MSDEScheduler", (base,), methods)
    return cls.from_config({**scheduler.config, "solver_order": 2})


def _third_order_step(
    sigmas: Tensor, denoised: tuple[Tensor, Tensor, Tensor], sample: Tensor, noise: Tensor
) -> Tensor:
    """The sample at the last of four noise levels, from the denoised ones at the first three."""
    widths = sigmas[:-1].log() - sigmas[1:].log()
    oldest, older, newest = denoised
    h = 2 * widths[2]  # the SDE goes twice as far as the ODE, and noise takes it half way back
    first, second = ((newest - older) / widths[1], (older - oldest) / widths[0])
    difference = widths[2] * (first - second) / (widths[0] + widths[1])
    slope = first + widths[1] / widths[2] * difference
    phi_1 = -torch.expm1(-h)
    phi_2 = 1 - phi_1 / h
    phi_3 = phi_2 / h - 0.5
    deterministic = torch.exp(-h) * sample + phi_1 * newest
    curved = widths[2] * (phi_2 * slope - phi_3 * difference)
    return deterministic + curved + sigmas[3] * phi_1.sqrt() * noise


@dataclass(frozen=True)
class PipelineSampler:
    """Runs one generation of a pipeline after the other: number i has its own input and seed.

    The inputs are used in turn. Which ones there must be is read from the signature of the
    pipeline's ``__call__``. An instance can be
    passed as ``sample`` to ``calibrate`` and to ``compare``.

    Attributes:
        pipeline: A pipeline of diffusers.
        prompts: Texts, for a pipeline that takes ``prompt``.
        class_labels: Indices of classes, for a pipeline that takes ``class_labels``.
        num_steps: Solver steps; None for the pipeline's own default.
        guidance_scale: None for the pipeline's own default.
        seed: Generation i starts from the noise of seed + i, drawn on the CPU.

    Raises:
        InvalidArgumentError: If the pipeline needs what is not given, or does not take what is.
    """

    pipeline: Any
    prompts: tuple[str, ...] = ()
    class_labels: tuple[int, ...] = ()
    num_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_inputs()
        self._check_lengths()
        self._check_class_labels()
        if self.num_steps is not None:
            check_count("num_steps", self.num_steps, least=1)
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale)
        check_count("seed", self.seed, least=0)

    @classmethod
    def with_any_input(cls, pipeline: Any, num_steps: int) -> PipelineSampler:
        """A sampler for when only the cost matters: class 0, or some prompt."""
        takes = _parameters(pipeline)
        return cls(
            pipeline,
            prompts=(_ANY_PROMPT,) if "prompt" in takes and "class_labels" not in takes else (),
            class_labels=(0,) if "class_labels" in takes else (),
            num_steps=num_steps,
        )

    @property
    def inputs(self) -> tuple[str, ...] | tuple[int, ...]:
        """The prompts or class labels; empty for a pipeline that is asked for nothing."""
        return self.class_labels or self.prompts

    @property
    def steps(self) -> int:
        """Solver steps of every generation."""
        if self.num_steps is not None:
            return self.num_steps
        return int(_parameters(self.pipeline)["num_inference_steps"].default)

    def __call__(self, i: int, num_steps: int | None = None) -> Tensor:
        """Runs generation number i from start to end.

        Args:
            i: From 0.
            num_steps: Solver steps of this generation; None for ``steps``.

        Returns:
            What the pipeline makes: images [1, channels, height, width] in [0, 1] if it is a
            pipeline of images.
        """
        arguments = self._arguments(i, num_steps or self.steps)
        output = self.pipeline(**arguments)
        result = output[0]
        return result if isinstance(result, Tensor) else torch.stack(list(result))

    def sample(
        self, i: int, num_inference_steps: int | None = None, scheduler: Any = None
    ) -> Tensor:
        """Runs generation number i as ``search`` asks for it.

        Args:
            i: From 0.
            num_inference_steps: None for ``steps``.
            scheduler: A noise scheduler to take for this generation; None for the pipeline's own.
        """
        own = self.pipeline.scheduler
        self.pipeline.scheduler = own if scheduler is None else scheduler
        try:
            return self(i, num_inference_steps)
        finally:
            self.pipeline.scheduler = own

    def _arguments(self, i: int, num_steps: int) -> dict[str, Any]:
        takes = _parameters(self.pipeline)
        wanted: dict[str, Any] = {
            "generator": torch.Generator("cpu").manual_seed(self.seed + i),
            "num_inference_steps": num_steps,
            "output_type": "pt",
            "return_dict": False,
        }
        arguments = {name: value for name, value in wanted.items() if name in takes}
        if self.prompts:
            arguments["prompt"] = self.prompts[i % len(self.prompts)]
        if self.class_labels:
            arguments["class_labels"] = [self.class_labels[i % len(self.class_labels)]]
        if self.guidance_scale is not None:
            arguments["guidance_scale"] = self.guidance_scale
        return arguments

    def _check_inputs(self) -> None:
        takes = _parameters(self.pipeline)
        name = type(self.pipeline).__name__
        given = {
            "prompt": bool(self.prompts),
            "class_labels": bool(self.class_labels),
            "guidance_scale": self.guidance_scale is not None,
        }
        wrong = [_spoken(x) for x, is_given in given.items() if is_given and x not in takes]
        wanted = next((x for x in ("class_labels", "prompt") if x in takes), None)
        needed = f"; it needs a {_spoken(wanted)}" if wanted and not given[wanted] else ""
        if wrong:
            raise InvalidArgumentError(f"{name} takes no {' and no '.join(wrong)}{needed}")
        if needed:
            raise InvalidArgumentError(f"{name} needs at least one {_spoken(wanted)}")
        missing = [
            x
            for x, parameter in takes.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and not given.get(x)
        ]
        if missing or "num_inference_steps" not in takes:
            what = f"needs {', '.join(missing)}" if missing else "takes no num_inference_steps"
            raise InvalidArgumentError(
                f"{name} {what}; write a function sample(i) that runs it, and pass that instead"
            )

    def _check_lengths(self) -> None:
        """Refuses prompts that the pipeline would cut short, where one encoder reads them all."""
        tokenizer: Any = getattr(self.pipeline, "tokenizer", None)
        longest = getattr(tokenizer, "model_max_length", None)
        if not isinstance(longest, int) or hasattr(self.pipeline, "tokenizer_2"):
            return
        for prompt in self.prompts:
            count = len(tokenizer(prompt, verbose=False).input_ids)
            if count > longest:
                raise InvalidArgumentError(
                    f"the text encoder of {type(self.pipeline).__name__} takes {longest} tokens, "
                    f"and the prompt {prompt!r} has {count}; the rest would be cut off. Shorten it"
                )

    def _check_class_labels(self) -> None:
        known = _known_classes(self.pipeline) if self.class_labels else None
        for label in self.class_labels:
            check_count("a class label", label, least=0)
            if known is not None and label not in known:
                raise InvalidArgumentError(
                    f"there is no class {label}; the labels of this model are "
                    f"{min(known)} to {max(known)}"
                )


def _known_classes(pipeline: Any) -> Collection[int] | None:
    """The classes that the pipeline has names for, or else as many as its denoiser embeds."""
    if named := getattr(pipeline, "labels", None):
        return set(named.values())
    config = getattr(next(iter(find_denoisers(pipeline).values())), "config", None)
    count = config.get("num_embeds_ada_norm") if isinstance(config, Mapping) else None
    return None if count is None else range(count)


def _parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    """What the pipeline's call takes, by name."""
    parameters = dict(inspect.signature(type(pipeline).__call__).parameters)
    parameters.pop("self", None)
    return parameters


def _spoken(name: str | None) -> str:
    return {"class_labels": "class label", "guidance_scale": "guidance scale"}.get(
        name or "", name or ""
    )


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
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
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
        return f"the pipeline in '{source}' cannot be loaded: {_first_sentence(error)}"
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
        return f"{nowhere} the hub cannot be reached ({_first_sentence(causes[-1])})"
    if "EntryNotFoundError" in names:
        return f"the repository '{source}' on the hub is no pipeline: it has no {INDEX}"
    return f"'{source}' cannot be loaded from the hub: {_first_sentence(error)}"


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those that led to it, the first one last."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    first = re.split(r"(?<=[a-z)'\"])\. ", text)[0].rstrip(".")
    return first if len(first) <= 200 else f"{first[:197]}..."


def _moved(pipeline: Any, device: str | torch.device) -> Any:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgumentError(
            f"the device '{device}' cannot be used: {_first_sentence(error)}"
        ) from error
    return pipeline.to(device)
