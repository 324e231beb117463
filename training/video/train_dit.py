"""Train the spatial-temporal transformer by flow matching and export the pipeline.

The transformer works on latents of the autoencoder under the output of the text encoder
(`train_vae.py` and `train_text_encoder.py` first). What is exported are running averages of the
weights, as a folder that `ClipPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smoothcache.demo.clips import ATTRIBUTES, generate
from smoothcache.demo.stdit import FrameVAE, STDiT
from smoothcache.demo.stdit.transformer import NUM_TIMESTEPS
from training import parallel
from training.common import Run, parser, random_rows, update_average
from training.video.export import export_pipeline
from training.video.train_text_encoder import encoded_captions

SHIFT = 2.0  # of the solver's noise levels, towards noise, where a clip's content is decided
NOISE_MEAN = 0.5  # of the logit of the noise level in training


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The rectified flow of sampling."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def caption_numbers(labels: Tensor, drop: float) -> Tensor:
    """Place of each caption in `encoded_captions`, [n]; the empty one for a share of `drop`."""
    place = torch.zeros(len(labels), dtype=torch.long)
    for i, values in enumerate(ATTRIBUTES.values()):
        place = place * len(values) + labels[:, i]
    empty = torch.tensor([len(values) for values in ATTRIBUTES.values()]).prod()
    return torch.where(torch.rand(len(labels)) < drop, empty, place)


def noise_levels(n: int) -> Tensor:
    """Logit-normal noise levels in (0, 1), [n], one from each of n equally likely parts."""
    quantiles = (torch.randperm(n) + torch.rand(n)) / n
    return torch.sigmoid(NOISE_MEAN + torch.special.ndtri(quantiles.clamp(1e-4, 1 - 1e-4)))


def velocity_loss(model: Callable[..., Any], latents: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Weighted mean squared error of the velocity, 0-d, for latents [n, channels, frames, h, w].

    The weights are the noise levels, so that detail, which is decided where there is little noise,
    does not outweigh what moves where.

    Source: Liu et al., "Flow Straight and Fast", arXiv 2209.03003; noise levels as in Esser et
    al., "Scaling Rectified Flow Transformers", arXiv 2403.03206.
    """
    levels = noise_levels(len(latents)).to(latents.device)
    noise = torch.randn(latents.shape).to(latents.device)
    noisy = torch.lerp(latents, noise, levels.view(-1, 1, 1, 1, 1))
    velocity = model(noisy, NUM_TIMESTEPS * levels, text, mask, return_dict=False)[0]
    errors = (velocity - (noise - latents)).square().mean((1, 2, 3, 4))
    return (levels * errors).mean()


@torch.no_grad()
def encoded_pool(vae: FrameVAE, size: int, seed: int, folder: Path) -> tuple[Tensor, Tensor]:
    """Scaled latents [size, channels, frames, h, w] and labels [size, 4], kept on the disk."""
    cache = folder / f"latents-{size}-{seed}.safetensors"
    if parallel.rank() == 0 and not cache.exists():
        clips, labels = generate(size, seed=seed)
        parts = [
            vae.encode(x.flatten(0, 1).to(vae.device)).mean.cpu().unflatten(0, (len(x), -1))
            for x in torch.split(clips, 32)
        ]
        latents = torch.cat(parts).transpose(1, 2).contiguous() * vae.config.scaling_factor
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents, "labels": labels}, cache)
    parallel.wait()
    pool = load_file(cache)
    return pool["latents"], pool["labels"]


def main() -> None:
    """Train, exporting the averaged weights every few minutes and at the end."""
    options = parser(__doc__, steps=10000, batch=16, lr=1.5e-3, out="video/dit")
    options.add_argument("--vae", type=Path, default=Path("runs/video/vae/final"))
    options.add_argument("--text", type=Path, default=Path("runs/video/text_encoder/final"))
    options.add_argument("--pool", type=int, default=6000, help="number of training clips")
    options.add_argument("--drop", type=float, default=0.1, help="share of samples without text")
    options.add_argument("--width", type=int, default=96)
    options.add_argument("--depth", type=int, default=4, help="spatial blocks, and temporal ones")
    options.add_argument("--export", type=Path, default=Path("runs/video/latest-pipeline"))
    options.add_argument("--export-every", type=float, default=300.0, help="seconds")
    args = options.parse_args()
    parallel.start()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    vae = FrameVAE.from_pretrained(args.vae).to(args.device).eval()
    latents, labels = encoded_pool(vae, args.pool, args.seed, args.out)
    text, mask = (x.to(args.device) for x in encoded_captions(args.text))
    model = STDiT(width=args.width, depth=args.depth, text_dim=text.shape[2]).to(args.device)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    run = Run(args, {"model": model, "average": average}, optimizer)
    exported, losses = time.monotonic(), []
    for step in run:
        rows = random_rows(latents, args.batch_size)
        chosen = caption_numbers(labels[rows], args.drop).to(args.device)
        loss = velocity_loss(model, latents[rows].to(args.device), text[chosen], mask[chosen])
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(average, model, step)
        losses.append(loss.item())
        if step % 20 == 0:
            run.record(loss=sum(losses) / len(losses))
            losses.clear()
        if parallel.rank() == 0 and time.monotonic() - exported > args.export_every:
            export_pipeline(average, vae, new_scheduler(), args.text, args.export)
            exported = time.monotonic()
    if parallel.rank() == 0:
        export_pipeline(average, vae, new_scheduler(), args.text, args.export)
    parallel.stop()


if __name__ == "__main__":
    main()
