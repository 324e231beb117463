"""Write a trained model as a diffusers pipeline in half precision."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from smoothcache.demo.shapes import CLASS_NAMES
from training.common import forget_paths, move_files


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
    forget_paths(fresh)
    move_files(fresh, folder)
