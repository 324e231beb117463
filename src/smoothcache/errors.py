"""Errors of smoothcache. Every message says what is wrong, where, and what to do."""

from __future__ import annotations


class SmoothCacheError(Exception):
    """Any error that smoothcache raises on purpose."""


class InvalidArgumentError(SmoothCacheError, ValueError):
    """An argument has a value that the function cannot work with."""


class LayersNotFoundError(SmoothCacheError, ValueError):
    """The model has no layer that could be reused, or nothing in it is a denoiser."""


class CalibrationError(SmoothCacheError, RuntimeError):
    """Error curves cannot be measured from what the user's sampler did."""


class FileFormatError(SmoothCacheError, ValueError):
    """A file is damaged, has a newer version, or is not a smoothcache file."""


class ScheduleMismatchError(SmoothCacheError, ValueError):
    """A schedule does not fit the model or the generation that it was asked to run."""


class AlreadyCachedError(SmoothCacheError, RuntimeError):
    """The model, or a part of it, already runs under a schedule or an observer."""


class SmoothCacheWarning(UserWarning):
    """Nothing is wrong, but the result may not be what was asked for."""


class MissingPackageError(SmoothCacheError, ImportError):
    """A package that this feature needs is not installed; the message says how to get it."""


class HubError(SmoothCacheError, OSError):
    """The hub cannot be reached, refuses, or holds no such file."""


class PipelineLoadError(SmoothCacheError, OSError):
    """There is no such pipeline, or it cannot be loaded."""
