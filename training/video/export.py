"""Write the trained parts as a pipeline in half precision."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import ByT5Tokenizer, T5EncoderModel

from smoothcache.demo.stdit import ClipPipeline, FrameVAE, STDiT
from training.common import forget_paths, move_files


def export_pipeline(
    transformer: STDiT,
    vae: FrameVAE,
    scheduler: FlowMatchEulerDiscreteScheduler,
    text_encoder: Path,
    folder: Path,
) -> None:
    """Save copies of the parts in float16, so that `ClipPipeline.from_pretrained(folder)` works."""
    pipe = ClipPipeline(
        ByT5Tokenizer.from_pretrained(text_encoder),
        T5EncoderModel.from_pretrained(text_encoder).to(torch.float16),
        copy.deepcopy(transformer).to("cpu", torch.float16),
        copy.deepcopy(vae).to("cpu", torch.float16),
        scheduler,
    )
    fresh = folder.with_name(f"{folder.name}.new")
    pipe.save_pretrained(fresh)
    forget_paths(fresh)
    _load_as_float32(fresh / "text_encoder" / "config.json")
    move_files(fresh, folder)


def _load_as_float32(config: Path) -> None:
    """Make transformers load the weights as diffusers loads the other parts."""
    content = json.loads(config.read_text())
    content["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2) + "\n")
