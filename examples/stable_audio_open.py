"""Stable Audio Open, the paper's text-to-audio model, under DPM-Solver++ SDE with 100 steps."""

import argparse

import tiny
import torch
from diffusers import StableAudioPipeline

import smoothcache
from smoothcache.diffusers_io import third_order_sde

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="stabilityai/stable-audio-open-1.0", help="folder or hub id")
parser.add_argument("--prompt", default="the sound of a hammer hitting a wooden surface")
parser.add_argument("--steps", type=int, default=100, help="solver steps (100)")
parser.add_argument("--alpha", type=float, default=0.15, help="largest error of a reuse (0.15)")
parser.add_argument("--samples", type=int, default=10, help="sounds to calibrate on (10)")
parser.add_argument("--tiny", action="store_true", help="random weights, to try the script out")
args = parser.parse_args()

if args.tiny:
    pipe = tiny.stable_audio()
else:
    pipe = StableAudioPipeline.from_pretrained(args.model, torch_dtype=torch.float16).to("cuda")
pipe.scheduler = third_order_sde(pipe.scheduler)  # its noise follows from the generator's seed


def sample(i, prompt="music"):
    seed = torch.Generator().manual_seed(i)
    return pipe(prompt, num_inference_steps=args.steps, generator=seed).audios


calibration = smoothcache.calibrate(pipe, sample, num_samples=args.samples)
schedule = smoothcache.plan(calibration, alpha=args.alpha)
with smoothcache.cached(pipe, schedule) as run:
    waveform = sample(1000, args.prompt)  # [1, channels, samples] at pipe.vae.sampling_rate
print(schedule, run.summary(), sep="\n")
