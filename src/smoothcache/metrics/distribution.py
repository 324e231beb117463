"""Quality of sets of samples, without a reference per sample."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import InvalidArgumentError
from .features import check_pair
from .frechet import gaussian_distance
from .statistics import Statistics


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Returns the Frechet distance between two sets of feature vectors, modelled as Gaussians.

    With Inception features this is the FID. Other features can be used to compare samplers, if all
    comparisons use the same features. The estimate is biased upwards by an amount that decreases
    with the number of vectors, so compare only sets of equal size.

    Args:
        features: Features of the samples; [samples, features].
        reference: Features of real data or uncached samples; [references, features].

    Returns:
        The squared distance, in squared units of the features; never negative.

    Raises:
        InvalidArgumentError: If features have the wrong shape, are not finite, or fewer than two.

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
    """Returns the fraction of samples that a classifier recognises as their label.

    Args:
        logits: Logits of the classifier; [samples, classes].
        labels: Label of each sample; integers, [samples].

    Returns:
        A fraction in [0, 1].

    Raises:
        InvalidArgumentError: If shapes or types are wrong, or a label is out of range.

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
    """Returns the fraction of samples that a classifier recognises, for each attribute.

    Args:
        logits: Logits [samples, values] by attribute.
        labels: Labels by attribute; integers, [samples].

    Returns:
        Fractions in [0, 1] by attribute.

    Raises:
        InvalidArgumentError: If attributes differ, or shapes or types are wrong.

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
