"""Calibrations on disk, so that a model that was accelerated once need not be calibrated again."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..calibration.curves import Calibration
from ..errors import FileFormatError, InvalidArgumentError, SmoothCacheError, SmoothCacheWarning

VARIABLE = "SMOOTHCACHE_CACHE"
_SUFFIX = ".safetensors"
_KEY = re.compile(r"[A-Za-z0-9_+.-]+")


def default_folder() -> Path:
    """The folder that ``SMOOTHCACHE_CACHE`` names, or one in the user's cache."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "smoothcache"


@dataclass(frozen=True)
class CalibrationEntry:
    """A calibration in the cache.

    Attributes:
        name: Of its file, without the suffix.
        path: Of its file.
        nbytes: Size of the file.
    """

    name: str
    path: Path
    nbytes: int

    def load(self) -> Calibration:
        """Reads the calibration.

        Returns:
            What was saved.

        Raises:
            FileFormatError: If the file is damaged.
        """
        return Calibration.load(self.path)


class CalibrationCache:
    """Calibrations by their keys, one file each.

    What cannot be read or written is never an error of the acceleration: it is told in a warning,
    and the calibration is done again.

    >>> CalibrationCache("nowhere").entries()
    ()

    Args:
        folder: Where the files are; None for the folder that ``SMOOTHCACHE_CACHE`` names, or
            ``smoothcache`` in the user's cache (``XDG_CACHE_HOME``).

    Attributes:
        folder: Where the files are.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder).expanduser()

    def entries(self) -> tuple[CalibrationEntry, ...]:
        """What is in the cache.

        Returns:
            The entries by name; none if there is no such folder.
        """
        if not self.folder.is_dir():
            return ()
        return tuple(
            CalibrationEntry(path.stem, path, path.stat().st_size)
            for path in sorted(self.folder.glob(f"*{_SUFFIX}"))
        )

    def entry(self, name: str) -> CalibrationEntry:
        """The entry of a name, or of the beginning of one.

        Args:
            name: As ``entries`` gives it.

        Returns:
            The entry.

        Raises:
            InvalidArgumentError: If there is none, or several begin like this.
        """
        entries = self.entries()
        found = [x for x in entries if x.name == name] or [
            x for x in entries if name and x.name.startswith(name)
        ]
        if len(found) != 1:
            what = "several calibrations begin" if found else "there is no calibration that begins"
            raise InvalidArgumentError(
                f"{what} with {name!r} in '{self.folder}'; smoothcache cache list shows all of them"
            )
        return found[0]

    def load(self, key: str) -> Calibration | None:
        """The calibration of a key.

        Args:
            key: Of letters, digits and some punctuation.

        Returns:
            The calibration; None if there is none, or it cannot be read, which is warned of.
        """
        path = self._path(key)
        try:
            return Calibration.load(path)
        except FileNotFoundError:
            return None
        except (SmoothCacheError, OSError) as error:
            warnings.warn(
                f"a cached calibration cannot be used, and is made again: {error}",
                SmoothCacheWarning,
                stacklevel=4,
            )
            return None

    def save(self, key: str, calibration: Calibration) -> None:
        """Writes a calibration; one of the same key is replaced.

        Args:
            key: As for ``load``.
            calibration: What is to be kept.
        """
        path = self._path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            calibration.save(path)
        except OSError as error:
            warnings.warn(
                f"the calibration cannot be kept in '{self.folder}' ({error}); name another "
                f"folder in {VARIABLE}, or pass cache=False",
                SmoothCacheWarning,
                stacklevel=4,
            )

    def clear(self, names: Sequence[str] = ()) -> tuple[CalibrationEntry, ...]:
        """Removes calibrations.

        Args:
            names: Of the entries, or beginnings of them; all if there is none.

        Returns:
            What was removed.

        Raises:
            InvalidArgumentError: If there is no such entry; nothing is removed then.
        """
        chosen = tuple(map(self.entry, names)) if names else self.entries()
        for entry in chosen:
            entry.path.unlink(missing_ok=True)
        return chosen

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise FileFormatError(f"{key!r} cannot be the name of a file")
        return self.folder / f"{key}{_SUFFIX}"
