"""What the model cards are made of: loss curves, lengths of runs, sizes."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib
from torch import nn

matplotlib.use("agg")
import matplotlib.pyplot as plt


def read_log(path: Path) -> dict[str, list[float]]:
    """The columns of a run's loss log."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average."""
    average, result = values[0], []
    for value in values:
        average = weight * average + (1 - weight) * value
        result.append(average)
    return result


def draw_losses(log: dict[str, list[float]], path: Path, what: str) -> None:
    """The training loss over steps, raw and smoothed; `what` names the loss."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(log["step"], log["loss"], alpha=0.3, label="mean of 20 steps")
    axes.plot(log["step"], smoothed(log["loss"]), label="moving average")
    axes.set(xlabel="step", ylabel=what, yscale="log")
    axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def length(log: dict[str, list[float]]) -> str:
    """How long a run took."""
    return f"{log['step'][-1]:,.0f} steps, {log['seconds'][-1] / 60:.0f} minutes"


def millions(module: nn.Module) -> float:
    """Number of parameters, in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def megabytes(folder: Path) -> float:
    """Size of everything in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
