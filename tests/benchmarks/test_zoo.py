"""Every transformer of diffusers, and layouts of other codebases, tiny and with random weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
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
def test_a_reused_step_skips_the_repeated_blocks(name: str) -> None:
    granularities = ("auto", "block", "model")
    for granularity, found in zip(granularities, measure(ZOO[name], *granularities), strict=True):
        assert found.skipped >= 0.95, granularity
        has_no_sound = name == "SanaWMLTX2RefinerTransformer3DModel"
        assert found.never_ran == 0 or has_no_sound, granularity


@every_model
def test_the_same_call_repeated_gives_the_same_output_under_any_schedule(name: str) -> None:
    tiny = ZOO[name]
    x, times = noise(2, *tiny.shape), [900.0, 700.0, 500.0, 300.0]
    model = Unchanging(tiny)
    plain = model(x, 1.0)
    ways: dict[Any, list[tuple[int, str]]] = {
        "auto": [(1, "hold"), (3, "hold"), (2, "taylor2")],
        "model": [(len(times), "hold"), (2, "taylor2")],
    }
    for granularity, settings in ways.items():
        layers = sc.find_layers(model, granularity=granularity)
        exact = not any(layer.kind.endswith("block") for layer in layers)
        for interval, predictor in settings:
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


def reuses_one_late_layer(
    model: nn.Module, layers: Sequence[sc.CacheLayer], call: Callable[[float], Tensor]
) -> None:
    """Reuses one layer, and sees that what lies before it still matters to the output."""
    layers = [layer for layer in layers if not layer.kind.startswith("refiner_")]
    late, early = layers[-1], model.get_submodule(layers[0].path)
    results, macs = [], []
    for reuse in (False, True):
        schedule = sc.Schedule(3, {late.path: sc.Row((True, not reuse, True))}, (late,))
        with sc.cached(model, schedule) as run, altered(early) as factor:
            for change in (1.0, 1.5):
                factor(1.0)
                call(900.0)
                factor(change)
                with MacCounter() as counter:
                    results.append(call(800.0))
                macs.append(counter.total)
                call(700.0)
        assert bool(run.summary().reused) == reuse
        assert run.summary().recomputed == {}
    full, altered_full, reused, altered_reused = results
    assert macs[0] - macs[2] == macs[1] - macs[3] == late.macs
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
def test_what_is_watched_was_found_and_what_comes_before_still_matters(name: str) -> None:
    tiny = ZOO[name]
    model, x = build(tiny), noise(1, *tiny.shape)

    def call(t: float) -> Tensor:
        return tiny.call(model, x, torch.full((1,), t))

    layers = sc.observe_layers(model, lambda i: call(900.0))
    found = {layer.path: layer.kind for layer in sc.find_layers(model)}
    assert {layer.path: layer.kind for layer in layers}.items() <= found.items()
    assert all(layer.macs for layer in layers)
    reuses_one_late_layer(model, layers, call)


@pytest.mark.parametrize("name", [*TOYS, *ADDING_TOYS])
def test_what_comes_before_a_reused_layer_still_matters_in_toys(name: str) -> None:
    toy, x = toys.build(name), noise(1, toys.TOKENS, toys.WIDTH)
    y = torch.zeros(1, dtype=torch.long)

    def call(t: float) -> Tensor:
        return toy.denoise(x, torch.full((1,), t), y)

    reuses_one_late_layer(toy, sc.observe_layers(toy, lambda i: call(900.0)), call)
