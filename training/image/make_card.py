"""Measure the exported pipeline and write its model card, loss curve and sample grid."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from smoothcache.demo.classifier import load_classifier
from smoothcache.demo.shapes import CLASS_NAMES, IMAGE_SIZE, generate
from training.card import draw_losses, length, megabytes, millions, read_log, smoothed
from training.common import RUNS
from training.image.evaluate import FOLDER, load_pipeline, recognised, sample_images

TEMPLATE = Path(__file__).with_name("card.md")
SCALE = 2  # the grid shows every pixel as 2x2


def sample_grid(samples: Tensor, columns: int) -> Image.Image:
    """Samples [n, 3, h, w] in [-1, 1], row by row."""
    side = IMAGE_SIZE
    rows = samples.clamp(-1, 1).reshape(-1, columns, 3, side, side)
    grid = rows.permute(0, 3, 1, 4, 2).reshape(-1, columns * side, 3)
    picture = Image.fromarray((127.5 * (grid + 1)).round().byte().numpy())
    return picture.resize((SCALE * picture.width, SCALE * picture.height), Image.Resampling.NEAREST)


def table(real: Tensor, samples: Tensor) -> str:
    """Recognition rates by class, as Markdown."""
    lines = ["| class | real images | samples |", "|---|---|---|"]
    for name, on_real, on_samples in zip(CLASS_NAMES, real, samples, strict=True):
        lines.append(f"| {name} | {on_real:.1%} | {on_samples:.0%} |")
    lines.append(f"| **all** | **{real.mean():.2%}** | **{samples.mean():.1%}** |")
    return "\n".join(lines)


def main() -> None:
    """Write README.md, loss_curve.png and samples.png into the pipeline's folder."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--folder", type=Path, default=FOLDER)
    options.add_argument(
        "--runs", type=Path, default=RUNS / "image", help="where the training logs are"
    )
    options.add_argument("--samples", type=int, default=300)
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--guidance", type=float, default=3.0)
    options.add_argument("--threads", type=int, default=2)
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    pipe = load_pipeline(args.folder)
    classifier = load_classifier(args.folder / "classifier")
    labels = torch.arange(args.samples) % len(CLASS_NAMES)
    samples = sample_images(pipe, labels, seed=0, steps=args.steps, guidance=args.guidance)
    real_rates = recognised(classifier, *generate(5000, seed=999))
    sample_rates = recognised(classifier, samples, labels)

    logs = {name: read_log(args.runs / name / "loss.csv") for name in ("vae", "classifier", "dit")}
    draw_losses(logs["dit"], args.folder / "loss_curve.png", "weighted noise error")
    sample_grid(samples[:100], columns=10).save(args.folder / "samples.png", optimize=True)
    card = TEMPLATE.read_text().format(
        parameters=millions(pipe.transformer),
        vae_parameters=millions(pipe.vae),
        classifier_parameters=millions(classifier),
        dit_length=length(logs["dit"]),
        vae_length=length(logs["vae"]),
        classifier_length=length(logs["classifier"]),
        final_loss=smoothed(logs["dit"]["loss"])[-1],
        table=table(real_rates, sample_rates),
        samples=args.samples,
        steps=args.steps,
        guidance=args.guidance,
    )
    (args.folder / "README.md").write_text(card)
    print(f"{table(real_rates, sample_rates)}\n{megabytes(args.folder):.1f} MB")


if __name__ == "__main__":
    main()
