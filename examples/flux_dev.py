"""FLUX.1-dev: two kinds of blocks, guidance distilled into the model, so one call a step."""

import argparse

import tiny
import torch
from diffusers import FluxPipeline

import smoothcache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub id")
parser.add_argument("--prompt", default="a cat that holds a sign saying hello")
parser.add_argument("--steps", type=int, default=28, help="solver steps (28)")
parser.add_argument("--alpha", type=float, default=0.15, help="largest error of a reuse (0.15)")
parser.add_argument("--samples", type=int, default=5, help="images to calibrate on (5)")
parser.add_argument("--tiny", action="store_true", help="random weights, to try the script out")
args = parser.parse_args()

if args.tiny:
    pipe, size = tiny.flux(), {"height": 32, "width": 32, "max_sequence_length": 64}
else:
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    size = {"height": 1024, "width": 1024}


def sample(i, prompt="a street in the rain", output_type="latent"):
    seed = torch.Generator().manual_seed(i)
    options = {"num_inference_steps": args.steps, "generator": seed, "output_type": output_type}
    return pipe(prompt, **size, **options).images


calibration = smoothcache.calibrate(pipe, sample, num_samples=args.samples)
schedule = smoothcache.plan(calibration, alpha=args.alpha)
with smoothcache.cached(pipe, schedule) as run:
    image = sample(1000, args.prompt, output_type="pt")
print(schedule, run.summary(), sep="\n")
