"""DiT-XL/2-256, the first model of the paper: images of ImageNet classes under DDIM."""

import argparse

import tiny
import torch
from diffusers import DDIMScheduler, DiTPipeline

import smoothcache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="facebook/DiT-XL-2-256", help="folder or hub id")
parser.add_argument("--steps", type=int, default=50, help="solver steps (50)")
parser.add_argument("--alpha", type=float, default=0.18, help="largest error of a reuse (0.18)")
parser.add_argument("--samples", type=int, default=10, help="samples to calibrate on (10)")
parser.add_argument("--tiny", action="store_true", help="random weights, to try the script out")
args = parser.parse_args()

if args.tiny:
    pipe = tiny.dit()
else:
    pipe = DiTPipeline.from_pretrained(args.model, torch_dtype=torch.float16).to("cuda")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)


def sample(i):
    seed = torch.Generator().manual_seed(i)
    output = pipe([97 * i % 1000], num_inference_steps=args.steps, generator=seed, output_type="pt")
    return output.images


calibration = smoothcache.calibrate(pipe, sample, num_samples=args.samples)
schedule = smoothcache.plan(calibration, alpha=args.alpha)
schedule.save("dit-xl-2-256.json")  # serving needs nothing else
with smoothcache.cached(pipe, schedule) as run:
    image = sample(1000)
print(schedule, run.summary(), sep="\n")
