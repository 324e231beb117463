"""What the user handed over, resolved once for each public call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .denoisers import find_denoisers


@dataclass(frozen=True, eq=False)
class Target:
    """A pipeline or module, with the denoisers that were found in it.

    Public functions call ``Target.of(model)`` first and pass the target on. Every function that
    takes a model also takes its target, so the denoisers are looked for once.

    Attributes:
        model: What the user handed over.
        denoisers: Prefix of a layer's path -> denoiser, as ``find_denoisers`` gives them.

    Example:
        >>> from torch import nn
        >>> target = Target.of(nn.Identity())
        >>> target.name, list(target.denoisers), Target.of(target) is target
        ('Identity', [''], True)
    """

    model: Any
    denoisers: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: Any) -> Target:
        """The target of a model; a target is returned as it is.

        Args:
            model: A diffusers pipeline, a module, or a target.

        Returns:
            The model with its denoisers.

        Raises:
            InvalidArgumentError: If ``model`` is neither a module nor a pipeline.
            LayersNotFoundError: If no component of the pipeline takes a timestep.
        """
        return model if isinstance(model, Target) else cls(model, find_denoisers(model))

    @property
    def name(self) -> str:
        """Class of the pipeline or module, for messages."""
        return type(self.model).__name__

    @property
    def noise_scheduler(self) -> Any | None:
        """The pipeline's noise scheduler at this moment, because users exchange it; else None."""
        return None if isinstance(self.model, nn.Module) else getattr(self.model, "scheduler", None)

    @property
    def solver(self) -> str | None:
        """Class of the noise scheduler; None for a bare module."""
        scheduler = self.noise_scheduler
        return None if scheduler is None else type(scheduler).__name__

    def only(self, name: str) -> Target:
        """The same pipeline, of which one denoiser alone is meant.

        Args:
            name: Prefix of the denoiser.

        Returns:
            A target with this denoiser, under the prefix ``""``.
        """
        return Target(self.model, {"": self.denoisers[name]})

    def replaced(self) -> list[str]:
        """Looks for denoisers that were exchanged since.

        Returns:
            Prefixes of those that are no longer in the pipeline.
        """
        now = list(find_denoisers(self.model).values())
        return [name for name, denoiser in self.denoisers.items() if denoiser not in now]
