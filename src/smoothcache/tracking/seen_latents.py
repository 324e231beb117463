"""What is remembered of the latents of earlier calls, without keeping them."""

from __future__ import annotations

import math
import weakref

from torch import Tensor

from ..model.digests import Digest, are_equal, correlation, digest, sketch, version


class SeenLatents:
    """Latents of the last call, and of the first call of the last step.

    Attributes:
        sketch: A few elements of the last step's latents, where no list of timesteps is followed.
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
            latents: What is denoised.
            sketches: Whether to remember what they are like, because no scheduler says how the
                timesteps go.
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
        """Whether these are the very latents of the step's first call."""
        known = None if self._latents is None else self._latents()
        if known is None or known is not latents or self._version != version(latents):
            return False
        return self._version is not None or are_equal(self._digest, digest(latents))

    def goes_on_with(self, latents: Tensor | None) -> bool:
        """Whether these resemble the latents of the last call; not so where that is not known."""
        now = None if latents is None else sketch(latents, least=64, most=4096)
        likeness = correlation(now, self._previous)
        if likeness is None or now is None:
            return False
        return likeness >= max(0.5, 5 / math.sqrt(len(now)))
