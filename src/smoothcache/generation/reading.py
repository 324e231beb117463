"""Reads folders of samples: every file is compared with its digest in the manifest."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checks import listed
from ..errors import FileFormatError
from ..files.media import decoded_clip, decoded_image, decoded_sound
from .manifest import SAMPLES, Manifest, SampleFile


@dataclass(frozen=True)
class SampleSet:
    """A complete folder of samples.

    Attributes:
        path: The folder.
        manifest: How it was made.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> SampleSet:
        """Opens a folder that ``sample_many`` wrote.

        Args:
            folder: With its ``manifest.json``.

        Returns:
            The samples, which are read when they are asked for.

        Raises:
            FileFormatError: If the run is not complete, or a file is missing, or one does not
                belong there, such as a shard that was copied.
        """
        path = Path(folder)
        manifest = Manifest.load(path)
        if manifest.files is None:
            raise FileFormatError(
                f"'{folder}' is not complete: run the command that began it again, which goes on "
                "with what is missing."
            )
        present = {x.name for x in (path / SAMPLES).iterdir()} if (path / SAMPLES).is_dir() else ()
        expected = {file.file for file in manifest.files}
        missing, others = sorted(expected - set(present)), sorted(set(present) - expected)
        if missing:
            raise FileFormatError(
                f"'{path / SAMPLES}' lacks {listed(missing)}; run the command that made the folder "
                "again, which generates what is missing."
            )
        if others:
            raise FileFormatError(
                f"'{path / SAMPLES}' holds {listed(others)}, which the manifest does not name: "
                "copies, or files of another run. Remove what does not belong there."
            )
        return cls(path, manifest)

    @property
    def folder(self) -> Path:
        """Where the files are: what ADM's evaluator, VBench and stable-audio-metrics are given."""
        return self.path / SAMPLES

    @property
    def files(self) -> tuple[SampleFile, ...]:
        """The files, in the order of their samples."""
        return self.manifest.files or ()

    def __len__(self) -> int:
        return self.manifest.num_samples

    def read(self, file: SampleFile) -> Tensor:
        """The samples of a file.

        Args:
            file: One of ``files``.

        Returns:
            uint8 images [samples, 3, height, width]; sounds [1, channels, samples] between -1 and
            1; or uint8 clips [1, frames, 3, height, width].

        Raises:
            FileFormatError: If its bytes are not those that were written.
        """
        path = self.folder / file.file
        data = path.read_bytes()
        if len(data) != file.nbytes or hashlib.sha256(data).hexdigest() != file.sha256:
            raise FileFormatError(
                f"{path}: the file is damaged, as its digest is not that of the manifest. Delete "
                "it, and run the command that made the folder again."
            )
        layout = self.manifest.layout
        if layout == "npz":
            pixels = np.load(io.BytesIO(data), allow_pickle=False)["arr_0"]
            if len(pixels) != file.count:
                raise FileFormatError(f"{path}: {len(pixels)} images, not {file.count}.")
            return torch.from_numpy(pixels).permute(0, 3, 1, 2)
        decoders = {"png": decoded_image, "wav": decoded_sound}
        return decoders.get(layout, decoded_clip)(data)[None]

    def batches(self, rank: int = 0, size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples of a rank's files.

        Args:
            rank: Which rank.
            size: Of how many.

        Yields:
            The samples of a file, as ``read`` gives them, and their numbers.
        """
        for file in self.files[rank::size]:
            yield self.read(file), torch.tensor(list(file.samples))


def join_arrays(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Writes all images of a folder into one .npz file, as ADM's evaluator takes them.

    Memory: one shard.

    Args:
        folder: That ``sample_many`` wrote, of images.
        path: The file to write.

    Raises:
        FileFormatError: If a file is damaged, or the folder holds no images of one size.

    Example:
        >>> import tempfile, torch
        >>> from smoothcache.generation import sample_many
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     black = lambda numbers: torch.zeros(len(numbers), 3, 8, 8)
        ...     _ = sample_many(black, f"{folder}/run", 5, shard_size=2, progress=False)
        ...     join_arrays(f"{folder}/run", f"{folder}/samples.npz")
        ...     np.load(f"{folder}/samples.npz")["arr_0"].shape
        (5, 8, 8, 3)
    """
    import zipfile

    samples = SampleSet.open(folder)
    if samples.manifest.layout not in ("npz", "png"):
        raise FileFormatError(f"'{folder}' holds no images, but {samples.manifest.layout} files.")
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.tmp")
    shape: tuple[int, ...] = ()
    try:
        with zipfile.ZipFile(unfinished, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                for images, _ in samples.batches():
                    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
                    if not shape:
                        shape = pixels.shape[1:]
                        header = {
                            "descr": "|u1",
                            "fortran_order": False,
                            "shape": (len(samples), *shape),
                        }
                        np.lib.format.write_array_header_1_0(member, header)
                    if pixels.shape[1:] != shape:
                        raise FileFormatError(
                            f"'{folder}' holds images of {list(shape)} and of "
                            f"{list(pixels.shape[1:])}; ADM's file has one size."
                        )
                    member.write(pixels.tobytes())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
