"""Open-Sora v1.2 in its own code: what is handed over is the loaded STDiT3, and a sampling loop."""

import argparse

import tiny
import torch

import smoothcache

parser = argparse.ArgumentParser(description=__doc__)
for name, default in {"steps": 30, "alpha": 0.1, "samples": 10}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default, help=f"({default})")
parser.add_argument("--tiny", action="store_true", help="random weights, to try the script out")
args = parser.parse_args()
SIZE = {"fps": 24.0, "height": 480.0, "width": 854.0}
if args.tiny:
    (model, encode), shape, device = tiny.open_sora(), (4, 3, 8, 8), "cpu"
else:  # with https://github.com/hpcaitech/Open-Sora at v1.2, 2 s at 480p
    from opensora.models import stdit, text_encoder

    shape, device = (4, 15, 60, 106), "cuda"
    model = (
        stdit.STDiT3.from_pretrained("hpcai-tech/OpenSora-STDiT-v3")
        .to(device)
        .requires_grad_(False)
    )
    encode = text_encoder.T5Encoder("DeepFloyd/t5-v1_1-xxl", 300, device).encode


def sample(i):  # with guidance 7, in one batch
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(i)).to(device)
    text = {**encode(["a waterfall"]), **{x: z.new_tensor([n]) for x, n in SIZE.items()}}
    text["y"] = torch.cat([text["y"], model.y_embedder.y_embedding.expand_as(text["y"])])
    for step in range(args.steps):
        v = model(z.expand(2, *shape), z.new_full((2,), 1000 - 1000 * step / args.steps), **text)
        z = z + (7 * v[:1, :4] - 6 * v[1:, :4]) / args.steps
    return z


schedule = smoothcache.plan(smoothcache.calibrate(model, sample, args.samples), alpha=args.alpha)
with smoothcache.cached(model, schedule) as run:
    latents = sample(1000)
print(schedule, run.summary(), sep="\n")
