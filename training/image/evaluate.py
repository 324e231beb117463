"""Measure the image demo: how often does the classifier recognise what was asked for?"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiTPipeline
from torch import Tensor
from tqdm import trange

from smoothcache.demo.classifier import ShapeClassifier, load_classifier
from smoothcache.demo.shapes import CLASS_NAMES, generate

FOLDER = Path("src/smoothcache/demo/shapes-dit")


def load_pipeline(folder: Path) -> DiTPipeline:
    """The exported pipeline in float32, without a progress bar."""
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_images(
    pipe: DiTPipeline, labels: Tensor, *, seed: int, steps: int, guidance: float, batch: int = 20
) -> Tensor:
    """One sample per label: images [n, 3, 32, 32] in [-1, 1]."""
    images = []
    for start in trange(0, len(labels), batch, desc="sampling"):
        output = pipe(
            labels[start : start + batch].tolist(),
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="pt",
        )
        images.append(2 * output.images - 1)
    return torch.cat(images)


@torch.no_grad()
def recognised(classifier: ShapeClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """Share of the images of each class that the classifier puts there: [num_classes]."""
    correct = (classifier(images).argmax(1) == labels).double()
    return torch.stack([correct[labels == label].mean() for label in torch.unique(labels)])


def main() -> None:
    """Print the classifier's accuracy on held-out real images and on samples, class by class."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--folder", type=Path, default=FOLDER)
    options.add_argument("--classifier", type=Path, help="its folder, if not <folder>/classifier")
    options.add_argument("--samples", type=int, default=200)
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--guidance", type=float, default=3.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=2)
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    classifier = load_classifier(args.classifier or args.folder / "classifier")
    real = recognised(classifier, *generate(5000, seed=999))
    labels = torch.arange(args.samples) % len(CLASS_NAMES)
    sampling = {"seed": args.seed, "steps": args.steps, "guidance": args.guidance}
    samples = sample_images(load_pipeline(args.folder), labels, **sampling)
    rates = recognised(classifier, samples, labels)
    for name, on_real, on_samples in zip(CLASS_NAMES, real, rates, strict=True):
        print(f"{name:10s} real {on_real:.3f}   samples {on_samples:.3f}")
    print(f"{'all':10s} real {real.mean():.4f}  samples {rates.mean():.4f}")


if __name__ == "__main__":
    main()
