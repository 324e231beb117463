"""The whole method on a small trained Stable Audio: calibrate, plan, sample, compare, draw."""

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
    """Runs the method from end to end on the demo's pipeline of described sounds.

    The solver is DPM-Solver++(3M) SDE. Its noise is drawn inside, from the seed of each sound, so
    that cached and uncached runs draw the same. Calibrates on ten sounds. Compares computing every
    2nd and every 3rd step, and the last (FORA), the same with Taylor extrapolation, the paper's
    thresholds that cost the same, and plain fewer steps of the same cost.

    Args:
        output_dir: Where to write sounds, spectrograms, the table, the calibration and the
            schedules; made if it does not exist.
        folder: Another pipeline of the same kind, with its ``classifier``; None for the demo's.
        num_samples: How many sounds to compare, a multiple of the twenty pairs of timbre and pitch.
        num_steps: Solver steps of the uncached run.
        seed: Other seeds give other sounds.
        progress: Whether to show progress bars.
        tell: Is called with a line at the start of every stage.

    Returns:
        What was measured; the comparison's ``images`` are waveforms [samples, 1, audio samples].

    Raises:
        InvalidArgumentError: If an argument has no sensible value.
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
        place = 7 * i % BATCH  # walks through timbres and pitches
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
        last=True,  # it takes away all noise that is left, 0.3 of the sound's amplitude at once
        inputs=[caption(row) for row in batch_attributes(0)],
        sampling_rate=SAMPLING_RATE,
        command=(
            f"smoothcache demo --modality audio --samples {num_samples} --steps {num_steps} "
            f"--seed {seed}"
        ),
    )
    return run_course(material, output, stages, progress=progress)


def load_tones(folder: str | os.PathLike[str] = FOLDER) -> Any:
    """The demo's ``StableAudioPipeline``, with the third-order solver of Stable Audio Open."""
    pipe = load_pipeline(folder, dtype=torch.float32)
    pipe.scheduler = third_order_sde(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_tones(pipe: Any, attributes: Tensor, seed: int, num_steps: int) -> Tensor:
    """One generation of the pipeline, each sound with a seed of its own.

    Args:
        pipe: A pipeline of the demo.
        attributes: Timbre, pitch and rhythm of each sound; [n, 3].
        seed: Of the first sound; the next one has the next number.
        num_steps: Solver steps.

    Returns:
        Waveforms [n, 1, 16384].
    """
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(attributes))]
    with warnings.catch_warnings():
        # The first and last noise level are outside of the Brownian path's by a rounding error.
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
    """What the sounds of generation i are to be: [20, 3], of one rhythm that changes with i."""
    timbres, pitches, rhythms = (torch.arange(n) for n in NUM_CLASSES)
    return torch.cartesian_prod(timbres, pitches, rhythms[i % len(rhythms)][None])


class Judge:
    """Scores sets of whole batches of sounds, as ``batch_attributes`` asks for them.

    Args:
        classifier: Was trained on real sounds.
    """

    def __init__(self, classifier: ToneClassifier) -> None:
        self._classifier = classifier
        self._real = self._features(generate(_attributes(NUM_REAL), seed=DATA_SEED)[0])
        self._uncached: Tensor | None = None

    def scores(self) -> dict[str, Callable[[Tensor], float]]:
        """What ``compare`` asks of the sounds of each row, the uncached ones first."""
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
        """Share of sounds [n, 1, samples] whose attribute of this number is recognised."""
        return class_accuracy(
            self._logits(sounds)[attribute], _attributes(len(sounds))[:, attribute]
        )

    def divergence(self, sounds: Tensor) -> float:
        """Divergence of the labels from those of the first set that was asked about, in nats."""
        logits = self._logits(sounds)
        if self._uncached is None:
            self._uncached = torch.cat(logits, dim=1)
        reference = torch.split(self._uncached, list(NUM_CLASSES), dim=1)
        return sum(map(label_divergence, logits, reference))

    def distance(self, sounds: Tensor) -> float:
        """Frechet distance of the classifier's features to those of real sounds."""
        return frechet_distance(self._features(sounds), self._real)

    @torch.no_grad()
    def _logits(self, sounds: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._classifier(sounds))

    @torch.no_grad()
    def _features(self, sounds: Tensor) -> Tensor:
        return torch.cat([self._classifier.features(part) for part in torch.split(sounds, 50)])


def real_sounds(count: int) -> Tensor:
    """Sounds that neither training nor ``Judge`` heard, in the order of the compared ones."""
    return generate(_attributes(count), seed=DATA_SEED + 1)[0]


def _attributes(count: int) -> Tensor:
    """What the first sounds of the comparison are: [count, 3]."""
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
    """Sounds to listen to, and their spectrograms side by side."""
    files = _sounds(folder, groups, comparison)
    uncached = _shown(comparison.images[REFERENCE])
    for interval, group in groups.items():
        rows = [(name, _shown(comparison.images[name])) for name in rows_to_show(comparison, group)]
        files.append(folder / f"spectrograms-n{interval}.png")
        plots.plot_spectrograms(rows, uncached, SAMPLING_RATE, files[-1])
    return files


def _sounds(folder: Path, groups: Groups, comparison: Comparison) -> list[Path]:
    """One sound of every timbre, uncached and under every schedule."""
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
    """One sound of every timbre, each at another pitch: [5, 1, samples]."""
    places = [NUM_CLASSES[1] * i + i % NUM_CLASSES[1] for i in range(NUM_CLASSES[0])]
    return sounds[places]
