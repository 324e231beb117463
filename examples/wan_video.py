"""Wan 2.1, text to video: guidance is two calls a step, which the cache keeps apart."""

import argparse

import tiny
import torch
from diffusers import WanPipeline

import smoothcache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="folder or hub id")
parser.add_argument("--prompt", default="a cat walks on the grass")
parser.add_argument("--steps", type=int, default=50, help="solver steps (50)")
parser.add_argument("--alpha", type=float, default=0.1, help="largest error of a reuse (0.1)")
parser.add_argument("--samples", type=int, default=5, help="clips to calibrate on (5)")
parser.add_argument("--tiny", action="store_true", help="random weights, to try the script out")
args = parser.parse_args()

if args.tiny:
    pipe, size = tiny.wan(), {"height": 32, "width": 32, "num_frames": 5}
else:
    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to("cuda")
    size = {"height": 480, "width": 832, "num_frames": 81}


def sample(i, prompt="a street in the rain", output_type="latent"):
    seed = torch.Generator().manual_seed(i)
    options = {"num_inference_steps": args.steps, "generator": seed, "output_type": output_type}
    return pipe(prompt, **size, **options).frames


calibration = smoothcache.calibrate(pipe, sample, num_samples=args.samples)
schedule = smoothcache.plan(calibration, alpha=args.alpha)
with smoothcache.cached(pipe, schedule) as run:
    frames = sample(1000, args.prompt, output_type="pt")
print(schedule, run.summary(), sep="\n")
