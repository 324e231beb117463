"""Packages that only a part of smoothcache needs: imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import MissingPackageError
from .version import how_to_install


def optional_module(name: str, *, extra: str) -> Any:
    """Imports a module by its dotted name.

    Args:
        name: For example ``"matplotlib.figure"``.
        extra: Which of smoothcache's extras brings it.

    Raises:
        MissingPackageError: If its package, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"This needs {error.name}, which is not installed: {how_to_install(extra)}"
        ) from error
