"""What the tables have in common: options, costs as the paper counts them, printed beside ours."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smoothcache as sc
from smoothcache.diffusers_io import PipelineSampler
from smoothcache.evaluation import Candidate, EvaluationRow, EvaluationTable, evaluate_schedules
from smoothcache.model.costs import MacCounter
from smoothcache.model.denoisers import find_denoisers
from smoothcache.processes import from_rank_zero, join_processes, leave_processes, rank_and_size
from smoothcache.report import environment, table_page, write_page

FOLDER = Path(__file__).parent
PUBLISHED = FOLDER.parent / "tests" / "data" / "published_schedules"
CALIBRATION_SAMPLES, CALIBRATION_SEED = 10, 10**6  # as the paper; none of the samples' seeds


def paper(table: str) -> list[dict[str, Any]]:
    """The rows of a table of the paper, see `paper.json` for their source."""
    rows: list[dict[str, Any]] = json.loads((FOLDER / "paper.json").read_text())[table]
    return rows


# -------------------------------------------------------------------------------------- options


def options(description: str, *, full: int, quick: int, tiny: int) -> argparse.ArgumentParser:
    """The options of all tables; `size_of` reads how many samples are meant."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"{quick} samples instead of {full}")
    size.add_argument(
        "--tiny", action="store_true", help="a small pipeline and few samples, to try the script"
    )
    parser.add_argument("--num-samples", type=int, help="another number of samples")
    parser.add_argument("-o", "--output", type=Path, help="folder (out/reproduce-TABLE)")
    parser.add_argument("--model", help="folder or hub id of the pipeline")
    parser.add_argument("--batch-size", type=int, help="samples in one batch")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--device", help="for example cuda:0; by default one for each rank")
    parser.set_defaults(sizes={"full": full, "quick": quick, "tiny": tiny})
    return parser


def size_of(args: argparse.Namespace) -> int:
    name = "tiny" if args.tiny else "quick" if args.quick else "full"
    return int(args.num_samples or args.sizes[name])


def device_of(args: argparse.Namespace) -> str:
    from smoothcache.cli.inputs import own_device

    return args.device or own_device() or "cpu"


