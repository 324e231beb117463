"""Measure the exported pipeline and write its model card, loss curve and sample strips."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from smoothcache.demo.classifier import load_as
from smoothcache.demo.clip_classifier import ClipClassifier
from smoothcache.demo.clips import generate, spread_labels
from training.card import draw_losses, length, megabytes, millions, read_log, smoothed
from training.common import RUNS
from training.video.evaluate import FOLDER, load_pipeline, recognised, sample_clips

TEMPLATE = Path(__file__).with_name("card.md")
SCALE = 2  # the strips show every pixel as 2x2
PARTS = ("vae", "decoder", "text_encoder", "classifier", "dit")


def sample_strips(samples: Tensor) -> Image.Image:
    """Samples [n, frames, 3, h, w] in [-1, 1], a row each, frames from left to right."""
    pixels = (127.5 * (samples.clamp(-1, 1) + 1)).round().byte()
    grid = pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    picture = Image.fromarray(grid.numpy())
    return picture.resize((SCALE * picture.width, SCALE * picture.height), Image.Resampling.NEAREST)


def table(real: dict[str, float], samples: dict[str, float]) -> str:
    """Recognition rates by attribute, as Markdown."""
    lines = ["| attribute | real clips | samples |", "|---|---|---|"]
    lines += [f"| {name} | {real[name]:.1%} | {samples[name]:.1%} |" for name in real]
    return "\n".join(lines)


def main() -> None:
    """Write README.md, loss_curve.png and samples.png into the pipeline's folder."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--folder", type=Path, default=FOLDER)
    options.add_argument("--runs", type=Path, default=RUNS / "video", help="the training logs")
    options.add_argument("--samples", type=int, default=192)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--guidance", type=float, default=2.0)
    options.add_argument("--threads", type=int, default=2)
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    pipe = load_pipeline(args.folder)
    classifier = load_as(ClipClassifier, args.folder / "classifier")
    labels = spread_labels(args.samples)
    samples = sample_clips(pipe, labels, seed=0, steps=args.steps, guidance=args.guidance)
    rates = table(
        recognised(classifier, *generate(768, seed=999)), recognised(classifier, samples, labels)
    )
    logs = {name: read_log(args.runs / name / "loss.csv") for name in PARTS}
    draw_losses(logs["dit"], args.folder / "loss_curve.png", "weighted velocity error")
    sample_strips(samples[:12]).save(args.folder / "samples.png", optimize=True)
    card = TEMPLATE.read_text().format(
        parameters=millions(pipe.transformer),
        vae_parameters=millions(pipe.vae),
        text_parameters=millions(pipe.text_encoder),
        classifier_parameters=millions(classifier),
        **{f"{name}_length": length(log) for name, log in logs.items()},
        final_loss=smoothed(logs["dit"]["loss"])[-1],
        table=rates,
        samples=args.samples,
        steps=args.steps,
        guidance=args.guidance,
    )
    (args.folder / "README.md").write_text(card)
    print(f"{rates}\n{megabytes(args.folder):.1f} MB")


if __name__ == "__main__":
    main()
