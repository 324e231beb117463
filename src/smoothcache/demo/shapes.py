"""The data set of the image demo: ten textured, coloured shapes on gradient backgrounds.

Images are drawn with signed distance functions and anti-aliased edges, and the data is determined
by a seed. Distances and lengths are in pixels unless stated otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

CLASS_NAMES = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "heart",
    "crescent",
    "arrow",
    "bar",
)
IMAGE_SIZE = 32
TILT = 0.15  # radians
CHUNK = 2048

Outline = Callable[[Tensor], Tensor]


def generate(
    num_images: int | Tensor, seed: int, *, size: int = IMAGE_SIZE
) -> tuple[Tensor, Tensor]:
    """Generates images of shapes and their classes.

    Args:
        num_images: Number of images with random classes, or the classes as an integer tensor of
            shape [n].
        seed: Seed of everything else.
        size: Side length of an image in pixels.

    Returns:
        Images of shape [n, 3, size, size] in [-1, 1], and labels of shape [n].

    Example:
        >>> images, labels = generate(4, seed=0)
        >>> images.shape, labels.shape
        (torch.Size([4, 3, 32, 32]), torch.Size([4]))
    """
    rng = torch.Generator().manual_seed(seed)
    if isinstance(num_images, Tensor):
        labels = num_images.long()
    else:
        labels = torch.randint(len(CLASS_NAMES), (num_images,), generator=rng)
    images = [_draw(chunk, size, rng) for chunk in torch.split(labels, CHUNK)]
    return torch.cat(images), labels


def _draw(labels: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Draws one chunk of images of shape [n, 3, size, size] in [-1, 1]."""
    pixels = pixel_centres(size)
    radius, centre, rotation = _random_places(len(labels), size, rng)
    local = rotate(pixels - centre[:, None], -rotation)
    distance = _distances(local / radius[:, None, None], labels) * radius[:, None]
    inside = (0.5 - distance).clamp(0, 1)[..., None]
    background, *foreground = _random_colours(len(labels), rng)
    drawn = inside * _textures(pixels, foreground, rng)
    drawn = drawn + (1 - inside) * soft_gradients(pixels, background, size, rng)
    return (2 * drawn - 1).transpose(1, 2).reshape(-1, 3, size, size)


# --- positions of the shapes ------------------------------------------------------------------


