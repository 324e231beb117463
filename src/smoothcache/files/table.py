"""A table of numbers and what is known about it: one safetensors file, data only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .document import Value, parse_json, write_atomically

_DOCUMENT = "smoothcache"  # the entry of the metadata that holds the JSON document


def save_table(
    path: str | os.PathLike[str],
    name: str,
    table: npt.NDArray[np.float64],
    document: Mapping[str, Any],
) -> None:
    """Writes a table under a name, with its document as metadata.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    write_atomically(path, save({name: table}, {_DOCUMENT: json.dumps(document)}))


def load_table(path: Path, name: str, what: str) -> tuple[npt.NDArray[np.float64], Value]:
    """Reads what ``save_table`` wrote: the table and its document.

    Args:
        path: The file.
        name: Of the table.
        what: What the file should be, for the message if it is something else.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is damaged, or has no such table of float64.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'.")
    file = Value(None, str(path))
    try:
        with safe_open(path, framework="np") as tensors:
            metadata = tensors.metadata() or {}
            names = list(tensors.keys())
            if _DOCUMENT not in metadata or names != [name]:
                raise file.error(f"a safetensors file, but no {what}", "Check the path.")
            table = tensors.get_tensor(name)
    except (SafetensorError, TypeError, AttributeError) as error:
        raise file.error(f"not a safetensors file, or cut short ({error})") from error
    if table.dtype != np.float64:
        raise file.error(f"{name} are stored as {table.dtype}, expected float64")
    return table, parse_json(metadata[_DOCUMENT], f"{path}, metadata")
