"""Write a trained model as a diffusers pipeline in half precision."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderOobleck, CosineDPMSolverMultistepScheduler, StableAudioPipeline
from torch import nn
from transformers import ByT5Tokenizer

from training.common import forget_paths, move_files


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
    forget_paths(fresh)
    move_files(fresh, folder)
