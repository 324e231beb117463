"""Train the autoencoder that sees a clip frame by frame.

Frames of 32x32 pixels become latents of 4x8x8, scaled to unit standard deviation by the
`scaling_factor` in the saved config. With `--decoder-of` only the decoder is trained, and the
latents that a transformer has learned stay what they are.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smoothcache.demo.clips import generate
from smoothcache.demo.stdit import FrameVAE
from training.common import Run, parser, random_rows


def losses(vae: FrameVAE, frames: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Total loss and the mean absolute reconstruction error, both 0-d."""
    encoded = vae.encode(frames)
    noise = torch.randn_like(encoded.mean) * (encoded.log_variance / 2).exp()
    error = vae.decode(encoded.mean + noise).sample - frames
    loss = error.abs().mean() + error.square().mean()
    kl = encoded.mean.square() + encoded.log_variance.exp() - 1 - encoded.log_variance
    return loss + kl_weight * kl.mean() / 2, error.abs().mean()


@torch.no_grad()
def standardise(vae: FrameVAE, frames: Tensor) -> None:
    """Record the factor that brings the latents to unit standard deviation."""
    latents = vae.encode(frames).mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def main() -> None:
    """Train, then save the autoencoder to `<out>/final`."""
    options = parser(__doc__, steps=2000, batch=32, lr=2e-3, out="video/vae")
    options.add_argument("--kl-weight", type=float, default=1e-3)
    options.add_argument("--pool", type=int, default=4000, help="number of training clips")
    options.add_argument("--decoder-of", type=Path, help="autoencoder whose decoder to go on with")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    # Two frames of each clip suffice: where its shape is, and where it will be.
    pool, _ = generate(args.pool, seed=args.seed, frames=2)
    frames = pool.flatten(0, 1)
    vae = FrameVAE.from_pretrained(args.decoder_of) if args.decoder_of else FrameVAE()
    trained = vae.to(args.device).decoder if args.decoder_of else vae.to(args.device)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.lr, weight_decay=0.01)
    run = Run(args, {"vae": vae}, optimizer)
    for step in run:
        batch = frames[random_rows(frames, args.batch_size)].to(args.device)
        loss, error = losses(vae, batch, args.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            run.record(loss=loss.item(), error=error.item())
    vae.eval()
    if not args.decoder_of:
        standardise(vae, frames[:1024].to(args.device))
    held_out = generate(32, seed=args.seed + 1)[0].flatten(0, 1)
    with torch.no_grad():
        rebuilt = vae(held_out.to(args.device)).sample.cpu()
    mse = F.mse_loss(rebuilt / 2, held_out / 2)
    print(f"held-out PSNR {-10 * mse.log10():.1f} dB, scaling {vae.config.scaling_factor}")
    vae.save_pretrained(args.out / "final")


if __name__ == "__main__":
    main()
