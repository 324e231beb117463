"""Train the autoencoder that sees a clip frame by frame.

Frames of 32x32 pixels become latents of 4x8x8, scaled to unit standard deviation by the
`scaling_factor` in the saved config.
"""

from __future__ import annotations

import torch

from smoothcache.demo.clips import CLIP_SIZE, generate
from training.autoencoder import new_autoencoder, options, train_autoencoder


def main() -> None:
    """Train, then save the autoencoder to `<out>/final`."""
    args = options(__doc__, steps=4000, out="video/vae").parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    # Two frames of a clip suffice: what moves is always the same.
    frames, _ = generate(args.pool // 2, seed=args.seed, frames=2)
    held_out, _ = generate(32, seed=args.seed + 1)
    vae = new_autoencoder((12, 24, 48), CLIP_SIZE, groups=4)
    train_autoencoder(vae, frames.flatten(0, 1), held_out.flatten(0, 1), args)


if __name__ == "__main__":
    main()
