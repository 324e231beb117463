"""Open-Sora v1.2 in its own code: what is handed over is the loaded STDiT3, and a sampling loop."""

import tiny
import torch

import smoothcache

args = tiny.options(__doc__, steps=30, alpha=0.1, samples=10)

if args.tiny:
    (model, encode), shape, device = tiny.open_sora(), (4, 3, 8, 8), "cpu"
else:  # with https://github.com/hpcaitech/Open-Sora at v1.2, 2 s at 480p
    from opensora.models import stdit, text_encoder

    shape, device = (4, 15, 60, 106), "cuda"
    model = stdit.STDiT3.from_pretrained("hpcai-tech/OpenSora-STDiT-v3").to(device).eval()
    encode = text_encoder.T5Encoder("DeepFloyd/t5-v1_1-xxl", 300, device).encode


@torch.no_grad()
def sample(i, guidance=7.0):
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(i)).to(device)
    text = encode(["a waterfall in a forest"])
    text["y"] = torch.cat([text["y"], model.y_embedder.y_embedding.expand_as(text["y"])])
    size = {"fps": z.new_tensor([24]), "height": z.new_tensor([480]), "width": z.new_tensor([854])}
    for step in range(args.steps):
        t = z.new_full((2,), 1000 * (1 - step / args.steps))
        given, free = model(z.expand(2, *shape), t, **text, **size)[:, :4].chunk(2)
        z = z + (free + guidance * (given - free)) / args.steps
    return z


calibration = smoothcache.calibrate(model, sample, num_samples=args.samples)
schedule = smoothcache.plan(calibration, alpha=args.alpha)
with smoothcache.cached(model, schedule) as run:
    latents = sample(1000)
print(schedule, run.summary(), sep="\n")
