"""Measure the exported pipeline and write its model card, loss curve and spectrograms."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from smoothcache.demo.audio import GUIDANCE, load_tones
from smoothcache.demo.classifier import load_as
from smoothcache.demo.tone_classifier import ToneClassifier
from smoothcache.demo.tones import ATTRIBUTES, SAMPLING_RATE, generate
from smoothcache.metrics import log_mel, signal_to_noise_ratio
from training.audio.evaluate import (
    FOLDER,
    rebuilt,
    recognised,
    sample_sounds,
    table,
    wanted_attributes,
)
from training.card import draw_losses, length, millions, read_log, smoothed
from training.common import RUNS

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


def main() -> None:
    """Write README.md, loss_curve.png and samples.png into the pipeline's folder."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--folder", type=Path, default=FOLDER)
    options.add_argument("--runs", type=Path, default=RUNS / "audio", help="the training logs")
    options.add_argument("--samples", type=int, default=120)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--threads", type=int, default=2)
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    pipe, classifier = load_tones(args.folder), load_as(ToneClassifier, args.folder / "classifier")
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
    draw_losses(logs["dit"], args.folder / "loss_curve.png", "squared error of the velocity")
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
