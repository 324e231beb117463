"""Table 1: DiT-XL/2 at 256 x 256 under DDIM, 50, 30 and 70 steps.

    torchrun --nproc-per-node 8 reproduce/table1.py --reference VIRTUAL_imagenet256_labeled.npz

No cache, FORA, the published thresholds, Learning-to-Cache, and schedules planned from trajectories
at the same cost. 50,000 images a row, 50 of each class, guidance 1.5, FID, sFID and Inception Score
by ADM's protocol. What was generated before is not generated again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
from common import PUBLISHED, Line

import smoothcache as sc
from smoothcache.diffusers_io import PipelineSampler
from smoothcache.evaluation import Candidate, EvaluationTable

GUIDANCE, CLASSES, BATCH = 1.5, 1000, 32
FILES = {
    (50, "l2c (trained)"): "50-N-2-l2c.json",
    (50, "smoothcache alpha=0.08"): "50-N-3-threshold-0.08.json",
    (50, "smoothcache alpha=0.18"): "50-N-3-threshold-0.18.json",
    (50, "fora n=2"): "50-N-2-fora.json",
    (30, "fora n=2"): "30-N-2-fora.json",
    (30, "smoothcache alpha=0.35"): "30-N-3-threshold-0.35.json",
    (70, "fora n=2"): "70-N-2-fora.json",
    (70, "smoothcache alpha=0.08"): "70-N-3-threshold-0.08.json",
}


def tiny() -> Any:
    """DiT-XL/2's kind of blocks and solver, two of them, with random weights."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=2, in_channels=4, out_channels=8,
        sample_size=4, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    solver = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.DiTPipeline(transformer.eval(), vae.eval(), solver)


def published(file: str, blocks: int) -> sc.Schedule:
    """A schedule that the authors published; of a smaller model, the rows of its blocks."""
    schedule = sc.Schedule.load(PUBLISHED / file)
    known = {
        name: row
        for name, row in schedule.rows.items()
        if "-" not in name or int(name.rpartition("-")[2]) < blocks
    }
    return replace(schedule, rows=known)


def lines_of(
    sampler: PipelineSampler, printed: list[dict[str, Any]], calibration: sc.Calibration
) -> list[Line]:
    """The rows of one number of steps, the uncached one first."""
    lines = []
    blocks = len(sampler.pipeline.transformer.transformer_blocks)
    for row in sorted(printed, key=lambda row: row["schedule"] != "no cache"):
        steps, name = row["steps"], row["schedule"]
        uncached = next(x for x in printed if x["schedule"] == "no cache")
        share = row["tmacs"] / uncached["tmacs"]
        if name == "no cache":
            schedule = None
        elif (steps, name) in FILES:
            schedule = published(FILES[steps, name], blocks)
        elif name.startswith("fora"):
            interval = int(name.rpartition("=")[2])
            schedule = sc.Schedule.uniform(sampler.pipeline, steps, interval, last=True)
        else:  # no file was published: the threshold that costs as much
            schedule = common.planned_at(calibration, share)
        lines.append(Line(Candidate(f"{steps} steps, {name}", schedule, steps), row))
        if name.startswith("smoothcache"):
            planned = sc.plan_trajectory(calibration, compute=share)
            title = f"{steps} steps, trajectory at {share:.0%} of the cost"
            lines.append(Line(Candidate(title, planned, steps)))
    return lines


def main() -> None:
    parser = common.options(__doc__ or "", full=50_000, quick=500, tiny=4)
    parser.add_argument("--reference", help="ADM's VIRTUAL_imagenet256_labeled.npz")
    parser.add_argument("--inception", metavar="FILE", help="Inception's weights, if not online")
    parser.add_argument("--steps", type=int, nargs="+", choices=(30, 50, 70), help="only these")
    args = parser.parse_args()
    if args.reference is None and not args.tiny:
        parser.error("--reference is needed: ADM's VIRTUAL_imagenet256_labeled.npz")
    common.run("table1", args, lambda folder: make(args, folder))


def make(args: Any, folder: Path) -> EvaluationTable:
    from diffusers import DDIMScheduler

    pipe = common.load(args, "facebook/DiT-XL-2-256", tiny)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    count = common.size_of(args)
    metrics, notes = ["fid", "sfid", "is"], [f"{count} images a row, guidance {GUIDANCE}."]
    settings: dict[str, Any] = {
        "reference": args.reference,
        "split_size": 5000 if count % 5000 == 0 else max(2, count // 5),
        "device": common.device_of(args),
        "weights": {"inception": args.inception} if args.inception else {},
    }
    if args.tiny:
        metrics, notes = ["is"], [common.TINY_NOTE]
        settings |= {"networks": {"inception": common.StandInNetwork()}, "split_size": count}
    elif count < 50_000:
        notes.append("FID and sFID of so few images are far too high: compare them within a table.")
    rows = []
    for steps in args.steps or (50, 30, 70):
        sampler = PipelineSampler(
            pipe, class_labels=tuple(range(CLASSES)), num_steps=steps, guidance_scale=GUIDANCE,
            seed=args.seed,
        )  # fmt: skip
        printed = [row for row in common.paper("table1") if row["steps"] == steps]
        samples = 1 if args.tiny else common.CALIBRATION_SAMPLES
        calibration = common.calibration_of(sampler, folder, samples)
        rows += common.measured(
            lines_of(sampler, printed, calibration),
            sampler,
            folder / "samples",
            count,
            metrics,
            tmacs=lambda counts: counts.weights,
            batch=BATCH,
            columns={"fid": "fid", "sfid": "sfid", "is": "is"},
            same_model=not args.tiny,
            batch_size=args.batch_size or min(BATCH, count),
            timings=0 if args.tiny else 3,
            **settings,
        )
    return common.titled("Table 1: DiT-XL/2, 256 x 256, DDIM", rows, *notes)


if __name__ == "__main__":
    main()
