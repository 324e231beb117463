"""Real architectures, tiny and with random weights: the models that the library is tried on."""

from __future__ import annotations

from ._tiny import TinyModel as TinyModel
from ._tiny import noise as noise


def all_models() -> dict[str, TinyModel]:
    """The transformers of diffusers by class name, then the layouts of other codebases."""
    from . import layouts, part_a, part_b, part_c

    diffusers = {**part_a.MODELS, **part_b.MODELS, **part_c.MODELS}
    return {**dict(sorted(diffusers.items())), **layouts.LAYOUTS}
