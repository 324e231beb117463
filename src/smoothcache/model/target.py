"""The user's model, resolved once per public call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .denoisers import find_denoisers


@dataclass(frozen=True, eq=False)
class Target:
    """A pipeline or module with its denoisers.

    Public functions call ``Target.of(model)`` first and pass the target on. Every function that
    takes a model also takes a target, so denoisers are searched once.

    Attributes:
        model: The user's pipeline or module.
        denoisers: Denoisers by the prefix of their layers' paths, as in ``find_denoisers``.

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
        """Returns the target of a model; a target is returned unchanged.

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
        """Class name of the pipeline or module, for messages."""
        return type(self.model).__name__

    @property
    def noise_scheduler(self) -> Any | None:
        """The pipeline's current noise scheduler, which users may replace; None for a module."""
        return None if isinstance(self.model, nn.Module) else getattr(self.model, "scheduler", None)

    @property
    def solver(self) -> str | None:
        """Class name of the noise scheduler; None for a bare module."""
        scheduler = self.noise_scheduler
        return None if scheduler is None else type(scheduler).__name__

    def only(self, name: str) -> Target:
        """Returns a target with only one of the denoisers.

        Args:
            name: Prefix of the denoiser.

        Returns:
            A target whose single denoiser has the prefix ``""``.
        """
        return Target(self.model, {"": self.denoisers[name]})

    def replaced(self) -> list[str]:
        """Finds the denoisers that have been replaced in the pipeline.

        Returns:
            Prefixes of denoisers that are no longer part of it.
        """
        now = list(find_denoisers(self.model).values())
        return [name for name, denoiser in self.denoisers.items() if denoiser not in now]
