"""Table 2: text to video under rectified flow, 30 steps, VBench's total score.

    torchrun --nproc-per-node 8 reproduce/table2.py --prompts vbench.json \\
        --vbench "/envs/vbench/bin/vbench evaluate"

The paper's model, Open-Sora v1.2, is no pipeline of diffusers: `examples/open_sora.py` shows how it
is calibrated and cached in its own code. Here a pipeline of diffusers takes its place, by default
Wan 2.1 (or --model maxin-cn/Latte-1). Schedules are planned at the shares of the cost that the
paper's had, so what compares is how much of the uncached score each keeps. VBench runs in an
environment of its own; prompts are VBench's, five videos of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
from common import Line

import smoothcache as sc
from smoothcache.diffusers_io import PipelineSampler
from smoothcache.evaluation import Candidate, EvaluationTable
from smoothcache.generation import read_prompts

STEPS, VIDEOS_A_PROMPT = 30, 5
TINY_PROMPTS = ("a red circle moves to the left", "a small blue square rests")


def tiny() -> Any:
    """The trained text-to-video pipeline of the demo."""
    from smoothcache.demo.video import FOLDER
    from smoothcache.diffusers_io import load_pipeline

    return load_pipeline(FOLDER)


def main() -> None:
    parser = common.options(__doc__ or "", full=946 * VIDEOS_A_PROMPT, quick=200, tiny=2)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="VBench's prompts")
    parser.add_argument("--vbench", metavar="COMMAND", help="runs VBench in its own environment")
    parser.add_argument("--layout", choices=("mp4", "gif"), help="of the videos (mp4)")
    args = parser.parse_args()
    if not args.tiny and (args.prompts is None or args.vbench is None):
        parser.error("--prompts and --vbench are needed")
    common.run("table2", args, lambda folder: make(args, folder))


def make(args: Any, folder: Path) -> EvaluationTable:
    pipe = common.load(args, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", tiny)
    prompts, names = read_prompts(args.prompts) if args.prompts else (TINY_PROMPTS, ())
    steps = 6 if args.tiny else STEPS
    sampler = PipelineSampler(pipe, prompts, num_steps=steps, seed=args.seed)
    printed = common.paper("table2")
    samples = 2 if args.tiny else common.CALIBRATION_SAMPLES
    calibration = common.calibration_of(sampler, folder, samples)
    lines = []
    for row in printed:
        share = row["tmacs"] / printed[0]["tmacs"]
        if row["schedule"] == "no cache":
            lines.append(Line(Candidate(row["schedule"], None, steps), row))
            continue
        schedule = common.planned_at(calibration, share)
        lines.append(Line(Candidate(f"{row['schedule']}, its cost", schedule), row))
        planned = sc.plan_trajectory(calibration, compute=share)
        lines.append(Line(Candidate(f"trajectory at {share:.0%} of the cost", planned)))
    rows = common.measured(
        lines,
        sampler,
        folder / "samples",
        common.size_of(args),
        ["vbench"] if args.vbench else [],
        tmacs=lambda counts: counts.weights,
        batch=1,
        columns={"vbench": "vbench"},
        same_model=False,
        layout=args.layout or ("gif" if args.tiny else "mp4"),
        names=names,
        batch_size=args.batch_size or 1,
        timings=0 if args.tiny else 3,
        vbench_command=args.vbench.split() if args.vbench else (),
    )
    notes = [
        f"Ours: {type(pipe).__name__}, {steps} steps. Printed: Open-Sora v1.2, whose TMACs contain "
        "the decoding of the VAE. Compare the differences between rows, not the values."
    ]
    if args.tiny:
        notes.append(common.TINY_NOTE)
    return common.titled("Table 2: text to video, rectified flow", rows, *notes)


if __name__ == "__main__":
    main()
