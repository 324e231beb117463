"""Class labels of samples, drawn at random."""

from __future__ import annotations

import torch

from ..checks import check_count


def random_classes(num_samples: int, num_classes: int, seed: int) -> tuple[int, ...]:
    """Class labels at random, as ADM draws them; the same for the same seed.

    Args:
        num_samples: How many.
        num_classes: Labels are below this.
        seed: Of the draw.

    Returns:
        A label for each sample.

    Raises:
        InvalidArgumentError: If an argument is too small.

    Example:
        >>> random_classes(6, 10, seed=0) == random_classes(6, 10, seed=0)
        True
    """
    check_count("num_samples", num_samples, least=1)
    check_count("num_classes", num_classes, least=1)
    check_count("seed", seed, least=0)
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(num_classes, (num_samples,), generator=generator).tolist())
