"""One process at a time writes into a folder; the lock ends with the process, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from ..errors import InvalidArgumentError

FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While no other process holds the folder.

    The file stays, empty: what is locked is the open file, which the system frees even after a
    kill.

    Raises:
        InvalidArgumentError: If another process holds it.
    """
    with (folder / FILE).open("ab") as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            raise InvalidArgumentError(
                f"another process is writing into '{folder}'; wait until it has ended, or name "
                "another folder."
            ) from error
        yield


def _lock(descriptor: int) -> None:
    """Takes the lock at once or raises OSError."""
    if os.name == "nt":
        module = import_module("msvcrt")
        module.locking(descriptor, module.LK_NBLCK, 1)
    else:
        module = import_module("fcntl")
        module.flock(descriptor, module.LOCK_EX | module.LOCK_NB)
