"""Train the autoencoder that the diffusion transformer's latents come from.

Images of 32x32 pixels become latents of 4x16x16, scaled to unit standard deviation by the
`scaling_factor` in the saved config.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from smoothcache.demo.shapes import IMAGE_SIZE, generate
from training.common import Run, parser, random_rows


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder with one halving of the resolution."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def losses(vae: AutoencoderKL, images: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Total loss and the mean absolute reconstruction error, both 0-d."""
    posterior = vae.encode(images).latent_dist
    error = vae.decode(posterior.sample()).sample - images
    loss = error.abs().mean() + error.square().mean()
    return loss + kl_weight * posterior.kl().mean() / posterior.mean[0].numel(), error.abs().mean()


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: Tensor) -> None:
    """Bring latents to zero mean per channel and record the factor to unit standard deviation.

    The mean moves into the biases of the two 1x1 convolutions around the latents, so that
    reconstructions stay what they were.
    """
    latents = vae.encode(images).latent_dist.mode()
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    deviation = (latents - mean[:, None, None]).square().mean().sqrt().item()
    vae.register_to_config(scaling_factor=round(1 / deviation, 5))


def main() -> None:
    """Train, then save the autoencoder to `<out>/final`."""
    options = parser(__doc__, steps=2500, batch=32, lr=2e-3, out="image/vae")
    options.add_argument("--kl-weight", type=float, default=1e-3)
    options.add_argument("--pool", type=int, default=20000, help="number of training images")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, _ = generate(args.pool, seed=args.seed)
    vae = new_vae().to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=0.01)
    run = Run(args, {"vae": vae}, optimizer)
    for step in run:
        batch = images[random_rows(images, args.batch_size)].to(args.device)
        loss, error = losses(vae, batch, args.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            run.record(loss=loss.item(), error=error.item())
    standardise(vae.eval(), images[:1024].to(args.device))
    held_out, _ = generate(256, seed=args.seed + 1)
    with torch.no_grad():
        rebuilt = vae(held_out.to(args.device)).sample.cpu()
    mse = F.mse_loss(rebuilt / 2, held_out / 2)
    print(f"held-out PSNR {-10 * mse.log10():.1f} dB, scaling {vae.config.scaling_factor}")
    vae.save_pretrained(args.out / "final")


if __name__ == "__main__":
    main()
