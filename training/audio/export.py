"""Write a trained model as a diffusers pipeline in half precision."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderOobleck, CosineDPMSolverMultistepScheduler, StableAudioPipeline
from torch import nn
from transformers import ByT5Tokenizer


def export_pipeline(
    denoiser: nn.Module,
    vae: Path,
    tokenizer: ByT5Tokenizer,
    scheduler: CosineDPMSolverMultistepScheduler,
    folder: Path,
) -> None:
    """Save copies of the parts in float16, so that `StableAudioPipeline.from_pretrained` works.

    Files are replaced one by one when all are written; others in the folder stay.

    Args:
        denoiser: Has the text encoder, the projection and the transformer.
        vae: Folder of the autoencoder.
        tokenizer: Of the captions.
        scheduler: Of the pipeline.
        folder: Where to write.
    """

    def halved(module: nn.Module) -> nn.Module:
        return copy.deepcopy(module).to("cpu", torch.float16)

    pipe = StableAudioPipeline(
        vae=AutoencoderOobleck.from_pretrained(vae).half(),
        text_encoder=halved(denoiser.text_encoder),
        projection_model=halved(denoiser.projection_model),
        tokenizer=tokenizer,
        transformer=halved(denoiser.transformer),
        scheduler=scheduler,
    )
    fresh = folder.with_name(f"{folder.name}.new")
    pipe.save_pretrained(fresh)
    for config in [*fresh.glob("*.json"), *fresh.glob("*/config.json")]:
        _forget_paths(config)
    _move_files(fresh, folder)


def _move_files(source: Path, target: Path) -> None:
    """Move all files below `source` to the same places below `target`."""
    for path in [path for path in source.rglob("*") if path.is_file()]:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    shutil.rmtree(source)


def _forget_paths(config: Path) -> None:
    """Drop the note of which folder a part was loaded from."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2) + "\n")
