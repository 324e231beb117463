"""The version of the package, read from its installed metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("smoothcache")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"
