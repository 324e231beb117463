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

import torch
from torch import nn
from zoo import TinyModel, all_models, noise

import smoothcache as sc
from smoothcache.costs import MacCounter


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


def measure(tiny: TinyModel, granularity: str = "auto") -> Coverage:
    """Runs a model once in full and once under reuse, and counts."""
    model = build(tiny)
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
    layers = tuple(sc.find_layers(model, granularity=granularity))
    schedule = sc.Schedule(2, {layer.path: sc.Row((True, False)) for layer in layers}, layers)
    with sc.cached(model, schedule) as run:
        tiny.call(model, x, t)
        with MacCounter() as reused:
            tiny.call(model, x, t - 100)
    return Coverage(
        kinds=dict(Counter(layer.kind for layer in layers)),
        skipped=(counter.total - reused.total) / sum(inside.values()),
        inside=sum(inside.values()) / counter.total,
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


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("names", nargs="*")
    arguments.add_argument("--granularity", default="auto")
    chosen = arguments.parse_args()
    for name, tiny in all_models().items():
        if chosen.names and name not in chosen.names:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = measure(tiny, chosen.granularity)
            ratios = f"{found.skipped:6.3f} {found.inside:6.3f} {found.never_ran}"
            print(f"{name:42} {ratios} {found.kinds}", flush=True)
        except Exception as error:
            print(f"{name:42} {type(error).__name__}: {str(error)[:150]}", flush=True)


if __name__ == "__main__":
    main()
