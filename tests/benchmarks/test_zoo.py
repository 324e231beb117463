"""Every transformer of diffusers, and layouts of other codebases, tiny and with random weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from model_coverage import build, measure
from support import toys
from support.reference import levels
from support.toys import ADDING_TOYS, TOYS
from torch import Tensor, nn
from zoo import TinyModel, all_models, noise

import smoothcache as sc
from smoothcache.model.costs import MacCounter

ZOO = all_models()
every_model = pytest.mark.parametrize("name", ZOO)
every_granularity = pytest.mark.parametrize("granularity", ["auto", "block", "model"])


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Unchanging(nn.Module):
    """The model as it is at one timestep, whatever timestep it is given."""

    def __init__(self, tiny: TinyModel) -> None:
        super().__init__()
        self.model = build(tiny)
        self.call = tiny.call

    def forward(self, hidden_states: Tensor, timestep: float) -> Tensor:
        t = torch.full((len(hidden_states),), 500.0)
        return self.call(self.model, hidden_states, t)


def test_the_zoo_has_every_transformer_of_diffusers() -> None:
    assert {name for name in dir(diffusers) if "Transformer" in name} - set(ZOO) == set()


@every_model
@every_granularity
def test_a_reused_step_skips_the_repeated_blocks(name: str, granularity: Any) -> None:
    found = measure(ZOO[name], granularity)
    assert found.skipped >= 0.95
    assert found.never_ran == 0 or name == "SanaWMLTX2RefinerTransformer3DModel"  # has no sound


@every_model
def test_the_same_call_repeated_gives_the_same_output_under_any_schedule(name: str) -> None:
    tiny = ZOO[name]
    x, times = noise(2, *tiny.shape), [900.0, 700.0, 500.0, 300.0, 100.0]
    model = Unchanging(tiny)
    plain = model(x, 1.0)
    for granularity in ("auto", "model"):
        layers = sc.find_layers(model, granularity=granularity)  # type: ignore[arg-type]
        exact = not any(layer.kind.endswith("block") for layer in layers)
        for interval, predictor in ((1, "hold"), (2, "hold"), (5, "hold"), (2, "taylor2")):
            schedule = sc.Schedule.uniform(
                model,
                len(times),
                interval,
                predictor=predictor,
                layers=layers,
                noise_levels=levels(len(times)),
            )
            with sc.cached(model, schedule) as run:
                outputs = [model(x, t) for t in times]
            assert run.summary().recomputed == {}
            assert bool(run.summary().reused) == (interval > 1)
            for output in outputs:
                if exact or interval == 1:
                    assert torch.equal(output, plain)
                else:  # the residual of a block is rounded
                    torch.testing.assert_close(output, plain, rtol=1e-3, atol=1e-4)


def reuses_one_late_layer(model: nn.Module, call: Callable[[float], Tensor]) -> None:
    """Reuses one layer, and sees that what lies before it still matters to the output."""
    layers = sc.observe_layers(model, lambda i: call(900.0))
    layers = [layer for layer in layers if not layer.kind.startswith("refiner_")]
    late, early = layers[-1], model.get_submodule(layers[0].path)
    results, macs = [], []
    for change in (1.0, 1.5):
        for reuse in (False, True):
            row = sc.Row((True, not reuse, True))
            schedule = sc.Schedule(3, {late.path: row}, (late,))
            with sc.cached(model, schedule) as run, altered(early) as factor:
                call(900.0)
                factor(change)
                with MacCounter() as counter:
                    results.append(call(800.0))
                factor(1.0)
                call(700.0)
            assert bool(run.summary().reused) == reuse
            assert run.summary().recomputed == {}
            macs.append(counter.total)
    full, reused, altered_full, altered_reused = results
    assert macs[0] - macs[1] == macs[2] - macs[3] == late.macs
    assert (altered_reused - reused).norm() > 0.5 * (altered_full - full).norm() > 0


@contextmanager
def altered(module: nn.Module) -> Iterator[Callable[[float], None]]:
    """Lets the weights of a module be multiplied, and leaves them as they were."""
    weights = {x: x.clone() for x in module.parameters()}

    def factor(value: float) -> None:
        for x, plain in weights.items():
            x.copy_(value * plain)

    yield factor
    factor(1.0)


@every_model
def test_what_comes_before_a_reused_layer_still_matters(name: str) -> None:
    tiny = ZOO[name]
    model, x = build(tiny), noise(1, *tiny.shape)
    reuses_one_late_layer(model, lambda t: tiny.call(model, x, torch.full((1,), t)))


@pytest.mark.parametrize("name", [*TOYS, *ADDING_TOYS])
def test_what_comes_before_a_reused_layer_still_matters_in_toys(name: str) -> None:
    toy, x = toys.build(name), noise(1, toys.TOKENS, toys.WIDTH)
    y = torch.zeros(1, dtype=torch.long)
    reuses_one_late_layer(toy, lambda t: toy.denoise(x, torch.full((1,), t), y))


@every_model
def test_what_is_watched_is_what_was_found(name: str) -> None:
    tiny = ZOO[name]
    model = build(tiny)
    x, t = noise(1, *tiny.shape), torch.full((1,), 900.0)
    layers = sc.observe_layers(model, lambda i: tiny.call(model, x, t))
    found = {layer.path: layer.kind for layer in sc.find_layers(model)}
    assert {layer.path: layer.kind for layer in layers}.items() <= found.items()
    assert all(layer.macs for layer in layers)
