"""The nodes for ComfyUI, in a stand-in of its model patcher, guider and samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import torch
from support.toys import CLASSES, TOKENS, WIDTH, Toy
from torch import Tensor, nn

import smoothcache as sc
from integrations.comfyui import nodes

STEPS = 6


class Executor:
    """Calls wrappers from the outermost one to the function."""

    def __init__(self, function: Callable[..., Any], owner: Any, wrappers: list[Any]) -> None:
        self.function, self.class_obj, self.wrappers = function, owner, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.function(*args, **kwargs)
        inner = Executor(self.function, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](inner, *args, **kwargs)


class Patcher:
    def __init__(self, model: Any) -> None:
        self.model, self.wrappers = model, {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        twin = Patcher(self.model)
        twin.wrappers = {kind: dict(known) for kind, known in self.wrappers.items()}
        return twin

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def all_wrappers(self, kind: str) -> list[Any]:
        return [one for known in self.wrappers.get(kind, {}).values() for one in known]


class Diffusion(Toy):
    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: Any = None
    ) -> Tensor:
        return super().forward(x, timesteps, context)


class Guider:
    """Classifier-free guidance in one batch, or in two calls."""

    def __init__(self, patcher: Patcher, *, batched: bool) -> None:
        self.model_patcher, self.model_options = patcher, patcher.model_options
        self.batched = batched
        self.uuids = [uuid4(), uuid4()]

    def sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, seed: int = 0
    ) -> Tensor:
        wrappers = self.model_patcher.all_wrappers("outer_sample")
        run = Executor(self.outer_sample, self, wrappers)
        return run(noise, latent_image, sampler, sigmas, None, None, False, seed)

    def outer_sample(
        self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *_: Any
    ) -> Tensor:
        self.sigmas = sigmas
        return sampler(self.predict, latent + noise * sigmas[0], sigmas)

    def predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        conds = [torch.full((len(x),), 1), torch.full((len(x),), 3)]
        wrappers = self.model_patcher.all_wrappers("calc_cond_batch")
        run = Executor(self.calculate, None, wrappers)
        plain, prompted = run(self.model_patcher.model, conds, x, sigma, self.model_options)
        return plain + 2 * (prompted - plain)

    def calculate(
        self, model: Any, conds: list[Tensor], x: Tensor, sigma: Tensor, options: Any
    ) -> list[Tensor]:
        def call(numbers: list[int]) -> list[Tensor]:
            told = {
                **options["transformer_options"],
                "cond_or_uncond": [1 - i for i in numbers],
                "uuids": [self.uuids[i] for i in numbers],
                "sigmas": sigma,
                "sample_sigmas": self.sigmas,
            }
            out = model.diffusion_model(
                torch.cat([x] * len(numbers)),
                model.model_sampling.timestep(torch.cat([sigma] * len(numbers))),
                context=torch.cat([conds[i] for i in numbers]),
                transformer_options=told,
            )
            return list(out.chunk(len(numbers)))

        return call([0, 1]) if self.batched else [*call([0]), *call([1])]


def euler(predict: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for now, then in pairwise(sigmas):
        x = x + (then - now) * predict(x, now.expand(len(x)))
    return x


def adams(predict: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """Two steps at once, and one evaluation in each."""
    before = None
    for now, then in pairwise(sigmas):
        d = predict(x, now.expand(len(x)))
        x = x + (then - now) * (d if before is None else 1.5 * d - 0.5 * before)
        before = d
    return x


def heun(predict: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for now, then in pairwise(sigmas):
        first = predict(x, now.expand(len(x)))
        second = predict(x + (then - now) * first, then.expand(len(x)))
        x = x + (then - now) * (first + second) / 2
    return x


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def patcher() -> Patcher:
    torch.manual_seed(0)
    sampling = SimpleNamespace(timestep=lambda sigma: 1000 * sigma)
    toy = Diffusion(depth=2).eval().requires_grad_(False)
    return Patcher(SimpleNamespace(diffusion_model=toy, model_sampling=sampling))


def sigmas(num_steps: int = STEPS) -> Tensor:
    return torch.linspace(1, 0, num_steps + 1)


def generate(patcher: Patcher, sampler: Any = euler, steps: int = STEPS, **options: Any) -> Tensor:
    batch = options.pop("batch", 1)
    noise = torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    guider = Guider(patcher, batched=options.pop("batched", True))
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas(steps))


def with_step_computed(schedule: sc.Schedule, step: int) -> sc.Schedule:
    rows = {
        path: sc.Row(tuple(due or i == step for i, due in enumerate(row.computed)))
        for path, row in schedule.rows.items()
    }
    return sc.Schedule(schedule.num_steps, rows, schedule.layers)


def by_hand(patcher: Patcher, schedule: sc.Schedule, sampler: Any, batched: bool) -> Tensor:
    """The same generation, with the layers' forwards replaced by kept outputs."""
    toy = patcher.model.diffusion_model
    kept: dict[Any, Tensor] = {}
    plain, uses = {}, {"calls": 0}
    calls_per_step = 1 if batched else 2

    def replacement(path: str, forward: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            step, branch = divmod(uses["calls"] - 1, calls_per_step)
            if schedule.rows[path].computed[step]:
                kept[path, branch] = forward(x)
            return kept[path, branch]

        return run

    count = toy.register_forward_pre_hook(lambda *_: uses.update(calls=uses["calls"] + 1))
    for path in schedule.rows:
        module = toy.get_submodule(path)
        plain[path], module.forward = module, replacement(path, module.forward)
    result = generate(patcher, sampler, batched=batched)
    count.remove()
    for module in plain.values():
        del module.forward
    return result


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("sampler", [euler, adams])
def test_a_schedule_is_applied(patcher: Patcher, sampler: Any, batched: bool) -> None:
    toy = patcher.model.diffusion_model
    plain = generate(patcher, sampler, batched=batched)
    schedule = sc.Schedule.uniform(toy, STEPS, 2)
    # In two calls step 1 is computed: the calls' latents are other tensors, as if begun again.
    told = schedule if batched else with_step_computed(schedule, 1)
    expected = by_hand(patcher, told, sampler, batched)
    (applied,) = nodes.ApplySchedule().apply(patcher, schedule)
    assert not torch.equal(expected, plain)
    for _ in range(2):
        assert torch.equal(generate(applied, sampler, batched=batched), expected)
    assert torch.equal(generate(patcher, sampler, batched=batched), plain)
    assert type(toy) is Diffusion
    everything = sc.Schedule.uniform(toy, STEPS, 1)
    (applied,) = nodes.ApplySchedule().apply(patcher, everything)
    assert torch.equal(generate(applied, sampler, batched=batched), plain)


def test_calibrate_plan_save_and_load(
    patcher: Patcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "FOLDER", tmp_path / "schedules")
    guider = Guider(patcher, batched=False)
    latent = {"samples": torch.zeros(1, TOKENS, WIDTH)}
    (calibration,) = nodes.Calibrate().calibrate(guider, euler, sigmas(), latent, 2, 2, 0)
    assert calibration.num_steps == STEPS
    assert guider.model_patcher is patcher and not patcher.wrappers
    schedule, text = nodes.Plan().plan(calibration, 9.0, "fast")
    assert schedule.reused and "Diffusion" in text
    (loaded,) = nodes.LoadSchedule().load("fast")
    assert loaded == schedule
    (applied,) = nodes.ApplySchedule().apply(patcher, loaded)
    assert generate(applied, batched=False).isfinite().all()
    for name in ("../fast", "a/b", "", ".hidden", "/etc/x"):
        with pytest.raises(sc.InvalidArgumentError, match="leave out the folder"):
            nodes.LoadSchedule().load(name)
    with pytest.raises(sc.InvalidArgumentError, match=r"no schedule 'slow'.*fast"):
        nodes.LoadSchedule().load("slow")


def test_what_does_not_fit_is_refused(patcher: Patcher) -> None:
    toy = patcher.model.diffusion_model
    (applied,) = nodes.ApplySchedule().apply(patcher, sc.Schedule.uniform(toy, STEPS, 2))
    with pytest.raises(sc.ScheduleMismatchError, match=r"makes 5 steps.* 6;"):
        generate(applied, steps=5)
    with pytest.raises(sc.InvalidArgumentError, match=r"one evaluation in each step.*heun"):
        generate(applied, heun)
    assert type(toy) is Diffusion
    with pytest.raises(sc.InvalidArgumentError, match="got NoneType"):
        nodes.ApplySchedule().apply(None, sc.Schedule.uniform(toy, STEPS, 2))


def test_a_model_without_layers_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_: Any) -> Tensor:
            return self.linear(x)

    sampling = SimpleNamespace(timestep=lambda sigma: sigma)
    guider = Guider(
        Patcher(SimpleNamespace(diffusion_model=Plain(), model_sampling=sampling)), batched=True
    )
    latent = {"samples": torch.zeros(1, TOKENS, WIDTH)}
    with pytest.raises(sc.LayersNotFoundError):
        nodes.Calibrate().calibrate(guider, euler, sigmas(), latent, 1, 1, 0)


def test_the_nodes_say_what_they_take() -> None:
    assert CLASSES > 3  # the classes that stand for prompts exist
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        assert name in nodes.NODE_DISPLAY_NAME_MAPPINGS
        assert callable(getattr(node, node.FUNCTION))
        assert node.INPUT_TYPES()["required"]
