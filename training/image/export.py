"""Write a trained model as a diffusers pipeline in half precision."""

from __future__ import annotations

import copy
import json
import shutil
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
    """Save copies of the parts in float16, so that `DiTPipeline.from_pretrained(folder)` works.

    Files are replaced one by one when all are written; others in the folder stay.
    """
    names = dict(enumerate(CLASS_NAMES))
    pipe = DiTPipeline(
        copy.deepcopy(transformer).to("cpu", torch.float16),
        copy.deepcopy(vae).to("cpu", torch.float16, memory_format=torch.contiguous_format),
        scheduler,
        id2label=names,
    )
    pipe.register_to_config(id2label=names)
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
