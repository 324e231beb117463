"""A pipeline of which only one denoiser is meant."""

from __future__ import annotations

from typing import Any

from ..steps.noise_scheduler import noise_scheduler


class PartOfPipeline:
    """A pipeline, of whose denoisers only one runs under a schedule."""

    def __init__(self, pipeline: Any, name: str) -> None:
        self._pipeline = pipeline
        self._name = name

    @property
    def components(self) -> dict[str, Any]:
        return {self._name: self._pipeline.components[self._name]}

    @property
    def scheduler(self) -> Any:
        return noise_scheduler(self._pipeline)
