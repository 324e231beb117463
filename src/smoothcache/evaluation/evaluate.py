"""Measures samples in a folder, over ranks: features apart, statistics together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checks import check_count
from ..errors import InvalidArgumentError
from ..generation.manifest import SAMPLES
from ..metrics.external import vbench, vbench_total
from ..metrics.result import MetricResult
from ..processes import (
    from_rank_zero,
    gather_from_all,
    gather_to_zero,
    join_processes,
    on_all_ranks,
    rank_and_size,
)
from .collected import Collector
from .measure import Protocol, collector, take_all
from .networks import Networks
from .reference import Reference
from .registry import Metric, metrics_named
from .results import result_of
from .source import Source, open_source


def evaluate(
    folder: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    metrics: Sequence[str] = ("fid", "sfid", "is"),
    *,
    networks: Mapping[str, Any] | None = None,
    weights: Mapping[str, str] | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    num_groups: int = 10,
    split_size: int = 5000,
    subset_size: int = 1000,
    vbench_command: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, MetricResult]:
    """Measures samples; run by several ranks, each makes the features of a share.

    Samples are taken in the same batches whatever the number of ranks, so every feature is the
    same to the last bit. Statistics are then added up in another order: they agree to 1e-12 of
    their size, and what is measured to about 1e-9. Memory: for FID and its like one set of
    statistics a rank, whatever the number of samples; precision, recall, KID and CMMD keep the
    features of all samples in rank 0, 410 MB for 50,000 of 2048.

    Args:
        folder: That ``sample_many`` wrote; or pictures, arrays or sounds.
        reference: Statistics such as ADM's ``VIRTUAL_imagenet256_labeled.npz``, a folder of real
            samples, or of those of the uncached model.
        metrics: Names in ``METRICS``, of this kind of samples.
        networks: Networks that are used as they are, by their name in ``LOADERS``.
        weights: Files or folders of weights, by the same names; others are downloaded once.
        device: Where networks run.
        batch_size: How many images a network sees at once.
        num_groups: For the spread of Frechet distances; 1 for none, which saves time.
        split_size: Of the Inception Score.
        subset_size: Of KID.
        vbench_command: What runs VBench in an environment of its own, see ``vbench``.
        progress: Whether rank 0 shows a progress bar of its share.

    Returns:
        Metric -> result, in all ranks.

    Raises:
        InvalidArgumentError: If a metric is unknown, needs another reference, or more samples; or
            ranks were given different arguments.
        FileFormatError: If a file is damaged, or a folder not complete.
        MissingWeightsError: If a network's weights are not there and cannot be downloaded; it says
            what to download and where to put it.

    Example:
        Mean colours take the place of Inception's features, whose weights are published.

        >>> import tempfile, torch
        >>> from smoothcache.generation import sample_many
        >>> class Colours:
        ...     name, digest, sizes = "mean colour", "", {"pool": 3}
        ...
        ...     def __call__(self, images):
        ...         return {"pool": images.float().mean(dim=(2, 3))}
        >>> def sample(numbers):
        ...     return torch.stack([torch.full((3, 8, 8), i / 16) for i in numbers])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = sample_many(sample, f"{folder}/a", 8, progress=False)
        ...     results = evaluate(
        ...         f"{folder}/a", f"{folder}/a", ["precision"], networks={"inception": Colours()},
        ...         progress=False,
        ...     )
        >>> print(results["precision"])
        precision 1 ± 0 (n = 8)
    """
    join_processes()
    check_count("batch_size", batch_size, least=1)
    source = on_all_ranks(lambda: open_source(folder, batch_size))
    chosen = metrics_named(list(metrics), source.kind)
    asked = (sorted(x.name for x in chosen), batch_size, num_groups, split_size, source.count)
    if any(other != asked for other in gather_from_all(asked)):
        raise InvalidArgumentError(
            "the ranks have different arguments; begin all of them with the same command."
        )
    protocol = Protocol(num_groups, split_size, subset_size)
    _check_samples(chosen, source, protocol)
    if any(x.name == "vbench" for x in chosen):
        return from_rank_zero(lambda: _vbench(source, folder, vbench_command))
    against = on_all_ranks(lambda: Reference(reference, chosen, batch_size))
    loaded = Networks(networks or {}, weights or {}, device)
    on_all_ranks(lambda: _check(against, chosen, loaded, protocol))
    ours = _together(source, chosen, loaded, against.source, protocol, progress)
    theirs: dict[str, Collector] = {}
    if against.source is not None and against.to_measure:
        theirs = _together(against.source, against.to_measure, loaded, None, protocol, progress)
    return from_rank_zero(lambda: _results(chosen, ours, theirs, against, loaded, protocol))


def _results(
    metrics: Sequence[Metric],
    ours: Mapping[str, Collector],
    theirs: Mapping[str, Collector],
    against: Reference,
    networks: Networks,
    protocol: Protocol,
) -> dict[str, MetricResult]:
    results = {}
    for metric in metrics:
        other = against.gaussians.get(metric.name) or theirs.get(metric.key)
        network = networks[metric.network] if metric.network else None
        results[metric.name] = result_of(
            metric, ours[metric.key], other, network, subset_size=protocol.subset_size
        )
    return results


def _check(
    against: Reference, metrics: Sequence[Metric], networks: Networks, protocol: Protocol
) -> None:
    """Loads the networks, and compares them with the reference, before anything is measured."""
    for metric in metrics:
        if metric.network:
            _ = networks[metric.network]
    made = {
        x.name: collector(x, networks, protocol) for x in metrics if x.name in against.gaussians
    }
    against.check({name: x for name, x in made.items() if x is not None})


def _together(
    source: Source,
    metrics: Sequence[Metric],
    networks: Networks,
    reference: Source | None,
    protocol: Protocol,
    progress: bool,
) -> dict[str, Collector]:
    """What all ranks collected, in rank 0; elsewhere what this one did."""
    rank, size = rank_and_size()
    total = None if source.count is None else -(-source.count // size)
    hidden = not progress or rank > 0
    with tqdm(total=total, desc="measuring", unit="sample", disable=hidden) as bar:
        mine = on_all_ranks(
            lambda: take_all(
                source, metrics, networks, reference, (rank, size), protocol, bar.update
            )
        )
    for first in mine.values():
        for other in gather_to_zero(first)[1:]:
            first.merge(other)
    return mine


def _check_samples(metrics: Sequence[Metric], source: Source, protocol: Protocol) -> None:
    """Refuses too few samples, or none with prompts, before anything is measured."""
    if any(metric.against == "prompts" for metric in metrics):
        source.prompts(torch.tensor([0]))
    split_size, subset_size = protocol.split_size, protocol.subset_size
    if source.count is None:
        return
    for metric in metrics:
        if metric.name == "is" and source.count % split_size:
            raise InvalidArgumentError(
                f"the Inception Score takes full splits of {split_size} samples, and "
                f"'{source.path}' has {source.count}. Take a multiple of it, or another split size."
            )
        if metric.name == "kid" and source.count < subset_size:
            raise InvalidArgumentError(
                f"kid takes subsets of {subset_size}, and '{source.path}' has {source.count} "
                "samples. Take more, or a smaller subset size."
            )


def _vbench(
    source: Source, folder: str | os.PathLike[str], command: Sequence[str]
) -> dict[str, MetricResult]:
    if not command:
        raise InvalidArgumentError(
            "vbench runs in an environment of its own: name the program that runs it there, for "
            "example /envs/vbench/bin/vbench evaluate."
        )
    videos, output = Path(folder) / SAMPLES, Path(folder) / "vbench"
    results = vbench(videos, command=command, output=output)
    return {"vbench": vbench_total(results), **results}
