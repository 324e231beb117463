"""Sample faster from a diffusers pipeline: calibrate once, plan, run under the schedule."""

import argparse

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import smoothcache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="facebook/DiT-XL-2-256", help="folder or hub id")
parser.add_argument("--steps", type=int, default=50, help="solver steps (50)")
parser.add_argument("--alpha", type=float, default=0.18, help="largest error of a reuse (0.18)")
parser.add_argument("--samples", type=int, default=10, help="samples to calibrate on (10)")
parser.add_argument("--tiny", action="store_true", help="random weights, to try the script out")
args = parser.parse_args()

if args.tiny:
    size = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 1000}
    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, **size)
    vae = AutoencoderKL(norm_num_groups=8, block_out_channels=(16,))
    pipe = DiTPipeline(dit.eval(), vae.eval(), DDIMScheduler())
else:
    pipe = DiTPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def sample(i):  # one generation, with its own input and seed: write here what your pipeline needs
    seed = torch.Generator().manual_seed(i)
    return pipe([i % 10], num_inference_steps=args.steps, generator=seed, output_type="pt").images


calibration = smoothcache.calibrate(pipe, sample, num_samples=args.samples)
schedule = smoothcache.plan(calibration, alpha=args.alpha)
with smoothcache.cached(pipe, schedule) as run:
    image = sample(1000)

print(schedule)
print(run.summary())
