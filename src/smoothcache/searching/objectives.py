"""Objectives: distances between an output and its reference."""

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


def output_tensors(output: Any, call: str) -> Any:
    """The tensors of an output, detached and on the CPU: one tensor, or a tuple of several.

    Args:
        output: What ``sample`` returned: a tensor, or containers that hold tensors.
        call: The call of ``sample``, for the message.

    Raises:
        InvalidArgumentError: If there is no tensor.
    """
    tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
    if not tensors:
        raise InvalidArgumentError(
            f"{call} returned {type(output).__name__}; it must return the final tensor (latents, "
            "or what is decoded from them), because schedules are compared by it"
        )
    tensors = [x.detach().cpu() for x in tensors]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def is_finite(output: Any) -> bool:
    """Whether all values of all tensors are finite."""
    return all(bool(torch.isfinite(x).all()) for x in pytree.tree_leaves(output))


def flattened(output: Any) -> Tensor:
    """All values of all tensors in one; [values], float32."""
    return torch.cat([x.float().flatten() for x in pytree.tree_leaves(output)])


def l2_norm(output: Any) -> float:
    """The L2 norm of all values of all tensors together."""
    return math.sqrt(sum(float(x.double().square().sum()) for x in pytree.tree_leaves(output)))


def latent_l2(output: Any, reference: Any) -> float:
    """``||output - reference||_2 / ||reference||_2`` over all tensors, dimensionless.

    >>> latent_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1

    Args:
        output: A tensor or several, of any shape.
        reference: As many tensors of the same shapes.

    Raises:
        InvalidArgumentError: If the shapes differ.
    """
    outputs, references = pytree.tree_leaves(output), pytree.tree_leaves(reference)
    if [x.shape for x in outputs] != [x.shape for x in references]:
        raise InvalidArgumentError(
            f"sample(i) returned the shapes {[list(x.shape) for x in outputs]}, but before that "
            f"{[list(x.shape) for x in references]}; they must be the same"
        )
    pairs = list(zip(outputs, references, strict=True))
    distance = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    norm = sum(float(b.double().square().sum()) for _, b in pairs)
    return math.sqrt(distance / norm) if norm else math.sqrt(distance)


def typical_l2(output: Any, reference: Any) -> float:
    """The geometric mean of ``latent_l2`` over the samples of a batch, dimensionless.

    One sample that ends far from its reference dominates ``latent_l2``, but not the geometric mean.
    A mean PSNR over samples orders schedules in the same way.

    >>> x = torch.tensor([[4.0], [1.0]])
    >>> round(typical_l2(torch.tensor([[4.4], [2.0]]), x), 3)
    0.316

    Args:
        output: A tensor or several, each [batch, ...]. Tensors without a common batch size count
            as one sample.
        reference: As many tensors of the same shapes.

    Raises:
        InvalidArgumentError: If the shapes differ.
    """
    whole = latent_l2(output, reference)
    outputs, references = pytree.tree_leaves(output), pytree.tree_leaves(reference)
    sizes = {len(x) if x.ndim else 0 for x in references}
    if len(sizes) != 1 or 0 in sizes:
        return whole
    samples = range(*sizes)
    distances = [latent_l2([x[i] for x in outputs], [x[i] for x in references]) for i in samples]
    return math.exp(sum(math.log(max(x, 1e-12)) for x in distances) / len(distances))


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {"latent_l2": latent_l2, "typical_l2": typical_l2}
)
