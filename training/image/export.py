"""Write a trained model as a diffusers pipeline in half precision."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from smoothcache.demo.shapes import CLASS_NAMES


def export_pipeline(
    transformer: DiTTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: DDIMScheduler,
    folder: Path,
) -> None:
    """Save copies of the parts in float16, so that `DiTPipeline.from_pretrained(folder)` works."""
    names = dict(enumerate(CLASS_NAMES))
    pipe = DiTPipeline(
        copy.deepcopy(transformer).to("cpu", torch.float16),
        copy.deepcopy(vae).to("cpu", torch.float16, memory_format=torch.contiguous_format),
        scheduler,
        id2label=names,
    )
    pipe.register_to_config(id2label=names)
    pipe.save_pretrained(folder)
    for config in [*folder.glob("*.json"), *folder.glob("*/config.json")]:
        _forget_paths(config)


def _forget_paths(config: Path) -> None:
    """Drop the note of which folder a part was loaded from."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2) + "\n")