def pixel_centres(size: int) -> Tensor:
    """Returns coordinates [size * size, 2], with the origin at the centre of the image."""
    axis = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def _random_places(n: int, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns radii [n], centres [n, 2] that keep shapes inside the image, and rotations [n].

    Shapes point to the right at rotation 0, and are rotated to point up, plus or minus `TILT`.
    """
    radius = size * uniform((n,), 0.36, 0.44, rng)
    room = (size / 4 - radius / 2)[:, None]
    centre = room * uniform((n, 2), -1, 1, rng)
    return radius, centre, uniform((n,), -TILT, TILT, rng) - math.pi / 2


def rotate(points: Tensor, angle: Tensor) -> Tensor:
    """Rotates points [n, p, 2] about the origin, by one angle [n] per image."""
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x, y = points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)


# --- signed distances: negative inside, in units of the shape's radius --------------------------


def _distances(local: Tensor, labels: Tensor) -> Tensor:
    """Returns the signed distances of points [n, p, 2] to the outline of their class, [n, p]."""
    distance = torch.empty(local.shape[:-1])
    for label, name in enumerate(CLASS_NAMES):
        chosen = labels == label
        if chosen.any():
            distance[chosen] = OUTLINES[name](local[chosen])
    return distance


def _polygon(vertices: list[tuple[float, float]]) -> Outline:
    """Returns the signed distance function of a closed polygon, convex or not."""
    start = torch.tensor(vertices)
    edge = start.roll(-1, 0) - start

    def distance(points: Tensor) -> Tensor:
        offset = points[..., None, :] - start
        along = ((offset * edge).sum(-1) / (edge * edge).sum(-1)).clamp(0, 1)
        nearest = _length(offset - along[..., None] * edge).amin(-1)
        inside = _crossings(offset, edge) % 2 == 1
        return torch.where(inside, -nearest, nearest)

    return distance


def _crossings(offset: Tensor, edge: Tensor) -> Tensor:
    """Returns how many edges a ray to the right of each point crosses (odd if inside)."""
    y_start, y_end = offset[..., 1], offset[..., 1] - edge[:, 1]
    straddles = (y_start > 0) != (y_end > 0)
    side = edge[:, 0] * offset[..., 1] - edge[:, 1] * offset[..., 0]
    return (straddles & ((side > 0) == (edge[:, 1] > 0))).sum(-1)


def _length(vectors: Tensor) -> Tensor:
    """Returns the Euclidean length along the last dimension."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return length


def _circle(points: Tensor) -> Tensor:
    return _length(points) - 0.9


def _ring(points: Tensor) -> Tensor:
    return (_length(points) - 0.73).abs() - 0.24


def _crescent(points: Tensor) -> Tensor:
    bite = _length(points - torch.tensor([0.0, 0.5])) - 0.75
    return torch.maximum(_length(points) - 1, -bite)


def _regular(corners: int, inner: float | None = None) -> Outline:
    """A regular polygon, or a star whose inner corners lie at the radius `inner`."""
    count = corners if inner is None else 2 * corners
    radii = [1.0 if inner is None or i % 2 == 0 else inner for i in range(count)]
    angles = [2 * math.pi * i / count for i in range(count)]
    return _polygon(
        [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    )


def _heart() -> Outline:
    """The classical parametric heart, as a polygon of twenty-four corners."""
    corners = []
    for i in range(24):
        t = 2 * math.pi * i / 24
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        corners.append(((y + 2.5) / 16, math.sin(t) ** 3))
    return _polygon(corners)


def _mirrored(upper: list[tuple[float, float]]) -> Outline:
    """A polygon that is symmetric about the x axis, from its upper half."""
    lower = [(x, -y) for x, y in reversed(upper) if y > 0]
    return _polygon(upper + lower)


OUTLINES: dict[str, Outline] = {
    "circle": _circle,
    "square": _mirrored([(-0.7, 0.7), (0.7, 0.7)]),
    "triangle": _regular(3),
    "star": _regular(5, inner=0.42),
    "ring": _ring,
    "cross": _mirrored(
        [(-0.95, 0.3), (-0.3, 0.3), (-0.3, 0.95), (0.3, 0.95), (0.3, 0.3), (0.95, 0.3)]
    ),
    "heart": _heart(),
    "crescent": _crescent,
    "arrow": _mirrored([(-1.0, 0.28), (0.0, 0.28), (0.0, 0.8), (1.0, 0.0)]),
    "bar": _mirrored([(-1.0, 0.27), (1.0, 0.27)]),
}


# --- colours and textures -----------------------------------------------------------------------


def _random_colours(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a background and two contrasting foreground colours, each [n, 3] in [0, 1].

    The first foreground colour is the most distant from the background among eight random
    candidates. The second lies halfway between it and another of the distant candidates.
    """
    background = torch.rand((n, 3), generator=rng)
    candidates = torch.rand((n, 8, 3), generator=rng)
    contrast = _length(candidates - background[:, None])
    order = contrast.argsort(dim=1, descending=True)
    second = order.gather(1, torch.randint(1, 4, (n, 1), generator=rng))[:, 0]
    rows = torch.arange(n)
    first = candidates[rows, order[:, 0]]
    return background, first, (first + candidates[rows, second]) / 2


def soft_gradients(
    pixels: Tensor, colour: Tensor, size: int, rng: torch.Generator, *, most: float = 0.3
) -> Tensor:
    """Varies each colour [n, 3] along a random direction by at most `most`; [n, p, 3]."""
    n = len(colour)
    angle = uniform((n, 1), 0, 2 * math.pi, rng)
    direction = torch.cat([angle.cos(), angle.sin()], dim=1)
    change = uniform((n, 1, 3), -most, most, rng)
    slope = (direction @ pixels.T)[..., None] / size
    return (colour[:, None] + change * slope).clamp(0, 1)


def _textures(pixels: Tensor, colours: list[Tensor], rng: torch.Generator) -> Tensor:
    """Returns plain, gradient, striped, dotted or chequered mixtures of two colours, [n, p, 3]."""
    first, second = colours
    n = len(first)
    kind = torch.randint(5, (n,), generator=rng)
    turned = rotate(pixels.expand(n, -1, -1), uniform((n,), 0, 2 * math.pi, rng))
    period = uniform((n, 1, 1), 6.0, 9.0, rng)
    phase = uniform((n, 1, 2), 0, 2 * math.pi, rng)
    waves = (2 * math.pi * turned / period + phase).sin()
    patterns = torch.stack(
        [
            torch.zeros(waves.shape[:-1]),
            0.5 + turned[..., 0] / pixels.abs().max(),
            0.5 + 1.5 * waves[..., 0],
            1.5 * (waves.sum(-1) - 0.6),
            0.5 + 2.5 * waves.prod(-1),
        ]
    )
    mix = patterns[kind, torch.arange(n)].clamp(0, 1)[..., None]
    return (1 - mix) * first[:, None] + mix * second[:, None]
