"""Measure the exported pipeline and write its model card, loss curve and spectrograms."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib
import torch
from evaluate import rebuilt, recognised, sample_sounds, table, wanted_attributes
from shared import FOLDER, RUNS
from torch import Tensor, nn

from smoothcache.demo.audio import GUIDANCE, load_tones
from smoothcache.demo.tone_classifier import load_classifier
from smoothcache.demo.tones import ATTRIBUTES, SAMPLING_RATE, generate
from smoothcache.metrics import log_mel, signal_to_noise_ratio

matplotlib.use("agg")
import matplotlib.pyplot as plt

TEMPLATE = Path(__file__).with_name("card.md")


def draw_spectrograms(sounds: Tensor, path: Path) -> None:
    """One log-mel spectrogram for each timbre and pitch."""
    timbres, pitches = ATTRIBUTES["timbre"], ATTRIBUTES["pitch"]
    figure, panels = plt.subplots(
        len(timbres), len(pitches), figsize=(7, 6), layout="constrained", squeeze=False
    )
    levels = log_mel(sounds[: panels.size], SAMPLING_RATE)
    for i, (panel, picture) in enumerate(zip(panels.flat, levels, strict=True)):
        panel.imshow(picture, origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0)
        panel.set(xticks=[], yticks=[])
        if i < len(pitches):
            panel.set_title(pitches[i], fontsize=9)
        if i % len(pitches) == 0:
            panel.set_ylabel(timbres[i // len(pitches)], fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def read_log(path: Path) -> dict[str, list[float]]:
    """The columns of a run's loss log."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average."""
    average, result = values[0], []
    for value in values:
        average = weight * average + (1 - weight) * value
        result.append(average)
    return result


def draw_losses(log: dict[str, list[float]], path: Path) -> None:
    """The training loss over steps, raw and smoothed."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(log["step"], log["loss"], alpha=0.3, label="mean of 20 steps")
    axes.plot(log["step"], smoothed(log["loss"]), label="moving average")
    axes.set(xlabel="step", ylabel="squared error of the velocity", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def length(log: dict[str, list[float]]) -> str:
    """How long a run took."""
    return f"{log['step'][-1]:,.0f} steps, {log['seconds'][-1] / 60:.0f} minutes"


def millions(module: nn.Module) -> float:
    """Number of parameters, in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def main() -> None:
    """Write README.md, loss_curve.png and samples.png into the pipeline's folder."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--folder", type=Path, default=FOLDER)
    options.add_argument("--runs", type=Path, default=RUNS, help="where the training logs are")
    options.add_argument("--samples", type=int, default=120)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--threads", type=int, default=2)
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    pipe, classifier = load_tones(args.folder), load_classifier(args.folder / "classifier")
    wanted, held_out = wanted_attributes(args.samples), wanted_attributes(600)
    samples = sample_sounds(pipe, wanted, seed=0, steps=args.steps)
    real = generate(held_out, seed=999)[0]
    decoded = rebuilt(pipe.vae, real[:120])
    rates = table(
        recognised(classifier, real, held_out),
        recognised(classifier, decoded, held_out[:120]),
        recognised(classifier, samples, wanted),
    )
    logs = {
        name: read_log(args.runs / name / "loss.csv")
        for name in ("autoencoder", "classifier", "dit")
    }
    draw_losses(logs["dit"], args.folder / "loss_curve.png")
    draw_spectrograms(samples, args.folder / "samples.png")
    parts = ("transformer", "text_encoder", "projection_model", "vae")
    card = TEMPLATE.read_text().format(
        **{name: millions(getattr(pipe, name)) for name in parts},
        **{f"{name}_length": length(log) for name, log in logs.items()},
        classifier=millions(classifier),
        final_loss=smoothed(logs["dit"]["loss"])[-1],
        rebuilt=signal_to_noise_ratio(decoded, real[:120]).mean(),
        table=rates,
        samples=args.samples,
        steps=args.steps,
        guidance=GUIDANCE,
    )
    (args.folder / "README.md").write_text(card)
    print(rates)


if __name__ == "__main__":
    main()
