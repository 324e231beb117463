"""Train the class-conditional diffusion transformer and export the pipeline.

The transformer predicts the noise in latents of the autoencoder (`train_vae.py` first). What is
exported are running averages of the weights, as a folder that `DiTPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smoothcache.demo.shapes import CLASS_NAMES, generate
from training import parallel
from training.common import Run, parser, random_rows, update_average
from training.image.export import export_pipeline

NULL_CLASS = 1000  # the index that DiTPipeline gives to the unconditional half of a batch


def new_transformer(num_layers: int = 8, head_dim: int = 32) -> DiTTransformer2DModel:
    """An untrained DiT over 64 tokens, initialised so that every block starts as the identity."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    model.apply(_initialise)
    for block in model.transformer_blocks:
        _zero(block.norm1.linear)
    _zero(model.proj_out_1)
    _zero(model.proj_out_2)
    return model


def trained_transformer(folder: Path) -> DiTTransformer2DModel:
    """The transformer of an exported pipeline, in float32, to train further."""
    return DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").float()


def new_scheduler() -> DDIMScheduler:
    """The noise schedule of training and sampling, as in the DiT paper."""
    return DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        with torch.no_grad():
            module.weight[len(CLASS_NAMES) : NULL_CLASS] = 0  # rows that are never asked for


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def drop_classes(labels: Tensor, probability: float) -> Tensor:
    """Labels [n] with some replaced by the null class.

    Every block of this transformer embeds the labels on its own and would drop them on its own;
    dropping them here, with the embedders in evaluation mode, keeps the blocks in agreement.
    """
    dropped = torch.rand(labels.shape) < probability
    return labels.masked_fill(dropped.to(labels.device), NULL_CLASS)


def stratified_timesteps(n: int) -> Tensor:
    """One random timestep from each of n equal parts of 0..999, in random order."""
    return ((torch.randperm(n) + torch.rand(n)) * (1000 / n)).long().clamp(max=999)


def loss_weights(scheduler: DDIMScheduler, timesteps: Tensor, cap: float = 20.0) -> Tensor:
    """Loss weights [n] for noise prediction: SNR^(-1/2), at most `cap`.

    The error of the noise is dominated by fine detail at low noise. With these weights every
    hundred timesteps have about the same share in the loss, so that outlines, which are decided
    at high noise, are learned as fast as textures.
    """
    alpha = scheduler.alphas_cumprod[timesteps]
    weights: Tensor = ((1 - alpha) / alpha).sqrt().clamp(max=cap)
    return weights


def noise_loss(
    model: Callable[..., Any], scheduler: DDIMScheduler, latents: Tensor, labels: Tensor
) -> Tensor:
    """Weighted mean squared error of the predicted noise, 0-d, for latents [n, 4, 16, 16]."""
    timesteps = stratified_timesteps(len(latents))
    noise = torch.randn(latents.shape).to(latents.device)
    weights = loss_weights(scheduler, timesteps).to(latents.device)
    timesteps = timesteps.to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0]
    loss: Tensor = (weights * (predicted - noise).square().mean((1, 2, 3))).mean()
    return loss


def encoded_pool(vae: AutoencoderKL, size: int, seed: int, folder: Path) -> tuple[Tensor, Tensor]:
    """Scaled latents [size, 4, 16, 16] and labels [size], encoded once and kept on the disk."""
    cache = folder / f"latents-{size}-{seed}.safetensors"
    if parallel.rank() == 0 and not cache.exists():
        images, labels = generate(size, seed=seed)
        with torch.no_grad():
            parts = [
                vae.encode(x.to(vae.device)).latent_dist.mode().cpu()
                for x in torch.split(images, 64)
            ]
        folder.mkdir(parents=True, exist_ok=True)
        latents = torch.cat(parts).cpu().contiguous() * vae.config.scaling_factor
        save_file({"latents": latents, "labels": labels}, cache)
    parallel.wait()
    pool = load_file(cache)
    return pool["latents"], pool["labels"]


def main() -> None:
    """Train, exporting the averaged weights every few minutes and at the end."""
    options = parser(__doc__, steps=20000, batch=64, lr=1e-3, out="image/dit")
    options.add_argument("--vae", type=Path, default=Path("runs/image/vae/final"))
    options.add_argument("--init", type=Path, help="pipeline whose transformer to start from")
    options.add_argument("--pool", type=int, default=50000, help="number of training images")
    options.add_argument("--drop", type=float, default=0.1, help="share of samples without class")
    options.add_argument("--compile", action="store_true", help="use torch.compile")
    options.add_argument("--export", type=Path, default=Path("runs/latest-pipeline"))
    options.add_argument("--export-every", type=float, default=300.0, help="seconds")
    args = options.parse_args()
    parallel.start()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    vae = AutoencoderKL.from_pretrained(args.vae).to(args.device).eval()
    latents, labels = encoded_pool(vae, args.pool, args.seed, args.out)
    model = (trained_transformer(args.init) if args.init else new_transformer()).to(args.device)
    model.eval()
    average = copy.deepcopy(model)
    forward = torch.compile(model) if args.compile else model
    scheduler = new_scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=True)
    run = Run(args, {"model": model, "average": average}, optimizer)
    exported, losses = time.monotonic(), []
    for step in run:
        rows = random_rows(latents, args.batch_size)
        batch, classes = latents[rows].to(args.device), labels[rows].to(args.device)
        loss = noise_loss(forward, scheduler, batch, drop_classes(classes, args.drop))
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
            export_pipeline(average, vae, scheduler, args.export)
            exported = time.monotonic()
    if parallel.rank() == 0:
        export_pipeline(average, vae, scheduler, args.export)
    parallel.stop()


if __name__ == "__main__":
    main()
