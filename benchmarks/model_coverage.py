"""How much of each transformer of diffusers a fully reused step skips.

    python benchmarks/model_coverage.py [NAME ...] [--write]

For every architecture of the zoo, built tiny: the MACs that a reused step saves, over the MACs of
one call inside the repeated blocks. ``--write`` puts the table into docs/models.md.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from zoo import TinyModel, all_models, noise

import smoothcache as sc
from smoothcache.model.costs import MacCounter

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- written by benchmarks/model_coverage.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Coverage:
    """What was measured on one model.

    Attributes:
        kinds: How many layers of each kind were found.
        skipped: MACs that a fully reused call saves, over those inside the repeated blocks.
        inside: MACs inside the repeated blocks, over those of the whole call.
        never_ran: Layers that were found and did not run.
    """

    kinds: dict[str, int]
    skipped: float
    inside: float
    never_ran: int


def build(tiny: TinyModel) -> nn.Module:
    """The model with the random weights that all measurements share."""
    torch.manual_seed(0)
    return tiny.build().eval().requires_grad_(False)


def measure(tiny: TinyModel, *granularities: str) -> list[Coverage]:
    """Runs a model once in full and, for each granularity, once under reuse, and counts."""
    model = build(tiny)
    total, inside = _counted(tiny, model)
    return [_covered(tiny, model, granularity, total, inside) for granularity in granularities]


def _counted(tiny: TinyModel, model: nn.Module) -> tuple[int, int]:
    """MACs of one call, and of those the ones inside the repeated blocks."""
    x, t = noise(1, *tiny.shape), torch.full((1,), 900.0)
    inside = Counter[str]()
    with MacCounter() as counter:
        hooks = [
            hook
            for path in (*tiny.blocks,)
            for name, block in _elements(model.get_submodule(path))
            for hook in _watched(block, f"{path}.{name}", counter, inside)
        ]
        tiny.call(model, x, t)
    for hook in hooks:
        hook.remove()
    return counter.total, sum(inside.values())


def _covered(
    tiny: TinyModel, model: nn.Module, granularity: str, total: int, inside: int
) -> Coverage:
    x, t = noise(1, *tiny.shape), torch.full((1,), 900.0)
    layers = tuple(sc.find_layers(model, granularity=granularity))
    schedule = sc.Schedule(3, {layer.path: sc.Row((True, False, True)) for layer in layers}, layers)
    with sc.cached(model, schedule) as run:
        tiny.call(model, x, t)
        with MacCounter() as reused:
            tiny.call(model, x, t - 100)
        tiny.call(model, x, t - 200)
    return Coverage(
        kinds=dict(Counter(layer.kind for layer in layers)),
        skipped=(total - reused.total) / inside,
        inside=inside / total,
        never_ran=len(run.summary().never_ran),
    )


def _elements(blocks: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a list; those of an element that is a list itself are taken one by one."""
    elements = []
    for name, block in blocks.named_children():
        if isinstance(block, nn.ModuleList | nn.ModuleDict):
            elements += [(f"{name}.{inner}", module) for inner, module in _elements(block)]
        else:
            elements.append((name, block))
    return elements


def _watched(
    block: nn.Module, name: str, counter: MacCounter, inside: Counter[str]
) -> list[object]:
    before: list[int] = []

    def begin(*_: object) -> None:
        before.append(counter.total)

    def end(*_: object) -> None:
        inside[name] += counter.total - before.pop()

    return [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]


def table(found: dict[str, Coverage]) -> list[str]:
    """The rows of a Markdown table."""
    lines = ["| model | layers | blocks | skipped |", "|---|---|---|---|"]
    for name, x in found.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in x.kinds.items())
        lines.append(f"| {name} | {kinds} | {x.inside:.1%} | {x.skipped:.1%} |")
    return lines


def oddities() -> list[str]:
    """What is unusual about each model, as a Markdown list."""
    notes = {name: tiny.note for name, tiny in all_models().items() if tiny.note}
    return [
        f"- **{name}**: {note[0].upper()}{note[1:].rstrip('.')}." for name, note in notes.items()
    ]


def write(lines: list[str]) -> None:
    """Puts lines between the markers of the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n".join(["", *lines, ""]) + END + after, encoding="utf-8")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    arguments.add_argument("names", nargs="*", help="classes or layouts; all of them if none")
    arguments.add_argument("--granularity", default="auto", help="auto, layer, block or model")
    arguments.add_argument("--write", action="store_true", help="put the table into the docs")
    chosen = arguments.parse_args()
    warnings.simplefilter("ignore")  # what the models say of themselves
    found = {}
    with torch.no_grad():
        for name, tiny in all_models().items():
            if not chosen.names or name in chosen.names:
                (found[name],) = measure(tiny, chosen.granularity)
                print(table({name: found[name]})[-1], flush=True)
    print(f"least skipped: {min(x.skipped for x in found.values()):.3f} of {len(found)} models")
    if chosen.write:
        write([*table(found), "", "### What is unusual about them", "", *oddities()])


if __name__ == "__main__":
    main()
