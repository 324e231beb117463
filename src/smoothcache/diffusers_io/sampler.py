"""Pipelines of diffusers: loading one, and running it with what its call asks for.

The only file that imports diffusers, and only when a pipeline is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..errors import InvalidArgumentError
from ..optional import optional_module
from .call_arguments import image_arguments, parameters_of
from .loading import known_classes

_TEXTS = ("prompt", "negative_prompt")
"""What names of arguments that encoders read begin with, such as ``prompt_2``."""
_ANY_PROMPT, _ANY_SIZE = "a photograph", 512


def sampling_rate(pipeline: Any) -> int | None:
    """Sampling rate of the sounds that a pipeline makes.

    Args:
        pipeline: A pipeline of diffusers.

    Returns:
        Hertz; None if no part of the pipeline says.

    Example:
        >>> from smoothcache.demo.audio import FOLDER
        >>> from smoothcache.diffusers_io import load_pipeline
        >>> sampling_rate(load_pipeline(FOLDER))
        16000
    """
    for part in ("vae", "vocoder"):
        rate = getattr(
            getattr(getattr(pipeline, part, None), "config", None), "sampling_rate", None
        )
        if isinstance(rate, int):
            return rate
    return None


def steps_to_ask_for(pipeline: Any, runs: int, options: Mapping[str, Any]) -> int:
    """The ``num_inference_steps`` for which a pipeline runs so many steps.

    A pipeline that starts from an image begins in the middle, at a place that ``strength`` says,
    and so runs fewer steps than it is asked for.

    Args:
        pipeline: A pipeline of diffusers.
        runs: Steps that are to run.
        options: Arguments of the call; ``strength`` is read, or else its default.

    Returns:
        The number to ask for; ``runs`` itself where all steps run.

    Example:
        >>> from smoothcache.demo.image import FOLDER
        >>> from smoothcache.diffusers_io import load_pipeline
        >>> steps_to_ask_for(load_pipeline(FOLDER), 7, {})
        7
    """
    takes = parameters_of(pipeline)
    if "strength" not in takes or not hasattr(pipeline, "get_timesteps"):
        return runs
    strength = options.get("strength", takes["strength"].default)
    if not isinstance(strength, int | float) or not 0 < strength < 1:
        return runs
    asked = range(runs, int(runs / strength) + 3)
    return next((n for n in asked if n - int(max(n - n * strength, 0)) == runs), runs)


# A long class, because half of it documents and checks what pipelines take.
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
        options: Further arguments of the pipeline's call, the same in every generation, such as
            ``height`` or ``negative_prompt``.
        images: Argument of the call -> images that are used in turn, for pipelines that start from
            images or are controlled by them.

    Raises:
        InvalidArgumentError: If the pipeline needs what is not given, or does not take what is.
    """

    pipeline: Any
    prompts: tuple[str, ...] = ()
    class_labels: tuple[int, ...] = ()
    num_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

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
    def with_any_input(cls, pipeline: Any, num_steps: int, **given: Any) -> PipelineSampler:
        """A sampler for when only the cost matters: class 0, or some prompt, or a grey image.

        Args:
            pipeline: A pipeline of diffusers.
            num_steps: Solver steps.
            given: Other attributes of the sampler, such as ``options``.

        Returns:
            A sampler that the pipeline accepts.
        """
        takes = parameters_of(pipeline)
        images = dict(given.pop("images", {}))
        for name in image_arguments(pipeline)[:2]:
            images.setdefault(name, (_grey_image(given.get("options", {})),))
        return cls(
            pipeline,
            prompts=(_ANY_PROMPT,) if "prompt" in takes and "class_labels" not in takes else (),
            class_labels=(0,) if "class_labels" in takes else (),
            num_steps=num_steps,
            images=images,
            **given,
        )

    @property
    def inputs(self) -> tuple[str, ...] | tuple[int, ...]:
        """The prompts or class labels; empty for a pipeline that is asked for nothing."""
        return self.class_labels or self.prompts

    @property
    def count(self) -> int:
        """How many different inputs there are: prompts, labels or images; at least 1."""
        return max(1, len(self.inputs), *map(len, self.images.values()), 1)

    @property
    def steps(self) -> int:
        """Solver steps of every generation."""
        if self.num_steps is not None:
            return self.num_steps
        return int(parameters_of(self.pipeline)["num_inference_steps"].default)

    def __call__(self, i: int, num_steps: int | None = None) -> Tensor:
        """Runs generation number i from start to end.

        Args:
            i: From 0.
            num_steps: Solver steps of this generation; None for ``steps``.

        Returns:
            What the pipeline makes: images [1, channels, height, width] in [0, 1] if it is a
            pipeline of images.
        """
        return self._run(self._arguments(i, num_steps or self.steps))

    def batch(self, numbers: Sequence[int]) -> Tensor:
        """Runs several generations in one batch, each with its own noise and input.

        Every sample has a generator of its own, so its noise does not depend on the batch.

        Args:
            numbers: Of the generations, from 0.

        Returns:
            What the pipeline makes, [numbers, ...]. It is what single generations give, except
            that arithmetic in a batch of another size can differ in the last bits.
        """
        arguments = self._arguments(0, self.steps)
        if "generator" in arguments:
            seeds = (self.seed + i for i in numbers)
            arguments["generator"] = [torch.Generator("cpu").manual_seed(x) for x in seeds]
        for name, value in arguments.items():
            if isinstance(value, str) and name.startswith(_TEXTS):  # one for each sample
                arguments[name] = [value] * len(numbers)
        for name, inputs in (("prompt", self.prompts), ("class_labels", self.class_labels)):
            if inputs:
                arguments[name] = [inputs[i % len(inputs)] for i in numbers]
        for name, images in self.images.items():
            chosen = [images[i % len(images)] for i in numbers]
            arguments[name] = chosen if len(chosen) > 1 else chosen[0]  # some take no list
        return self._run(arguments)

    def _run(self, arguments: dict[str, Any]) -> Tensor:
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

        Returns:
            What the pipeline makes, as ``__call__`` returns it.
        """
        own = self.pipeline.scheduler
        self.pipeline.scheduler = own if scheduler is None else scheduler
        try:
            return self(i, num_inference_steps)
        finally:
            self.pipeline.scheduler = own

    def _arguments(self, i: int, num_steps: int) -> dict[str, Any]:
        takes = parameters_of(self.pipeline)
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
        chosen = {name: values[i % len(values)] for name, values in self.images.items()}
        return {**arguments, **chosen, **self.options}

    def _check_inputs(self) -> None:
        takes = parameters_of(self.pipeline)
        name = type(self.pipeline).__name__
        given = {
            "prompt": bool(self.prompts),
            "class_labels": bool(self.class_labels),
            "guidance_scale": self.guidance_scale is not None,
            **{name: True for name in self.options},
            **{name: bool(images) for name, images in self.images.items()},
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
        known = known_classes(self.pipeline) if self.class_labels else None
        for label in self.class_labels:
            check_count("a class label", label, least=0)
            if known is not None and label not in known:
                raise InvalidArgumentError(
                    f"there is no class {label}; the labels of this model are "
                    f"{min(known)} to {max(known)}"
                )


def _grey_image(options: Mapping[str, Any]) -> Any:
    """An image of the size that is asked for, or of 512 pixels."""
    image = optional_module("PIL.Image", extra="demo")
    size = tuple(options.get(name) or _ANY_SIZE for name in ("width", "height"))
    return image.new("RGB", size, (128, 128, 128))


def _spoken(name: str | None) -> str:
    return {"class_labels": "class label", "guidance_scale": "guidance scale"}.get(
        name or "", name or ""
    )
