"""The whole method on a small trained Stable Audio pipeline."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import plots
from ..comparison.result import REFERENCE, Comparison
from ..diffusers_io.loading import load_pipeline
from ..diffusers_io.solvers import third_order_sde
from ..files.media import encoded_sound
from ..metrics.audio import label_divergence
from ..metrics.distribution import class_accuracy, frechet_distance
from ..metrics.report import Report
from .classifier import load_as
from .course import (
    CALIBRATION_SEEDS,
    DATA_SEED,
    DemoResult,
    Groups,
    Material,
    Stages,
    checked_output,
    rows_to_show,
    run_course,
    stem,
)
from .tone_classifier import ToneClassifier
from .tones import ATTRIBUTES, NUM_CLASSES, SAMPLING_RATE, caption, generate

FOLDER = Path(__file__).with_name("tones-dit")
NUM_STEPS, GUIDANCE = 100, 2.0
BATCH = NUM_CLASSES[0] * NUM_CLASSES[1]  # every timbre at every pitch
NUM_CALIBRATION = 10
NUM_REAL = 600


def run_demo(
    output_dir: str | os.PathLike[str] = "out/demo-audio",
    *,
    folder: str | os.PathLike[str] | None = None,
    num_samples: int = 2 * BATCH,
    num_steps: int = NUM_STEPS,
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> DemoResult:
    """Runs the method from end to end on the demo's text-to-audio pipeline.

    The solver is DPM-Solver++(3M) SDE. It draws its noise from the seed of each sound, so cached
    and uncached runs use the same noise. The calibration set has ten sounds. The comparison covers
    FORA (every 2nd and 3rd step, and the last), FORA with Taylor extrapolation, the paper's
    thresholds at the same cost, and fewer steps at the same cost.

    Args:
        output_dir: Folder for sounds, spectrograms, the table, the calibration and the schedules;
            created if missing.
        folder: Another pipeline of the same kind with its ``classifier``; None for the demo's.
        num_samples: Number of sounds to compare, a multiple of the 20 pairs of timbre and pitch.
        num_steps: Number of solver steps of the uncached run.
        seed: Seed of the first sound.
        progress: Whether to show progress bars.
        tell: Called with a line of text at the start of every stage.

    Returns:
        The results; the comparison's ``images`` are waveforms [samples, 1, audio samples].

    Raises:
        InvalidArgumentError: If an argument is invalid.
        PipelineLoadError: If there is no pipeline in the folder.
        MissingPackageError: If a package of the ``demo`` or ``audio`` extra is not installed.
    """
    output = checked_output(
        output_dir,
        num_samples=num_samples,
        batch=BATCH,
        num_steps=num_steps,
        seed=seed,
        packages=("transformers", "torchsde"),
        extra="audio",
    )
    source = FOLDER if folder is None else Path(folder)
    stages = Stages(tell)

    with stages("loading the pipeline"):
        pipe = load_tones(source)
        judge = Judge(load_as(ToneClassifier, source / "classifier"))

    def sample(i: int, steps: int) -> Tensor:
        return sample_tones(pipe, batch_attributes(i), seed + BATCH * i, steps)

    def calibration_sample(i: int) -> Tensor:
        place = 7 * i % BATCH  # varies timbre and pitch
        chosen = batch_attributes(i)[place : place + 1]
        return sample_tones(pipe, chosen, seed + CALIBRATION_SEEDS + i, num_steps)

    material = Material(
        pipe,
        "sounds",
        sample,
        count=num_samples,
        batches=num_samples // BATCH,
        calibration_sample=calibration_sample,
        calibration_count=NUM_CALIBRATION,
        num_steps=num_steps,
        scores=judge.scores(),
        describe=lambda comparison: _report(comparison, judge, num_samples),
        show=_show,
        last=True,  # the last step removes all remaining noise, 0.3 of the sound's amplitude
        inputs=[caption(row) for row in batch_attributes(0)],
        sampling_rate=SAMPLING_RATE,
        command=(
            f"smoothcache demo --modality audio --samples {num_samples} --steps {num_steps} "
            f"--seed {seed}"
        ),
    )
    return run_course(material, output, stages, progress=progress)


def load_tones(folder: str | os.PathLike[str] = FOLDER) -> Any:
    """Loads the demo's ``StableAudioPipeline`` with the third-order solver of Stable Audio Open."""
    pipe = load_pipeline(folder, dtype=torch.float32)
    pipe.scheduler = third_order_sde(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_tones(pipe: Any, attributes: Tensor, seed: int, num_steps: int) -> Tensor:
    """Runs one generation of the pipeline, with a separate seed for each sound.

    Args:
        pipe: The demo's pipeline.
        attributes: Timbre, pitch and rhythm of each sound; [n, 3].
        seed: Seed of the first sound; later sounds have consecutive seeds.
        num_steps: Number of solver steps.

    Returns:
        Waveforms [n, 1, 16384].
    """
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(attributes))]
    with warnings.catch_warnings():
        # The first and last noise levels exceed the Brownian path's range by a rounding error.
        warnings.filterwarnings("ignore", "Should have t[ab]", UserWarning)
        waveforms: Tensor = pipe(
            [caption(row) for row in attributes],
            guidance_scale=GUIDANCE,
            num_inference_steps=num_steps,
            generator=generators,
            output_type="pt",
        ).audios
    return waveforms


