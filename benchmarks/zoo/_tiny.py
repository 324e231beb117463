"""What the zoo says of one architecture, and how most of them are made and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]
Call = Callable[[nn.Module, Tensor, Tensor], Tensor]


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

    build: Build
    call: Call
    shape: tuple[int, ...]
    blocks: tuple[str, ...] = ("transformer_blocks",)
    refiners: tuple[str, ...] = ()
    note: str = ""


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Random numbers that are the same in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def diffusers_model(name: str, **config: Any) -> Build:
    """Makes a model of diffusers by the name of its class."""

    def build() -> nn.Module:
        import diffusers  # not before it is needed: layouts of other codebases need none of it

        model: nn.Module = getattr(diffusers, name)(**config)
        return model

    return build


def redraw(model: nn.Module, *names: str) -> nn.Module:
    """Draws afresh the parameters whose paths end in one of the names.

    Many start at zero, where zeros would hide a branch or the whole output.
    """
    for path, parameter in model.named_parameters():
        if path.endswith(names):
            nn.init.normal_(parameter, std=0.1)
    return model


def per_thousand(t: Tensor) -> Tensor:
    """Timesteps in (0, 1]."""
    return t / 1000


def rising(t: Tensor) -> Tensor:
    """Timesteps in [0, 1) that begin at 0."""
    return 1 - t / 1000


def named(
    *,
    text: tuple[int, int] | None = None,
    time: Callable[[Tensor], Tensor] = lambda t: t,
    **inputs: Any,
) -> Call:
    """Calls a model in the manner of most: latents, timestep and text by their usual names.

    Args:
        text: Tokens of the text and their width; None for a model that takes no text so.
        time: Makes the timestep that the model takes of one in (0, 1000].
        inputs: What else it takes: a value, or a function that makes it of the latents.
    """

    def call(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        given = {name: value(x) if callable(value) else value for name, value in inputs.items()}
        if text is not None:
            given["encoder_hidden_states"] = noise(len(x), *text)
        found: Tensor = model(hidden_states=x, timestep=time(t), **given, return_dict=False)[0]
        return found

    return call


def grid_ids(height: int, width: int, axes: int = 3, plane: float = 0) -> Tensor:
    """Places [height * width, axes] of the tokens of a picture: its plane, row and column."""
    ids = torch.zeros(height, width, axes)
    ids[..., 0] = plane
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.flatten(0, 1)
