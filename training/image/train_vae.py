"""Train the autoencoder that the diffusion transformer's latents come from.

Images of 32x32 pixels become latents of 4x16x16, scaled to unit standard deviation by the
`scaling_factor` in the saved config.
"""

from __future__ import annotations

import torch

from smoothcache.demo.shapes import IMAGE_SIZE, generate
from training.autoencoder import new_autoencoder, options, train_autoencoder


def main() -> None:
    """Train, then save the autoencoder to `<out>/final`."""
    args = options(__doc__, steps=2500, out="image/vae").parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, _ = generate(args.pool, seed=args.seed)
    held_out, _ = generate(256, seed=args.seed + 1)
    train_autoencoder(new_autoencoder((24, 48), IMAGE_SIZE), images, held_out, args)


if __name__ == "__main__":
    main()