def load(args: argparse.Namespace, default: str, tiny: Callable[[], Any]) -> Any:
    """The pipeline: the user's, the published one in half precision, or a small one."""
    from smoothcache.diffusers_io import load_pipeline, silence_libraries

    silence_libraries()
    device = device_of(args)
    half = torch.float16 if device != "cpu" else torch.float32
    if args.tiny and args.model is None:
        pipe = tiny()
    else:
        dtype = torch.float32 if args.tiny else half
        pipe = load_pipeline(args.model or default, dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------ schedules


def calibration_of(sampler: PipelineSampler, folder: Path, samples: int) -> sc.Calibration:
    """Measured on other seeds than the samples', over ranks; kept in the folder."""
    file = folder / f"calibration-{sampler.steps}.safetensors"
    if not from_rank_zero(file.is_file):
        own = replace(sampler, seed=sampler.seed + CALIBRATION_SEED)
        shown = sys.stderr.isatty()
        measured = sc.calibrate(sampler.pipeline, own, samples, over_ranks=True, progress=shown)
        from_rank_zero(lambda: measured.save(file))
    return sc.Calibration.load(file)


def planned_at(calibration: sc.Calibration, compute: float) -> sc.Schedule:
    """The threshold schedule of the paper whose cost is nearest to a fraction of the MACs."""
    low, high = 0.0, 2.0
    best = sc.plan(calibration, alpha=high)
    for _ in range(20):
        alpha = (low + high) / 2
        schedule = sc.plan(calibration, alpha=alpha)
        if abs(cost(schedule) - compute) < abs(cost(best) - compute):
            best = schedule
        low, high = (alpha, high) if cost(schedule) > compute else (low, alpha)
    return best


def cost(schedule: sc.Schedule) -> float:
    return 1.0 if schedule.compute is None else schedule.compute


# ---------------------------------------------------------------------------------------- costs


@dataclass
class Counts:
    """Multiply-accumulates of the denoisers in one generation of a batch, and its biases."""

    weights: int = 0
    attention: int = 0
    biases: int = 0


def count(sampler: PipelineSampler, candidate: Candidate) -> Counts:
    """What one sample costs, by parts: the paper's tables count different ones."""
    counts, counter = Counts(), MacCounter()

    def before(*_: Any) -> None:
        counter.__enter__()

    def after(*_: Any) -> None:
        counter.__exit__(None, None, None)
        for name in vars(counts):
            setattr(counts, name, getattr(counts, name) + getattr(counter, name))

    schedule = candidate.schedule
    handles = []
    with sc.cached(sampler.pipeline, schedule) if schedule else nullcontext():
        for denoiser in find_denoisers(sampler.pipeline).values():
            handles.append(denoiser.register_forward_pre_hook(before))
            handles.append(denoiser.register_forward_hook(after))
        try:
            sampler.batch([0])
        finally:
            for handle in handles:
                handle.remove()
    return counts


# --------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Line:
    """A row of ours, and the one of the paper that it stands beside; None if there is none."""

    candidate: Candidate
    printed: Mapping[str, Any] | None = None


def measured(
    lines: Sequence[Line],
    sampler: PipelineSampler,
    folder: Path,
    num_samples: int,
    metrics: Sequence[str],
    *,
    tmacs: Callable[[Counts], float],
    batch: int,
    columns: Mapping[str, str],
    same_model: bool,
    **settings: Any,
) -> list[EvaluationRow]:
    """Rows of ours, with what the paper printed and the difference beside them.

    Args:
        lines: The rows; the first one is the uncached run.
        sampler: The pipeline with its inputs.
        folder: For the samples.
        num_samples: Of each row.
        metrics: As of `evaluate`.
        tmacs: What the paper's table counts of one sample's multiply-accumulates.
        batch: How many samples the authors ran at once.
        columns: Metric of ours -> column of the paper.
        same_model: Whether it is the paper's model, so that values compare.
        settings: Passed on to `evaluate_schedules`.
    """
    table = evaluate_schedules(
        sampler,
        [line.candidate for line in lines],
        folder,
        num_samples,
        metrics,
        progress=sys.stderr.isatty(),
        **settings,
    )
    rows = []
    for line, row in zip(lines, table.rows, strict=True):
        own = replace(sampler, num_steps=row.steps)
        counted = tmacs(from_rank_zero(lambda own=own, line=line: count(own, line.candidate)))
        new = beside(row, line.printed, counted * batch / 1e12, batch, columns, same_model)
        if line.printed is not None and lines[0].printed is not None:
            share = line.printed["tmacs"] / lines[0].printed["tmacs"]
            new = replace(new, extras={"printed compute": f"{share:.1%}", **new.extras})
        rows.append(new)
    return rows


def beside(
    row: EvaluationRow,
    printed: Mapping[str, Any] | None,
    tmacs: float,
    batch: int,
    columns: Mapping[str, str],
    same_model: bool,
) -> EvaluationRow:
    """A row with the printed values and differences as further columns."""
    extras = {f"TMACs of {batch}": f"{tmacs:.5g}"}
    if printed is not None:
        extras["printed TMACs"] = f"{printed['tmacs']:g}"
    if printed is not None and same_model:
        extras["difference of TMACs"] = f"{tmacs / printed['tmacs'] - 1:+.1%}"
    if row.seconds is not None:
        extras[f"seconds of {batch}"] = f"{row.seconds * batch:.3g}"
    if printed is not None:
        extras["printed seconds"] = f"{printed['latency_s']:g}"
        for metric, column in columns.items():
            value, spread = printed[column]
            extras[f"printed {metric}"] = f"{value:g} ± {spread:g}"
            if metric in row.results and same_model:
                extras[f"difference of {metric}"] = f"{row.results[metric].value - value:+.3g}"
    return replace(row, extras=extras, seconds=None, tmacs=None)


def run(name: str, args: argparse.Namespace, make: Callable[[Path], EvaluationTable]) -> None:
    """Makes a table in all ranks; rank 0 prints it and writes it as JSON, Markdown and HTML."""
    folder = args.output or Path("out", f"reproduce-{name}")
    join_processes()
    try:
        from_rank_zero(lambda: folder.mkdir(parents=True, exist_ok=True))
        with torch.no_grad():
            table = make(folder)
        if rank_and_size()[0] == 0:
            files = [folder / f"{name}{ending}" for ending in (".json", ".md", ".html")]
            table.save(*files[:2])
            page = table_page(table, title=table.title, environment=environment())
            write_page(replace(page, subtitle=""), files[2])
            print(table)
            print(f"written to {', '.join(map(str, files))}")
    except sc.SmoothCacheError as error:
        sys.exit(f"error: {error}")
    finally:
        leave_processes()


def titled(title: str, rows: Sequence[EvaluationRow], *notes: str) -> EvaluationTable:
    source = "Printed: Liu et al., arXiv 2411.10510; seconds there are of the authors' GPU."
    return EvaluationTable(tuple(rows), title, (*notes, source))


TINY_NOTE = "Made with --tiny: random features and a small pipeline, so no value says anything."


class StandInNetwork:
    """Random features of pictures, for --tiny: no metric that is measured with it has a meaning."""

    name, digest = "stand-in network with random weights", None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sizes = {"pool": 8, "logits": 6}
        self._weights = {
            name: torch.randn(3 * 64, size, generator=generator) / math.sqrt(3 * 64)
            for name, size in self.sizes.items()
        }

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        small = torch.nn.functional.interpolate(images.float() / 127.5 - 1, (8, 8), mode="area")
        return {name: small.flatten(1) @ weights for name, weights in self._weights.items()}


class StandInClap:
    """Takes the place of CLAP, for --tiny."""

    name, digest = "stand-in for CLAP", None

    def sound(self, waveform: Tensor, sampling_rate: int) -> Tensor:
        return torch.nn.functional.normalize(waveform.mean(dim=0)[:64], dim=0)

    def texts(self, texts: Sequence[str]) -> Tensor:
        seeds = [torch.Generator().manual_seed(len(text)) for text in texts]
        made = torch.stack([torch.randn(64, generator=seed) for seed in seeds])
        return torch.nn.functional.normalize(made, dim=1)


class StandInLabels:
    """Takes the place of PaSST, for --tiny."""

    name, digest = "stand-in for PaSST", None

    def __call__(self, waveform: Tensor, sampling_rate: int) -> Tensor:
        parts = waveform.mean(dim=0).unfold(0, len(waveform[0]) // 8, len(waveform[0]) // 8)
        return parts[:8].square().mean(dim=1).add(1e-4).log()
