"""A pipeline of a toy that takes prompts, under noise schedulers of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from support.toys import CLASSES, TOKENS, WIDTH, build
from torch import Tensor

STEPS = 12


class PromptPipeline:
    """Takes a prompt, whose length is the class, and returns what its toy makes of noise."""

    def __init__(self, seed: int = 0, depth: int = 2) -> None:
        from diffusers import DDIMScheduler

        self.transformer = build("single", seed, depth=depth)
        self.scheduler: Any = DDIMScheduler(clip_sample=False)
        self.components = {"transformer": self.transformer}
        self.calls: list[tuple[str, int]] = []

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        num_inference_steps: int = STEPS,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor]:
        self.calls.append((prompt, num_inference_steps))
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, TOKENS, WIDTH, generator=generator)
        for t in scheduler.timesteps:
            label = torch.tensor([len(prompt) % CLASSES])
            output = 0.3 * guidance_scale * self.transformer.denoise(x, t[None].float(), label)
            x = scheduler.step(output, t, x).prev_sample
        return (x,)

    def sample(self, i: int, num_inference_steps: int = STEPS, scheduler: Any = None) -> Tensor:
        """Generation i as ``search`` asks for it."""
        own = self.scheduler
        self.scheduler = own if scheduler is None else scheduler
        try:
            generator = torch.Generator().manual_seed(i)
            return self("a" * (i % CLASSES), num_inference_steps, generator=generator)[0]
        finally:
            self.scheduler = own

    def alone(self, i: int) -> Tensor:
        """Generation i, of which nothing can be changed."""
        return self.sample(i)
