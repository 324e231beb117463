"""Distances between a cached sample and its reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InvalidArgumentError

Objective = Callable[[Any, Any], float]


def taken(output: Any, call: str) -> Any:
    """The tensors of an output, on the CPU.

    Raises:
        InvalidArgumentError: If there is none.
    """
    tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
    if not tensors:
        raise InvalidArgumentError(
            f"{call} returned {type(output).__name__}; it must return the final tensor (latents or "
            "what is made of them), which is what schedules are judged by"
        )
    tensors = [x.detach().cpu() for x in tensors]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def is_finite_sample(output: Any) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in pytree.tree_leaves(output))


def flattened(output: Any) -> Tensor:
    return torch.cat([x.float().flatten() for x in pytree.tree_leaves(output)])


def l2_norm(output: Any) -> float:
    return math.sqrt(sum(float(x.double().square().sum()) for x in pytree.tree_leaves(output)))


def latent_l2(output: Any, reference: Any) -> float:
    """``||output - reference||_2 / ||reference||_2`` over all tensors, dimensionless.

    >>> latent_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1

    Raises:
        InvalidArgumentError: If the two have other shapes.
    """
    outputs, references = pytree.tree_leaves(output), pytree.tree_leaves(reference)
    if [x.shape for x in outputs] != [x.shape for x in references]:
        raise InvalidArgumentError(
            f"sample(i) returned the shapes {[list(x.shape) for x in outputs]}, where "
            f"{[list(x.shape) for x in references]} came before; they must be the same"
        )
    pairs = list(zip(outputs, references, strict=True))
    distance = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    norm = sum(float(b.double().square().sum()) for _, b in pairs)
    return math.sqrt(distance / norm) if norm else math.sqrt(distance)


def typical_l2(output: Any, reference: Any) -> float:
    """The geometric mean of ``latent_l2`` over the samples of a batch, dimensionless.

    Outputs may be one tensor or several, with the batch as their first dimension. What a mean
    PSNR over samples goes by: a sample that comes out ten times as far counts as two that come
    out three times as far, not as a hundred. Tensors of different first dimensions are one sample.

    >>> x = torch.tensor([[4.0], [1.0]])
    >>> round(typical_l2(torch.tensor([[4.4], [2.0]]), x), 3)
    0.316

    Raises:
        InvalidArgumentError: If the two have other shapes.
    """
    whole = latent_l2(output, reference)
    outputs, references = pytree.tree_leaves(output), pytree.tree_leaves(reference)
    sizes = {len(x) if x.ndim else 0 for x in references}
    if len(sizes) != 1 or 0 in sizes:
        return whole
    samples = range(*sizes)
    apart = [latent_l2([x[i] for x in outputs], [x[i] for x in references]) for i in samples]
    return math.exp(sum(math.log(max(x, 1e-12)) for x in apart) / len(apart))


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {"latent_l2": latent_l2, "typical_l2": typical_l2}
)