def batch_attributes(i: int) -> Tensor:
    """Returns the attributes [20, 3] of the sounds of generation i, which share one rhythm."""
    timbres, pitches, rhythms = (torch.arange(n) for n in NUM_CLASSES)
    return torch.cartesian_prod(timbres, pitches, rhythms[i % len(rhythms)][None])


class Judge:
    """Scores sets of whole batches of sounds with the attributes of ``batch_attributes``.

    Args:
        classifier: A classifier trained on real sounds.
    """

    def __init__(self, classifier: ToneClassifier) -> None:
        self._classifier = classifier
        self._real = self._features(generate(_attributes(NUM_REAL), seed=DATA_SEED)[0])
        self._uncached: Tensor | None = None

    def scores(self) -> dict[str, Callable[[Tensor], float]]:
        """Returns the scores for ``compare``, which must score the uncached sounds first."""
        accuracies = {
            f"{name}_accuracy": lambda sounds, i=i: self.accuracy(sounds, i)
            for i, name in enumerate(ATTRIBUTES)
        }
        return {
            **accuracies,
            "label_divergence": self.divergence,
            "frechet_distance": self.distance,
        }

    def accuracy(self, sounds: Tensor, attribute: int) -> float:
        """Returns the fraction of sounds [n, 1, samples] whose attribute is recognised."""
        return class_accuracy(
            self._logits(sounds)[attribute], _attributes(len(sounds))[:, attribute]
        )

    def divergence(self, sounds: Tensor) -> float:
        """Returns the divergence of the labels from the labels of the first set, in nats."""
        logits = self._logits(sounds)
        if self._uncached is None:
            self._uncached = torch.cat(logits, dim=1)
        reference = torch.split(self._uncached, list(NUM_CLASSES), dim=1)
        return sum(map(label_divergence, logits, reference))

    def distance(self, sounds: Tensor) -> float:
        """Returns the Frechet distance of the classifier's features to those of real sounds."""
        return frechet_distance(self._features(sounds), self._real)

    @torch.no_grad()
    def _logits(self, sounds: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._classifier(sounds))

    @torch.no_grad()
    def _features(self, sounds: Tensor) -> Tensor:
        return torch.cat([self._classifier.features(part) for part in torch.split(sounds, 50)])


def real_sounds(count: int) -> Tensor:
    """Returns real sounds unseen in training and by ``Judge``, in the order of the comparison."""
    return generate(_attributes(count), seed=DATA_SEED + 1)[0]


def _attributes(count: int) -> Tensor:
    """Returns the attributes of the first sounds of the comparison, [count, 3]."""
    batches = [batch_attributes(i) for i in range(-(-count // BATCH))]
    return torch.cat(batches)[:count]


def _report(comparison: Comparison, judge: Judge, num_samples: int) -> Report:
    real = real_sounds(num_samples)
    num_steps = comparison.row(REFERENCE).steps
    report = comparison.report(
        f"Tones DiT, {num_samples} sounds, {num_steps} steps of DPM-Solver++(3M) SDE, guidance "
        f"{GUIDANCE:g}"
    )
    scores = ", ".join(
        f"{100 * judge.accuracy(real, i):.1f} % on {name}" for i, name in enumerate(ATTRIBUTES)
    )
    notes = (
        "compute: MACs over those of the uncached run; time: wall clock likewise, median over "
        f"batches of {BATCH}; SNR, distances, relative error: against the uncached sounds of the "
        "same seeds and the same noise.",
        f"Accuracies, label KL and Frechet distance: by a classifier trained on real sounds, of "
        f"which {num_samples} score {scores}, and {judge.distance(real):.3g}.",
        "Each α is the threshold whose schedule costs as much as FORA above or below it, as "
        "nearly as thresholds allow.",
    )
    return replace(report, notes=(*notes, *report.notes))


def _show(folder: Path, groups: Groups, comparison: Comparison) -> list[Path]:
    """Writes sounds and their spectrograms; returns the files."""
    files = _sounds(folder, groups, comparison)
    uncached = _shown(comparison.images[REFERENCE])
    for interval, group in groups.items():
        rows = [(name, _shown(comparison.images[name])) for name in rows_to_show(comparison, group)]
        files.append(folder / f"spectrograms-n{interval}.png")
        plots.plot_spectrograms(rows, uncached, SAMPLING_RATE, files[-1])
    return files


def _sounds(folder: Path, groups: Groups, comparison: Comparison) -> list[Path]:
    """Writes one sound of every timbre, uncached and under every schedule."""
    names = {REFERENCE: "uncached"} | {
        name: stem(interval, schedule).removeprefix("schedule-")
        for interval, group in groups.items()
        for name, schedule in group.items()
    }
    files = []
    for row, name in names.items():
        for sound, timbre in zip(_shown(comparison.images[row]), ATTRIBUTES["timbre"], strict=True):
            files.append(folder / f"{timbre}-{name}.wav")
            files[-1].write_bytes(encoded_sound(sound, SAMPLING_RATE))
    return files


def _shown(sounds: Tensor) -> Tensor:
    """Returns one sound of every timbre, at different pitches: [5, 1, samples]."""
    places = [NUM_CLASSES[1] * i + i % NUM_CLASSES[1] for i in range(NUM_CLASSES[0])]
    return sounds[places]
