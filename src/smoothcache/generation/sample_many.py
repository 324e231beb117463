"""Generates many samples into a folder, over ranks, and goes on where a run was broken off."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InvalidArgumentError
from ..files.media import FRAMES_PER_SECOND
from ..processes import from_rank_zero, gather_from_all, join_processes, on_all_ranks, rank_and_size
from ..version import __version__
from .folder import SampleFolder
from .layouts import check_samples, encode, layout_named
from .lock import locked
from .manifest import Manifest, Setting, differences
from .shards import Shard, share_of

Sampler = Callable[[Sequence[int]], Tensor]


def sample_many(
    sample: Sampler,
    folder: str | os.PathLike[str],
    num_samples: int,
    *,
    batch_size: int = 1,
    layout: str = "npz",
    shard_size: int | None = None,
    seed: int = 0,
    inputs: Sequence[str] | Sequence[int] = (),
    names: Sequence[str] = (),
    sampling_rate: int | None = None,
    frames_per_second: float = FRAMES_PER_SECOND,
    settings: Mapping[str, Setting] | None = None,
    progress: bool = True,
) -> Manifest:
    """Generates samples into a folder; run by several ranks, each generates a share.

    Begin the ranks with ``torchrun`` or ``accelerate launch``. The work is divided by the numbers
    of the samples, so the same files are written whatever the number of ranks. After a kill at any
    moment, call it again with the same arguments: it goes on with what is missing, and the folder
    is the same byte for byte as without the kill. Memory: one shard, whatever ``num_samples``.

    Args:
        sample: ``sample(numbers)`` generates the samples of these numbers in one batch,
            [numbers, ...]: images and clips in [0, 1], sounds in [-1, 1]. What it makes of a number
            must depend on that number alone. ``PipelineSampler.batch`` is such a function.
        folder: Made if it does not exist. Files lie in ``samples`` in it, beside
            ``manifest.json``. Several machines must share it.
        num_samples: How many samples there are to be.
        batch_size: How many are generated together. The noise does not depend on it, but
            arithmetic in batches of another size can differ in the last bits, so a run keeps its
            batch size.
        layout: ``"npz"``, ``"png"``, ``"wav"``, ``"gif"`` or ``"mp4"``.
        shard_size: How many are written together, a multiple of ``batch_size``: what a kill costs
            each rank at most. By default about 64 for ``"npz"``, otherwise a batch.
        seed: For the manifest: sample i was generated with seed + i.
        inputs: For the manifest and the names of clips: prompts or class labels, used in turn.
        names: Of the inputs, for the names of files; by default samples have their number, and
            clips their prompt.
        sampling_rate: Of sounds, samples a second.
        frames_per_second: Of clips.
        settings: For the manifest: what else the samples depend on. A folder with other settings
            is refused, so name all of it: model, schedule, steps. Versions are added.
        progress: Whether rank 0 shows one progress bar for all ranks.

    Returns:
        The manifest of the complete run, in all ranks.

    Raises:
        InvalidArgumentError: If an argument has no sensible value, ranks have different ones, the
            folder holds another run, or another process is writing into it.
        DiskFullError: If there is no space; what was written before is kept.
        FileFormatError: If the manifest in the folder is damaged.

    Example:
        >>> import tempfile, torch
        >>> def sample(numbers):
        ...     generators = [torch.Generator().manual_seed(i) for i in numbers]
        ...     return torch.stack([torch.rand(3, 8, 8, generator=x) for x in generators])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = sample_many(sample, folder, 5, batch_size=2, progress=False)
        >>> [file.file for file in manifest.files]
        ['00000000-00000004.npz']
    """
    join_processes()
    chosen = layout_named(layout)
    if shard_size is None:
        shard_size = batch_size * max(1, (chosen.shard_size or 1) // max(1, batch_size))
    manifest = Manifest(
        num_samples=num_samples,
        batch_size=batch_size,
        shard_size=shard_size,
        layout=layout,
        seed=seed,
        inputs=tuple(inputs),
        names=tuple(names),
        sampling_rate=sampling_rate if layout == "wav" else None,
        frames_per_second=frames_per_second if chosen.ndim == 4 else None,
        settings={**(settings or {}), **versions()},
    )
    check_same_everywhere(manifest)
    run = SampleFolder(Path(folder), manifest)
    from_rank_zero(lambda: run.path.mkdir(parents=True, exist_ok=True))
    with _held_by_rank_zero(run.path):
        left = from_rank_zero(run.begin)
        on_all_ranks(run.check_same)
        with _bar(run, progress and bool(left)):
            on_all_ranks(lambda: _write(run, share_of(left, *rank_and_size()), sample))
        complete: Manifest = from_rank_zero(run.finish)
    return complete


def versions() -> dict[str, Setting]:
    """What is noted of the environment: other versions can give other samples."""
    return {"smoothcache": __version__, "torch": str(torch.__version__)}


def check_same_everywhere(manifest: Manifest) -> None:
    """Refuses ranks with different arguments.

    Raises:
        InvalidArgumentError: On all ranks, if two differ.
    """
    everywhere: list[Manifest] = gather_from_all(manifest)
    for rank, other in enumerate(everywhere):
        found = differences(everywhere[0], other)
        if found:
            raise InvalidArgumentError(
                f"rank 0 and rank {rank} have different arguments: {'; '.join(found)}. Begin all "
                "ranks with the same command."
            )


def _write(run: SampleFolder, shards: Sequence[Shard], sample: Sampler) -> None:
    manifest = run.manifest
    layout = layout_named(manifest.layout)
    for shard in shards:
        parts = []
        for batch in shard.batches(manifest.batch_size):
            made = sample(list(batch))
            if not isinstance(made, Tensor) or len(made) != len(batch):
                got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise InvalidArgumentError(
                    f"sample must return a tensor of {len(batch)} samples for as many numbers, "
                    f"got {got}."
                )
            check_samples(layout, made)
            parts.append(made.detach().cpu())
        samples = torch.cat(parts)
        fps = manifest.frames_per_second or FRAMES_PER_SECOND
        run.write(shard, encode(layout, samples, manifest.sampling_rate, fps))


@contextmanager
def _held_by_rank_zero(folder: Path) -> Iterator[None]:
    """While rank 0 holds the lock of the folder; if it does not get it, all ranks raise."""
    holder = locked(folder) if rank_and_size()[0] == 0 else nullcontext()
    from_rank_zero(holder.__enter__)
    try:
        yield
    finally:
        holder.__exit__(None, None, None)


@contextmanager
def _bar(run: SampleFolder, shown: bool) -> Iterator[None]:
    """A bar of all ranks in rank 0: it counts what lies in the folder, so nobody has to tell."""
    if not shown or rank_and_size()[0]:
        yield
        return
    total, ended = run.manifest.num_samples, threading.Event()
    with tqdm(total=total, desc="sampling", unit="sample", initial=run.count_done()) as bar:

        def watch() -> None:
            while not ended.wait(0.5):
                bar.update(run.count_done() - bar.n)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            bar.update(run.count_done() - bar.n)
