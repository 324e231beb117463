"""Many samples of a diffusers pipeline, under a schedule or without."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from torch import Tensor

from ..diffusers_io.sampler import PipelineSampler, sampling_rate
from ..files.document import format_json
from ..files.media import FRAMES_PER_SECOND
from ..metrics.weights import weights_digest
from ..model.target import Target
from ..runtime.run import Run, cached
from ..runtime.summary import Summary
from ..schedule.schedule import Schedule
from .manifest import Manifest, Setting
from .sample_many import sample_many


def sample_pipeline(
    sampler: PipelineSampler,
    folder: str | os.PathLike[str],
    num_samples: int,
    *,
    schedule: Schedule | None = None,
    batch_size: int = 1,
    layout: str | None = None,
    shard_size: int | None = None,
    names: Sequence[str] = (),
    frames_per_second: float = FRAMES_PER_SECOND,
    settings: Mapping[str, Setting] | None = None,
    progress: bool = True,
) -> tuple[Manifest, Summary | None]:
    """Generates many samples of a pipeline into a folder; see ``sample_many``.

    Args:
        sampler: The pipeline with its inputs, steps, guidance and seed.
        folder: Made if it does not exist.
        num_samples: How many samples there are to be.
        schedule: To run under; None for the uncached pipeline.
        batch_size: How many are generated together.
        layout: By default ``"wav"`` for a pipeline of sounds, otherwise ``"npz"``.
        shard_size: How many are written together.
        names: Of the inputs, for the names of files.
        frames_per_second: Of clips.
        settings: What else the samples depend on. Those of the sampler, the digest of the
            denoiser's weights, and that of the schedule are added.
        progress: Whether rank 0 shows one progress bar for all ranks.

    Returns:
        The manifest; and what this rank reused, None if it had nothing to run.

    Raises:
        InvalidArgumentError: As ``sample_many``.
        ScheduleMismatchError: If the schedule does not fit the pipeline.

    Example:
        >>> import tempfile
        >>> from smoothcache import Schedule
        >>> from smoothcache.demo.image import FOLDER
        >>> from smoothcache.diffusers_io import PipelineSampler, load_pipeline
        >>> pipe = load_pipeline(FOLDER)
        >>> pipe.set_progress_bar_config(disable=True)
        >>> schedule = Schedule.uniform(pipe, num_steps=2, interval=2)
        >>> sampler = PipelineSampler(pipe, class_labels=(0, 3), num_steps=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest, summary = sample_pipeline(
        ...         sampler, folder, 4, schedule=schedule, batch_size=2, progress=False
        ...     )
        >>> manifest.input_of(3), summary.reused
        (3, 32)
    """
    rate = sampling_rate(sampler.pipeline)
    running = _UnderSchedule(sampler, schedule)
    with running:
        manifest = sample_many(
            running,
            folder,
            num_samples,
            batch_size=batch_size,
            layout=layout or ("npz" if rate is None else "wav"),
            shard_size=shard_size,
            seed=sampler.seed,
            inputs=sampler.inputs,
            names=names,
            sampling_rate=rate,
            frames_per_second=frames_per_second,
            settings={**_described(sampler, schedule), **(settings or {})},
            progress=progress,
        )
    return manifest, running.summary()


class _UnderSchedule:
    """Generates batches under a schedule, which is applied when the first one is asked for."""

    def __init__(self, sampler: PipelineSampler, schedule: Schedule | None) -> None:
        self._sampler = sampler
        self._schedule = schedule
        self._applied = ExitStack()
        self._run: Run | None = None

    def __enter__(self) -> _UnderSchedule:
        return self

    def __exit__(self, *reason: Any) -> None:
        self._applied.__exit__(*reason)

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        if self._run is None and self._schedule is not None:
            applied = cached(self._sampler.pipeline, self._schedule)
            self._run = self._applied.enter_context(applied)
        return self._sampler.batch(numbers)

    def summary(self) -> Summary | None:
        return None if self._run is None else self._run.summary()


def _described(sampler: PipelineSampler, schedule: Schedule | None) -> dict[str, Setting]:
    """What the samples depend on."""
    denoisers = Target.of(sampler.pipeline).denoisers
    scheduler = getattr(sampler.pipeline, "scheduler", None)
    parameter = next(next(iter(denoisers.values())).parameters())
    return {
        "pipeline": type(sampler.pipeline).__name__,
        "solver": type(scheduler).__name__,
        "solver_settings": _settings_digest(scheduler),
        "steps": sampler.steps,
        "guidance_scale": sampler.guidance_scale,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "weights": _digest_of([weights_digest(x) for x in denoisers.values()]),
        "schedule": None if schedule is None else schedule_digest(schedule),
        "diffusers": version("diffusers"),
        **{f"call.{name}": _text(value) for name, value in sampler.options.items()},
        **{f"images.{name}": _images_digest(given) for name, given in sampler.images.items()},
    }


def _settings_digest(scheduler: Any) -> str:
    """SHA-256 of how a noise scheduler is configured."""
    config = dict(getattr(scheduler, "config", None) or {})
    known = sorted((name, repr(value)) for name, value in config.items() if name[:1] != "_")
    return f"sha256:{hashlib.sha256(repr(known).encode()).hexdigest()}"


def _text(value: Any) -> Setting:
    return value if isinstance(value, Setting) else repr(value)


def _images_digest(images: Sequence[Any]) -> str:
    """SHA-256 of pictures, in their order."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.mode} {image.size}\n".encode())
        digest.update(image.tobytes())
    return f"sha256:{digest.hexdigest()}"


def schedule_digest(schedule: Schedule) -> str:
    """SHA-256 of what a schedule computes and how it predicts."""
    rows = {name: repr(row) for name, row in schedule.rows.items()}
    data = format_json({"steps": schedule.num_steps, "rows": rows})
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _digest_of(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return f"sha256:{hashlib.sha256(' '.join(texts).encode()).hexdigest()}"
