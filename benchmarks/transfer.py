"""How far fitted weights carry over to settings that they were not fitted to.

    python benchmarks/transfer.py --write

A trajectory plan is fitted on the demo's pipeline of images: guidance 3, float32, one image of each
class at a time. It then runs under other guidance scales, batches of one image, half precision, and
on classes that it was not fitted to. Every row is the PSNR against the uncached images of the same
setting, beside layers extrapolated at even spacing, which are fitted to nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compare_methods import environment
from torch import Tensor

import smoothcache as sc
from smoothcache.demo.image import CALIBRATION_SEEDS, FOLDER, GUIDANCE, NUM_CLASSES
from smoothcache.diffusers_io import load_pipeline, silence_libraries
from smoothcache.metrics.fidelity import psnr

RESULTS = Path(__file__).parent / "results" / "transfer.json"
CLASSES = list(range(NUM_CLASSES))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    silence_libraries()
    pipeline = _pipeline(torch.float32)
    seen = {"all classes": CLASSES, "classes 0 to 4": CLASSES[:5]}
    schedules = {
        f"fitted to {name}": _fitted(pipeline, labels, options) for name, labels in seen.items()
    }
    interval = round(options.steps / options.computed)
    schedules[f"layers, every {interval}, taylor2"] = sc.Schedule.uniform(
        pipeline, options.steps, interval, predictor="taylor2"
    )
    settings: dict[str, dict[str, Any]] = {
        "as fitted": {},
        **{f"guidance {scale:g}": {"guidance": scale} for scale in (1.5, 2.0, 4.0, 6.0, 9.0)},
        "one image at a time": {"labels": [[label] for label in CLASSES]},
        "classes 5 to 9": {"labels": [CLASSES[5:]]},
        "bfloat16": {"dtype": torch.bfloat16},
        "float16": {"dtype": torch.float16},
    }
    rows = []
    for name, setting in settings.items():
        pipe = _pipeline(setting["dtype"]) if "dtype" in setting else pipeline
        given = {key: value for key, value in setting.items() if key != "dtype"}
        references = _images(pipe, options, **given)
        for schedule_name, schedule in schedules.items():
            with sc.cached(pipe, schedule):
                images = _images(pipe, options, **given)
            every = torch.cat([psnr(a, b) for a, b in zip(images, references, strict=True)])
            row = {
                "setting": name,
                "schedule": schedule_name,
                "psnr": round(float(every.mean()), 2),
                "margin": round(1.96 * float(every.std()) / len(every) ** 0.5, 2),
            }
            rows.append(row)
            print(f"{name:22} {schedule_name:26} {row['psnr']:6.2f} ± {row['margin']:.2f} dB")
    if options.write:
        document = {
            "steps": options.steps,
            "computed": options.computed,
            "rows": rows,
            "environment": environment(),
        }
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _pipeline(dtype: torch.dtype) -> Any:
    pipeline = load_pipeline(FOLDER, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _fitted(pipeline: Any, labels: list[int], options: argparse.Namespace) -> sc.Schedule:
    def sample(i: int) -> Tensor:
        return _generate(pipeline, labels, CALIBRATION_SEEDS + i, options.steps, GUIDANCE)

    calibration = sc.calibrate(
        pipeline, sample, options.calibration, max_gap=1, granularity="model", progress=False
    )
    plan = sc.plan_trajectory(calibration, steps_computed=options.computed)
    return sc.fit(pipeline, sample, plan, calibration, progress=False)


def _images(
    pipe: Any,
    options: argparse.Namespace,
    guidance: float = GUIDANCE,
    labels: Sequence[list[int]] = (CLASSES,),
) -> list[Tensor]:
    return [
        _generate(pipe, batch, seed, options.steps, guidance)
        for seed in range(options.generations)
        for batch in labels
    ]


def _generate(pipe: Any, labels: list[int], seed: int, steps: int, guidance: float) -> Tensor:
    images: Tensor = pipe(
        labels,
        guidance_scale=guidance,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
    ).images
    return images.float()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--computed", type=int, default=18, help="steps that are computed")
    parser.add_argument("--calibration", type=int, default=5, help="samples of the fit")
    parser.add_argument("--generations", type=int, default=3, help="to compare, of ten images")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
