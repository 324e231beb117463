"""Open-Sora v1.2 in its own code: what is handed over is the loaded STDiT3, and a sampling loop."""

import argparse

import tiny
import torch

import smoothcache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=30, help="steps of rectified flow (30)")
parser.add_argument("--alpha", type=float, default=0.1, help="largest error of a reuse (0.1)")
parser.add_argument("--samples", type=int, default=10, help="clips to calibrate on (10)")
parser.add_argument("--tiny", action="store_true", help="random weights, to try the script out")
args = parser.parse_args()

if args.tiny:
    (model, encode), shape, device = tiny.open_sora(), (4, 3, 8, 8), "cpu"
else:  # with https://github.com/hpcaitech/Open-Sora at v1.2, 2 s at 480p
    from opensora.models.stdit import STDiT3
    from opensora.models.text_encoder import T5Encoder

    shape, device = (4, 15, 60, 106), "cuda"
    model = STDiT3.from_pretrained("hpcai-tech/OpenSora-STDiT-v3").to(device).eval()
    encode = T5Encoder("DeepFloyd/t5-v1_1-xxl", 300, device).encode
size = {key: torch.tensor([n], device=device) for key, n in (("height", 480.0), ("width", 854.0))}


@torch.no_grad()
def sample(i, guidance=7.0):
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(i)).to(device)
    text = encode(["a waterfall"]) | size | {"fps": torch.tensor([24.0], device=device)}
    text["y"] = torch.cat([text["y"], model.y_embedder.y_embedding.expand_as(text["y"])])
    for step in range(args.steps):
        t = torch.full((2,), 1000 * (1 - step / args.steps), device=device)
        given, free = model(torch.cat([z, z]), t, **text)[:, :4].chunk(2)
        z = z + (free + guidance * (given - free)) / args.steps
    return z


calibration = smoothcache.calibrate(model, sample, num_samples=args.samples)
with smoothcache.cached(model, smoothcache.plan(calibration, alpha=args.alpha)) as run:
    latents = sample(1000)
print(run.schedule, run.summary(), sep="\n")
