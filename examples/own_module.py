"""Sample faster from a model and a sampler of one's own, with nothing of diffusers."""

import torch
from torch import nn

import smoothcache


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, num_heads=4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, time):
        x = x + self.attn(x + time, x, x, need_weights=False)[0]
        return x + self.mlp(x + time)


class Dit(nn.ModuleList):
    def forward(self, x, t):
        for block in self:
            x = block(x, t.sin()[:, None, None])
        return x


@torch.no_grad()
def sample(i, num_steps=20):  # generation number i, from start to end
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(i))
    for step in range(num_steps):  # rectified flow, from t = 1 to t = 0
        x = x - model(x, torch.full((2,), 1 - step / num_steps)) / num_steps
    return x


model = Dit(Block(dim=32) for _ in range(4)).eval()
calibration = smoothcache.calibrate(model, sample, num_samples=3)
with smoothcache.cached(model, smoothcache.plan(calibration, alpha=0.18)) as run:
    sample(1000)
print(run.schedule, run.summary(), sep="\n")
