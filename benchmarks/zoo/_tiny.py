"""What the zoo says of one architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyModel:
    """A real architecture, tiny and with random weights, and how to call it.

    Attributes:
        build: Makes the model; the caller seeds the random numbers.
        call: ``call(model, x, t)`` predicts for latents x [batch, \\*shape] at timesteps t [batch],
            which lie in (0, 1000]; the prediction has the shape of x. What else the model takes
            is the same in every call.
        shape: Latents without the batch.
        blocks: Dotted paths of the lists of blocks that a step of denoising runs through.
        refiners: Dotted paths of lists of blocks that work on the conditioning alone.
        note: What is unusual about it.
    """

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    blocks: tuple[str, ...]
    refiners: tuple[str, ...] = ()
    note: str = ""


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Random numbers that are the same in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
