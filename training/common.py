"""What the training scripts share: options, checkpoints, schedules, the loss log."""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training import parallel

RUNS = Path("runs")


def parser(
    description: str | None, *, steps: int, batch: int, lr: float, out: str
) -> argparse.ArgumentParser:
    """An argument parser with the options common to all scripts."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--out", type=Path, default=RUNS / out, help="folder of the run")
    options.add_argument("--steps", type=int, default=steps, help="number of optimiser steps")
    options.add_argument("--minutes", type=float, default=math.inf, help="wall-clock budget")
    options.add_argument("--batch-size", type=int, default=batch)
    options.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    options.add_argument("--warm-up", type=int, help="steps; else a tenth of all, at most 500")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--threads", type=int, default=2, help="CPU threads")
    options.add_argument("--save-every", type=float, default=60.0, help="seconds")
    return options


class Run:
    """A training run that survives interruption.

    Iterating gives the step numbers still to do, and keeps the learning rate (linear warm-up, then
    cosine decay over whichever of the two budgets, steps or minutes, is further spent) and the
    checkpoint up to date. A run started again with the same folder goes on where it stopped.

    Args:
        options: The parsed options of `parser`.
        models: What is trained or averaged, by name.
        optimizer: The optimiser of all trained weights.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        models: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.options, self.models, self.optimizer = options, models, optimizer
        self.step, self.seconds = 0, 0.0
        options.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = options.out / "checkpoint.pt"
        self.log = options.out / "loss.csv"
        if self.checkpoint.exists():
            self._load()

    def __iter__(self) -> Iterator[int]:
        started = time.monotonic() - self.seconds
        saved = time.monotonic()
        bar = tqdm(
            total=self.options.steps,
            initial=self.step,
            mininterval=5.0,
            disable=parallel.rank() > 0,
        )
        while self.progress < 1:
            self._set_lr()
            torch.manual_seed(self._seed())
            yield self.step
            self.step += 1
            self.seconds = parallel.agreed(time.monotonic() - started)
            bar.update()
            if time.monotonic() - saved > self.options.save_every:
                self.save()
                saved = time.monotonic()
        bar.close()
        self.save()

    @property
    def progress(self) -> float:
        """Fraction of the budget that is spent."""
        by_time: float = self.seconds / 60 / self.options.minutes
        by_steps: float = self.step / self.options.steps
        return max(by_steps, by_time)

    def record(self, **values: float) -> None:
        """Append a row to the loss log."""
        if parallel.rank() > 0:
            return
        row = {"step": self.step, "seconds": round(self.seconds, 1)} | values
        new = not self.log.exists()
        with self.log.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def save(self) -> None:
        """Write the checkpoint; a crash in the middle leaves the previous one intact."""
        if parallel.rank() > 0:
            return
        state = {
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        fresh = self.checkpoint.with_suffix(".tmp")
        torch.save(state, fresh)
        fresh.replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        for name, model in self.models.items():
            model.load_state_dict(state["models"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _seed(self) -> int:
        """A seed of its own for every step and process."""
        own = self.step * parallel.world_size() + parallel.rank()
        return int(self.options.seed) * 1_000_003 + own

    def _set_lr(self) -> None:
        options = self.options
        steps = min(500, options.steps // 10) if options.warm_up is None else options.warm_up
        warm = min(1.0, (self.step + 1) / max(1, steps))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * warm * max(0.01, cosine)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float = 0.998) -> None:
    """Move the averaged weights towards the current ones, faster in the first steps."""
    weight = 1 - min(decay, (step + 1) / (step + 10))
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, weight)


def forget_paths(folder: Path) -> None:
    """Drop the notes, in the configurations of a pipeline, of which folder a part came from."""
    for config in [*folder.glob("*.json"), *folder.glob("*/config.json")]:
        content = json.loads(config.read_text())
        content.pop("_name_or_path", None)
        config.write_text(json.dumps(content, indent=2) + "\n")


def move_files(source: Path, target: Path) -> None:
    """Move all files below `source` to the same places below `target`; others there stay."""
    for path in [path for path in source.rglob("*") if path.is_file()]:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    shutil.rmtree(source)


def random_rows(pool: Tensor, batch_size: int) -> Tensor:
    """Indices of a random batch, drawn on the CPU so that every device sees the same ones."""
    return torch.randint(len(pool), (batch_size,))
