"""The data set of the video demo: clips of one moving coloured shape, with captions.

Frames are drawn like the images of `shapes`, and the data is determined by a seed.
Lengths are in pixels, speeds in pixels per frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .shapes import OUTLINES, pixel_centres, rotate, soft_gradients, uniform

ATTRIBUTES = {
    "colour": ("red", "green", "blue", "yellow", "purple", "white"),
    "shape": ("circle", "square", "triangle", "cross"),
    "direction": ("left", "right", "up", "down"),
    "speed": ("slowly", "quickly"),
}
NUM_FRAMES, CLIP_SIZE = 8, 32
COLOURS = torch.tensor(
    [
        [0.90, 0.15, 0.15],
        [0.15, 0.80, 0.20],
        [0.20, 0.35, 0.95],
        [0.95, 0.85, 0.15],
        [0.70, 0.20, 0.85],
        [0.95, 0.95, 0.95],
    ]
)
DIRECTIONS = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])  # y points down
SPEEDS = torch.tensor([0.6, 2.0])
UPRIGHT = torch.tensor([-math.pi / 2])  # shapes are defined pointing right
CHUNK = 256


def generate(
    num_clips: int | Tensor,
    seed: int,
    *,
    frames: int = NUM_FRAMES,
    size: int = CLIP_SIZE,
) -> tuple[Tensor, Tensor]:
    """Generates clips of moving shapes and their attributes.

    Args:
        num_clips: Number of clips with random attributes, or the attributes as an integer tensor
            of shape [n, 4].
        seed: Seed of everything else.
        frames: Number of frames per clip.
        size: Side length of a frame in pixels.

    Returns:
        Clips of shape [n, frames, 3, size, size] in [-1, 1], and labels of shape [n, 4]: for each
        of `ATTRIBUTES` the index of its value.

    Example:
        >>> clips, labels = generate(2, seed=0)
        >>> clips.shape, labels.shape
        (torch.Size([2, 8, 3, 32, 32]), torch.Size([2, 4]))
    """
    rng = torch.Generator().manual_seed(seed)
    if isinstance(num_clips, Tensor):
        labels = num_clips.long()
    else:
        counts = map(len, ATTRIBUTES.values())
        drawn = [torch.randint(count, (num_clips,), generator=rng) for count in counts]
        labels = torch.stack(drawn, dim=1)
    clips = [_draw(chunk, frames, size, rng) for chunk in torch.split(labels, CHUNK)]
    return torch.cat(clips), labels


def caption(labels: Sequence[int] | Tensor) -> str:
    """Returns the caption of a clip with these attributes.

    Example:
        >>> caption([0, 2, 1, 0])
        'a red triangle moving right slowly'
    """
    values = zip(ATTRIBUTES.values(), labels, strict=True)
    colour, shape, direction, speed = (names[int(label)] for names, label in values)
    return f"a {colour} {shape} moving {direction} {speed}"


def all_labels() -> Tensor:
    """Returns the attributes of all possible captions, [captions, 4]."""
    return torch.cartesian_prod(*(torch.arange(len(names)) for names in ATTRIBUTES.values()))


def spread_labels(count: int) -> Tensor:
    """Returns attributes of `count` clips, [count, 4], with balanced values.

    Example:
        >>> [caption(row) for row in spread_labels(2)]
        ['a red circle moving left slowly', 'a green square moving right quickly']
    """
    turn = torch.arange(count)
    mixed = [turn, turn + turn // 4, turn + turn // 8, turn + turn // 32]
    return torch.stack(mixed, 1) % torch.tensor([len(names) for names in ATTRIBUTES.values()])


def _draw(labels: Tensor, frames: int, size: int, rng: torch.Generator) -> Tensor:
    """Draws one chunk of clips of shape [n, frames, 3, size, size] in [-1, 1]."""
    n = len(labels)
    colour, shape, direction, speed = labels.unbind(1)
    pixels = pixel_centres(size)
    radius = size * uniform((n,), 0.225, 0.24, rng)
    centres = _paths(direction, speed, frames, size, rng)
    inside = torch.stack(
        [_coverage(pixels - centre[:, None], shape, radius) for centre in centres.unbind(1)], dim=1
    )[..., None]
    paint = (COLOURS[colour] + uniform((n, 3), -0.03, 0.03, rng)).clamp(0, 1)
    background = uniform((n, 1), 0.15, 0.3, rng).expand(n, 3)
    backdrop = soft_gradients(pixels, background, size, rng, most=0.12)
    drawn = inside * paint[:, None, None] + (1 - inside) * backdrop[:, None]
    return (2 * drawn - 1).transpose(2, 3).reshape(n, frames, 3, size, size)


def _paths(
    direction: Tensor, speed: Tensor, frames: int, size: int, rng: torch.Generator
) -> Tensor:
    """Returns the centres of shapes in each frame, [n, frames, 2], near the middle at half time."""
    n = len(direction)
    pace = SPEEDS[speed] * uniform((n,), 0.95, 1.05, rng) * size / CLIP_SIZE
    time = torch.arange(frames) - (frames - 1) / 2
    along = DIRECTIONS[direction] * pace[:, None]
    middle = size * uniform((n, 2), -0.05, 0.05, rng)
    return middle[:, None] + time[:, None] * along[:, None]


def _coverage(offset: Tensor, shape: Tensor, radius: Tensor) -> Tensor:
    """Returns the fraction of each pixel covered by the shape, [n, p], for offsets [n, p, 2]."""
    local = rotate(offset, -UPRIGHT) / radius[:, None, None]
    distance = torch.empty(local.shape[:-1])
    for label, name in enumerate(ATTRIBUTES["shape"]):
        chosen = shape == label
        if chosen.any():
            distance[chosen] = OUTLINES[name](local[chosen])
    return (0.5 - distance * radius[:, None]).clamp(0, 1)
