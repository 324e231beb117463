"""Tables with JSON metadata in one safetensors file."""

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
    more: Mapping[str, npt.NDArray[Any]] | None = None,
) -> None:
    """Writes a named table, and optionally more tables, with a document as metadata.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    write_atomically(path, save({name: table, **(more or {})}, {_DOCUMENT: json.dumps(document)}))


def load_table(path: Path, name: str, what: str) -> tuple[npt.NDArray[np.float64], Value]:
    """Reads a file with a single table; returns the table and its document."""
    tables, document = load_tables(path, name, what, allows_more=False)
    return tables[name], document


def load_tables(
    path: Path, name: str, what: str, *, allows_more: bool = True
) -> tuple[dict[str, npt.NDArray[Any]], Value]:
    """Reads a file written by ``save_table``; returns all tables and their document.

    Args:
        path: The file.
        name: Name of the main table.
        what: Expected content of the file, for error messages.
        allows_more: Whether other tables are allowed.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is damaged, or has no float64 table of this name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'.")
    file = Value(None, str(path))
    try:
        with safe_open(path, framework="np") as tensors:
            metadata = tensors.metadata() or {}
            names = list(tensors.keys())
            is_one = name in names if allows_more else names == [name]
            if _DOCUMENT not in metadata or not is_one:
                raise file.error(f"a safetensors file, but not a {what} file", "Check the path.")
            tables = {key: tensors.get_tensor(key) for key in names}
    except (SafetensorError, TypeError, AttributeError) as error:
        raise file.error(f"not a safetensors file, or cut short ({error})") from error
    if tables[name].dtype != np.float64:
        raise file.error(f"{name} are stored as {tables[name].dtype}, expected float64")
    return tables, parse_json(metadata[_DOCUMENT], f"{path}, metadata")
