"""Inception Score, by splits in sample order as in ADM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_count, listed
from ..errors import InvalidArgumentError
from .result import MetricResult


class InceptionScore:
    """Accumulates class logits in batches for the Inception Score.

    ADM's protocol is 50,000 samples in splits of 5000, in order, unshuffled. The score depends on
    the split size, so all splits must be full.

    Args:
        num_classes: Number of classes; 1008 for TensorFlow's Inception graph.
        split_size: Number of samples per split.

    Raises:
        InvalidArgumentError: If a count is too small.

    Source: Salimans et al., arXiv 1606.03498; Dhariwal and Nichol, arXiv 2105.05233.
    """

    def __init__(self, num_classes: int = 1008, *, split_size: int = 5000) -> None:
        self.num_classes = check_count("num_classes", num_classes, least=2)
        self.split_size = check_count("split_size", split_size, least=2)
        self._seen = 0
        # Split index -> number of samples, sum of p log p, and sum of p [classes].
        self._splits: dict[int, tuple[int, float, Tensor]] = {}

    def update(self, logits: Tensor, indices: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            logits: Scores of classes, before the softmax; [samples, classes].
            indices: Index of each sample; by default 0, 1, ... in order.

        Raises:
            InvalidArgumentError: If shapes are wrong, or a logit is not finite.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise InvalidArgumentError(
                f"logits must be [samples, {self.num_classes}], got {list(logits.shape)}."
            )
        if not logits.isfinite().all():
            raise InvalidArgumentError("logits contain NaN or infinity.")
        if indices is None:
            indices = torch.arange(self._seen, self._seen + len(logits))
        if indices.shape != logits.shape[:1]:
            raise InvalidArgumentError(
                f"indices must be {len(logits)} integers, got {list(indices.shape)}."
            )
        self._seen += len(logits)
        log = logits.detach().cpu().double().log_softmax(dim=1)
        split = indices.cpu() // self.split_size
        for number in sorted(set(split.tolist())):
            rows = log[split == number]
            plogp = float((rows.exp() * rows).sum())
            self._add(number, len(rows), plogp, rows.exp().sum(dim=0))

    def merge(self, other: InceptionScore) -> None:
        """Merges statistics that another process has collected.

        Args:
            other: Of the same classes and splits.

        Raises:
            InvalidArgumentError: If the other has other classes or splits.
        """
        ours, theirs = ((x.num_classes, x.split_size) for x in (self, other))
        if ours != theirs:
            raise InvalidArgumentError(
                f"scores of {theirs[0]} classes in splits of {theirs[1]} cannot be merged into "
                f"scores of {ours[0]} in splits of {ours[1]}."
            )
        self._seen += other._seen
        for number, split in other._splits.items():
            self._add(number, *split)

    def result(self, *, weights: str | None = None) -> MetricResult:
        """Computes the score over all splits.

        Args:
            weights: Digest of the network.

        Returns:
            The score; its spread is the standard deviation of the splits.

        Raises:
            InvalidArgumentError: If there is no split, or a split is not full.
        """
        partial = {n: x[0] for n, x in self._splits.items() if x[0] != self.split_size}
        if partial or not self._splits:
            raise InvalidArgumentError(
                f"the Inception Score takes full splits of {self.split_size} samples, got "
                f"{self._seen} samples; the splits {listed(sorted(partial))} have "
                f"{listed(partial.values())}. Take a multiple of {self.split_size} samples, or "
                "another split_size, whose scores compare only with scores of the same."
            )
        scores = []
        for _, (count, plogp, total) in sorted(self._splits.items()):
            mean = total / count
            scores.append(math.exp(plogp / count - float(torch.xlogy(mean, mean).sum())))
        values = torch.tensor(scores, dtype=torch.float64)
        several = len(values) > 1
        return MetricResult(
            "inception_score",
            float(values.mean()),
            num_samples=self._seen,
            unit="",
            protocol=f"{len(values)} splits of {self.split_size}, in order, logits without bias",
            spread=float(values.std(correction=0)) if several else None,
            spread_of=f"standard deviation of {len(values)} splits" if several else None,
            weights=weights,
        )

    def _add(self, number: int, count: int, plogp: float, total: Tensor) -> None:
        known = self._splits.get(number, (0, 0.0, torch.zeros(self.num_classes).double()))
        self._splits[number] = (known[0] + count, known[1] + plogp, known[2] + total)


def inception_score(
    logits: Tensor, *, split_size: int = 5000, weights: str | None = None
) -> MetricResult:
    """Computes the Inception Score of logits [samples, classes]; see ``InceptionScore``.

    Args:
        logits: Class logits; [samples, classes].
        split_size: Number of samples per split.
        weights: Digest of the network.

    Returns:
        The mean over splits, with their standard deviation.

    Raises:
        InvalidArgumentError: If there are too few samples, or logits have the wrong shape.

    Example:
        >>> import torch
        >>> certain = 100 * torch.eye(4).repeat(2, 1)
        >>> round(inception_score(certain, split_size=4).value, 6)
        4.0
    """
    if logits.ndim != 2:
        raise InvalidArgumentError(f"logits must be [samples, classes], got {list(logits.shape)}.")
    score = InceptionScore(logits.shape[1], split_size=split_size)
    score.update(logits)
    return score.result(weights=weights)
