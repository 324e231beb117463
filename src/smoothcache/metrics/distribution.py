"""How good samples are as a set, with no reference for each of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import InvalidArgumentError
from .features import check_pair
from .frechet import gaussian_distance
from .statistics import Statistics


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance between two sets of feature vectors, each taken as a Gaussian.

    With Inception features this is the FID. Any features serve to compare samplers with each
    other, as long as both sets and all comparisons use the same ones. The estimate is biased
    upwards, the more so the fewer vectors there are: compare only sets of equal size.

    Args:
        features: Of the samples; [samples, features].
        reference: Of real data, or of uncached samples; [references, features].

    Returns:
        The squared distance, in squared units of the features; never negative.

    Raises:
        InvalidArgumentError: If the features are not as described, not finite, or fewer than two.
    Source: Heusel et al., "GANs trained by a two time-scale update rule", arXiv 1706.08500.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 7.0]])
        >>> round(frechet_distance(features + 3, features), 6)
        18.0
    """
    check_pair(features, reference)
    gaussians = []
    for values in (features, reference):
        statistics = Statistics(features.shape[1], num_groups=1)
        statistics.update(values)
        gaussians.append(statistics.gaussian())
    return gaussian_distance(*gaussians)


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples that a classifier recognises as what was asked for.

    Args:
        logits: The classifier's scores; [samples, classes].
        labels: The class that each sample was asked to be; integers, [samples].

    Returns:
        A fraction in [0, 1].

    Raises:
        InvalidArgumentError: If shapes or types are not as described, or a label is no class.

    Example:
        >>> import torch
        >>> class_accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        0.5
    """
    if logits.ndim != 2 or logits.numel() == 0:
        raise InvalidArgumentError(f"logits must be [samples, classes], got {list(logits.shape)}.")
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise InvalidArgumentError(
            f"labels must be integers of shape [{logits.shape[0]}], "
            f"got {labels.dtype} of shape {list(labels.shape)}."
        )
    if not logits.isfinite().all():
        raise InvalidArgumentError("logits contain NaN or infinity.")
    labels = labels.to(logits.device)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise InvalidArgumentError(
            f"labels must be classes from 0 to {logits.shape[1] - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}."
        )
    return float((logits.argmax(dim=1) == labels).double().mean())


def attribute_accuracy(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> dict[str, float]:
    """Share of samples in which a classifier recognises what was asked for, for each attribute.

    Args:
        logits: Name of an attribute -> the classifier's scores; [samples, values].
        labels: Name of an attribute -> the value that each sample was asked to have; integers,
            [samples].

    Returns:
        Name of an attribute -> a fraction in [0, 1].

    Raises:
        InvalidArgumentError: If names differ, or shapes or types are not as described.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
        >>> attribute_accuracy({"colour": scores}, {"colour": torch.tensor([0, 0])})
        {'colour': 0.5}
    """
    if logits.keys() != labels.keys():
        raise InvalidArgumentError(
            f"the classifier knows the attributes {', '.join(logits)}, and the labels are of "
            f"{', '.join(labels)}."
        )
    return {name: class_accuracy(scores, labels[name]) for name, scores in logits.items()}
