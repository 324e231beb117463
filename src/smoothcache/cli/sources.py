"""Images that are read from folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..checks import listed
from ..diffusers_io.call_arguments import check_name, image_arguments
from ..errors import InvalidArgumentError
from ..optional import optional_module

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def images_of(pipeline: Any, sources: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Argument of a pipeline -> the images of a folder, in the order of their names.

    Args:
        pipeline: What is to take them.
        sources: Folders, or NAME=FOLDER for the argument of that name.

    Raises:
        InvalidArgumentError: If the pipeline takes no image, there is none, or one is damaged.
        MissingPackageError: If pillow is not installed.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for source in sources:
        name, _, folder = source.rpartition("=")
        if name:
            check_name(pipeline, name, f"--images {source}", image_arguments(pipeline))
        elif not (names := image_arguments(pipeline)):
            raise InvalidArgumentError(f"{type(pipeline).__name__} takes no images")
        else:
            name = names[0]
        if name in found:
            raise InvalidArgumentError(
                f"images for '{name}' are given twice; {type(pipeline).__name__} takes images as "
                f"{listed(image_arguments(pipeline))}: give NAME=DIR"
            )
        found[name] = _read_images(Path(folder))
    return found


def _read_images(folder: Path) -> tuple[Any, ...]:
    if not folder.is_dir():
        raise InvalidArgumentError(f"there is no folder '{folder}' to read images from")
    files: Sequence[Path] = sorted(x for x in folder.iterdir() if x.suffix.lower() in IMAGES)
    if not files:
        raise InvalidArgumentError(
            f"there is no image in '{folder}'; images end in {listed(IMAGES, 9)}"
        )
    image = optional_module("PIL.Image", extra="demo")
    images = []
    for file in files:
        try:
            with image.open(file) as opened:
                images.append(opened.convert("RGB"))
        except Exception as error:  # a file can be damaged, or too large, in any way
            raise InvalidArgumentError(f"the image '{file}' cannot be read: {error}") from error
    return tuple(images)
