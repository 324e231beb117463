"""Fingerprints of the latents of earlier calls, which are not kept themselves."""

from __future__ import annotations

import math
import weakref

from torch import Tensor

from ..model.digests import Digest, are_equal, correlation, digest, sketch, version


class SeenLatents:
    """Fingerprints of the latents of the last call and of the first call of the last step.

    Attributes:
        sketch: A few elements of the last step's latents; None while a list of timesteps is
            followed.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets all latents."""
        self._previous: Tensor | None = None  # a larger sketch, of the last call
        self._latents: weakref.ref[Tensor] | None = None
        self._version: int | None = None
        self._digest: Digest | None = None
        self.sketch: Tensor | None = None

    def see(self, latents: Tensor | None, *, sketches: bool) -> None:
        """Notes the latents of a call.

        Args:
            latents: The latents being denoised.
            sketches: Whether to sample their elements, because no list of timesteps is followed.
        """
        self._previous = None
        if latents is not None and sketches:
            self._previous = sketch(latents, least=64, most=4096)

    def arrive(self, latents: Tensor | None, *, sketches: bool) -> None:
        """Notes the latents of the first call of a step."""
        self.see(latents, sketches=sketches)
        self._latents = None if latents is None else weakref.ref(latents)
        self._version = version(latents)
        self._digest = None if self._version is not None or latents is None else digest(latents)
        self.sketch = sketch(latents) if latents is not None and sketches else None

    def are_the_same(self, latents: Tensor | None) -> bool:
        """Whether these are the unmodified latents of the step's first call."""
        known = None if self._latents is None else self._latents()
        if known is None or known is not latents or self._version != version(latents):
            return False
        return self._version is not None or are_equal(self._digest, digest(latents))

    def resemble(self, latents: Tensor | None) -> bool:
        """Whether these resemble the latents of the last call; False if that is unknown."""
        now = None if latents is None else sketch(latents, least=64, most=4096)
        similarity = correlation(now, self._previous)
        if similarity is None or now is None:
            return False
        return similarity >= max(0.5, 5 / math.sqrt(len(now)))
