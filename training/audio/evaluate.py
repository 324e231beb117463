"""Measure the audio demo: how often does the classifier recognise what was asked for?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from smoothcache.demo.audio import BATCH, batch_attributes, load_tones, sample_tones
from smoothcache.demo.classifier import load_as
from smoothcache.demo.tone_classifier import ToneClassifier
from smoothcache.demo.tones import ATTRIBUTES, generate

FOLDER = Path("src/smoothcache/demo/tones-dit")


def wanted_attributes(count: int) -> Tensor:
    """Balanced attributes: [count, 3]."""
    return torch.cat([batch_attributes(i) for i in range(-(-count // BATCH))])[:count]


def sample_sounds(pipe: Any, attributes: Tensor, *, seed: int, steps: int) -> Tensor:
    """One sample for each row of attributes: waveforms [n, 1, samples]."""
    sounds = [
        sample_tones(pipe, attributes[start : start + BATCH], seed + start, steps)
        for start in trange(0, len(attributes), BATCH, desc="sampling")
    ]
    return torch.cat(sounds)


@torch.no_grad()
def recognised(
    classifier: ToneClassifier, sounds: Tensor, attributes: Tensor
) -> dict[str, dict[str, float]]:
    """Attribute -> its value -> share of the sounds with it that the classifier puts there."""
    parts = [classifier(part) for part in torch.split(sounds, 50)]
    rates: dict[str, dict[str, float]] = {}
    for i, (attribute, names) in enumerate(ATTRIBUTES.items()):
        predicted = torch.cat([logits[i] for logits in parts]).argmax(dim=1)
        right, labels = (predicted == attributes[:, i]).double(), attributes[:, i]
        rates[attribute] = {
            name: right[labels == label].mean().item() for label, name in enumerate(names)
        }
    return rates


Rates = dict[str, dict[str, float]]


def table(real: Rates, rebuilt: Rates, samples: Rates) -> str:
    """Recognition rates of all three, as Markdown."""
    columns = (real, rebuilt, samples)
    lines = ["| attribute | | real sounds | rebuilt | samples |", "|---|---|---|---|---|"]
    for attribute, values in real.items():
        for name in values:
            cells = " | ".join(f"{rates[attribute][name]:.0%}" for rates in columns)
            lines.append(f"| {attribute} | {name} | {cells} |")
        means = [sum(rates[attribute].values()) / len(values) for rates in columns]
        cells = " | ".join(f"**{mean:.1%}**" for mean in means)
        lines.append(f"| **{attribute}** | **all** | {cells} |")
    return "\n".join(lines)


@torch.no_grad()
def rebuilt(vae: Any, sounds: Tensor) -> Tensor:
    """What the autoencoder makes of sounds."""
    return torch.cat([vae(part).sample for part in torch.split(sounds, 20)])


def main() -> None:
    """Print the classifier's accuracy on held-out real sounds and on uncached samples."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--folder", type=Path, default=FOLDER)
    options.add_argument("--classifier", type=Path, help="its folder, if not <folder>/classifier")
    options.add_argument("--samples", type=int, default=120)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=2)
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    classifier = load_as(ToneClassifier, args.classifier or args.folder / "classifier")
    attributes = wanted_attributes(args.samples)
    pipe = load_tones(args.folder)
    sounds = sample_sounds(pipe, attributes, seed=args.seed, steps=args.steps)
    real = generate(attributes, seed=999)[0]
    sets = real, rebuilt(pipe.vae, real), sounds
    print(table(*(recognised(classifier, x, attributes) for x in sets)))


if __name__ == "__main__":
    main()
