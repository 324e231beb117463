"""Reads images from folders and ADM's .npz files in batches."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count
from ..errors import FileFormatError, InvalidArgumentError
from ..optional import optional_module

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_images(path: str | os.PathLike[str], *, batch_size: int = 64) -> Iterator[Tensor]:
    """Reads images from an .npz file, or from a folder of .npz files or images, sorted by name.

    An .npz file is read in parts and never loaded as a whole.

    Args:
        path: A file with images in ``arr_0``, as for ADM's evaluator, or a folder.
        batch_size: Largest number of images per batch.

    Yields:
        uint8 images [images, 3, height, width].

    Raises:
        FileFormatError: If there are no images, or a file is damaged or of another kind.
        InvalidArgumentError: If the path does not exist.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/samples.npz", arr_0=np.zeros((5, 8, 8, 3), dtype=np.uint8))
        ...     [len(images) for images in read_images(folder, batch_size=2)]
        [2, 2, 1]
    """
    check_count("batch_size", batch_size, least=1)
    source = Path(path)
    if source.is_dir():
        shards = sorted(source.glob("*.npz"))
        pictures = sorted(x for x in source.iterdir() if x.suffix.lower() in PICTURES)
        if bool(shards) == bool(pictures):
            found = "both .npz files and pictures" if shards else "neither .npz files nor pictures"
            raise FileFormatError(f"{path}: the folder holds {found}; it must hold one of them.")
        if pictures:
            yield from _pictures(pictures, batch_size)
        for shard in shards:
            yield from _npz(shard, batch_size)
    elif source.is_file():
        yield from _npz(source, batch_size)
    else:
        raise InvalidArgumentError(f"'{path}' is neither a file nor a folder.")


def _pictures(paths: Sequence[Path], batch_size: int) -> Iterator[Tensor]:
    image = optional_module("PIL.Image", extra="evaluate")
    batch: list[Tensor] = []
    for path in paths:
        try:
            with image.open(path) as opened:
                pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
        except (OSError, ValueError, SyntaxError) as error:
            raise FileFormatError(f"{path}: not a readable picture ({error}).") from error
        if batch and (len(batch) == batch_size or pixels.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(pixels)
    yield torch.stack(batch)


def _npz(path: Path, batch_size: int) -> Iterator[Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                names = ", ".join(archive.namelist())
                raise FileFormatError(f"{path}: no array 'arr_0' of images; there are {names}.")
            with archive.open("arr_0.npy") as member:
                version = np.lib.format.read_magic(member)
                reader = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, by_column, dtype = reader(member)
                if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or by_column:
                    raise FileFormatError(
                        f"{path}: 'arr_0' must be uint8 images [images, height, width, 3], got "
                        f"{dtype} of shape {list(shape)}."
                    )
                size = int(np.prod(shape[1:]))
                for start in range(0, shape[0], batch_size):
                    count = min(batch_size, shape[0] - start)
                    data = member.read(count * size)
                    if len(data) < count * size:
                        raise FileFormatError(f"{path}: 'arr_0' is cut short at image {start}.")
                    pixels = np.frombuffer(data, dtype=np.uint8).reshape(count, *shape[1:])
                    yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path}: not an .npz file of images ({error}).") from error
