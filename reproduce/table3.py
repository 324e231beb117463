"""Table 3: Stable Audio Open under DPM-Solver++(3M) SDE, 100 steps, three sets of prompts.

    torchrun --nproc-per-node 8 reproduce/table3.py \\
        --prompts audiocaps=audiocaps.json --real audiocaps=audiocaps-wav \\
        --prompts musiccaps=musiccaps.json --real musiccaps=musiccaps-wav \\
        --prompts song_describer=songs.json --real song_describer=songs-wav

Prompts are objects of names and texts, and the real sounds are files NAME.wav: AudioCaps' test set,
MusicCaps and Song Describer without singing. No schedules were published; they are planned from a
calibration at the paper's thresholds, and from trajectories at the same cost. FD-OpenL3 (content
env for AudioCaps, music for the others), KL-PaSST and the CLAP score, as stable-audio-metrics.
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

SETS = {
    "audiocaps": ("AudioCaps", "env"),
    "musiccaps": ("MusicCaps (no singing)", "music"),
    "song_describer": ("Song Describer (no singing)", "music"),
}
STEPS, GUIDANCE = 100, 7.0
TINY_PROMPTS = ("a high tone rises", "two low tones")


def tiny() -> Any:
    """The small trained Stable Audio of the demo."""
    from smoothcache.demo.audio import FOLDER
    from smoothcache.diffusers_io import load_pipeline

    return load_pipeline(FOLDER)


def main() -> None:
    parser = common.options(__doc__ or "", full=0, quick=200, tiny=1)
    parser.add_argument("--prompts", action="append", default=[], metavar="SET=FILE")
    parser.add_argument("--real", action="append", default=[], metavar="SET=DIR")
    args = parser.parse_args()
    args.prompts, args.real = (_by_set(parser, x) for x in (args.prompts, args.real))
    if not args.tiny and (not args.prompts or args.prompts.keys() != args.real.keys()):
        parser.error("--prompts and --real are needed, both of the same sets")
    common.run("table3", args, lambda folder: make(args, folder))


def _by_set(parser: Any, given: list[str]) -> dict[str, str]:
    pairs = dict(text.partition("=")[::2] for text in given)
    for name in pairs.keys() - SETS.keys():
        parser.error(f"there is no set {name!r}; there are {', '.join(SETS)}")
    return pairs


def make(args: Any, folder: Path) -> EvaluationTable:
    pipe = common.load(args, "stabilityai/stable-audio-open-1.0", tiny)
    steps = 6 if args.tiny else STEPS
    rows, calibration = [], None
    for name, (title, content) in SETS.items():
        if args.prompts and name not in args.prompts:
            continue
        prompts, names = read_prompts(args.prompts[name]) if args.prompts else (TINY_PROMPTS, ())
        sampler = PipelineSampler(
            pipe, prompts, num_steps=steps, guidance_scale=GUIDANCE, seed=args.seed
        )
        if calibration is None:  # one for all sets, as error curves hardly depend on the prompt
            samples = 2 if args.tiny else common.CALIBRATION_SAMPLES
            calibration = common.calibration_of(sampler, folder, samples)
        printed = [row for row in common.paper("table3") if row["dataset"] == title]
        lines = []
        for row in printed:
            schedule, (_, _, alpha) = None, row["schedule"].partition("alpha=")
            if alpha:
                schedule = sc.plan(calibration, alpha=float(alpha))
            line = Candidate(f"{title}, {row['schedule']}", schedule, steps)
            lines.append(Line(line, row))
            if schedule is not None:
                share = row["tmacs"] / printed[0]["tmacs"]
                planned = sc.plan_trajectory(calibration, compute=share)
                lines.append(Line(Candidate(f"{title}, trajectory at {share:.0%}", planned)))
        distance = f"fd_openl3_{content}"
        columns = {distance: "fd_openl3", "kl_passt": "kl_passt", "clap_score": "clap_score"}
        settings: dict[str, Any] = {"device": common.device_of(args)}
        metrics = list(columns)
        reference: Any = args.real.get(name)
        if args.tiny:
            metrics = ["clap_score"]
            settings["networks"] = {"clap": common.StandInClap()}
        rows += common.measured(
            lines,
            sampler,
            folder / "samples",
            common.size_of(args) or len(prompts),
            metrics,
            tmacs=lambda counts: counts.weights + counts.biases,
            batch=1,
            columns=columns,
            same_model=not args.tiny,
            reference=reference,
            names=names,
            batch_size=args.batch_size or 1,
            timings=0 if args.tiny else 3,
            **settings,
        )
    notes = [f"{steps} steps, guidance {GUIDANCE}."]
    if args.tiny:
        notes.append(common.TINY_NOTE)
    return common.titled("Table 3: Stable Audio Open", rows, *notes)


if __name__ == "__main__":
    main()
