"""Real architectures, tiny and with random weights: the models that the library is tried on."""

from __future__ import annotations

from ._tiny import TinyModel as TinyModel
from ._tiny import noise as noise


def all_models() -> dict[str, TinyModel]:
    """The transformers of diffusers by class name, then the layouts of other codebases."""
    from . import diffusers_ace_to_flux, diffusers_glm_to_mochi, diffusers_motif_to_zimage, layouts

    parts = (diffusers_ace_to_flux, diffusers_glm_to_mochi, diffusers_motif_to_zimage)
    diffusers = {name: make for part in parts for name, make in part.MODELS.items()}
    return {**dict(sorted(diffusers.items())), **layouts.LAYOUTS}
