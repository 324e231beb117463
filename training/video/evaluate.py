"""Measure the video demo: how often does the classifier recognise what was asked for?"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

from smoothcache.demo.classifier import load_as
from smoothcache.demo.clip_classifier import ClipClassifier
from smoothcache.demo.clips import ATTRIBUTES, caption, generate, spread_labels
from smoothcache.demo.stdit import ClipPipeline
from smoothcache.metrics import attribute_accuracy

FOLDER = Path("src/smoothcache/demo/clips-stdit")


def load_pipeline(folder: Path) -> ClipPipeline:
    """The exported pipeline in float32, without a progress bar."""
    pipe = ClipPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_clips(
    pipe: ClipPipeline, labels: Tensor, *, seed: int, steps: int, guidance: float, batch: int = 12
) -> Tensor:
    """One sample per row of labels: clips [n, frames, 3, 32, 32] in [-1, 1]."""
    clips = []
    for start in trange(0, len(labels), batch, desc="sampling"):
        output = pipe(
            [caption(row) for row in labels[start : start + batch]],
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="pt",
        )
        clips.append(2 * output.frames - 1)
    return torch.cat(clips)


@torch.no_grad()
def recognised(classifier: ClipClassifier, clips: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of the clips in which the classifier sees each attribute as it was asked for."""
    wanted = dict(zip(ATTRIBUTES, labels.unbind(1), strict=True))
    return attribute_accuracy(classifier(clips), wanted)


def main() -> None:
    """Print the classifier's accuracy on held-out real clips and on samples."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--folder", type=Path, default=FOLDER)
    options.add_argument("--classifier", type=Path, help="its folder, if not <folder>/classifier")
    options.add_argument("--samples", type=int, default=96)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--guidance", type=float, default=2.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=2)
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    classifier = load_as(ClipClassifier, args.classifier or args.folder / "classifier")
    real = recognised(classifier, *generate(384, seed=999))
    labels = spread_labels(args.samples)
    sampling = {"seed": args.seed, "steps": args.steps, "guidance": args.guidance}
    clips = sample_clips(load_pipeline(args.folder), labels, **sampling)
    samples = recognised(classifier, clips, labels)
    for name in ATTRIBUTES:
        print(f"{name:10s} real {real[name]:.3f}   samples {samples[name]:.3f}")


if __name__ == "__main__":
    main()
