"""A public call looks for the denoisers of its model once, and reads the noise scheduler live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from support.tiny_pipeline import build_pipeline

import smoothcache as sc
from smoothcache.model import target
from smoothcache.model.target import Target

STEPS = 6


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x)) * t / 900


def sampler(model: Toy) -> Callable[..., torch.Tensor]:
    @torch.no_grad()
    def sample(i: int, num_inference_steps: int = STEPS) -> torch.Tensor:
        x = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(i))
        for step in range(num_inference_steps):
            t = torch.tensor(900.0 * (1 - step / num_inference_steps))
            x = x - model(x, t) / num_inference_steps
        return x

    return sample


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the denoisers were looked for in."""
    found: list[Any] = []
    real = target.find_denoisers

    def noted(model: Any) -> Any:
        found.append(model)
        return real(model)

    monkeypatch.setattr(target, "find_denoisers", noted)
    return found


def test_public_calls_resolve_their_model_once(searches: list[Any]) -> None:
    torch.manual_seed(0)
    model = Toy().eval()
    sample = sampler(model)

    def once(call: Callable[[], Any]) -> Any:
        searches.clear()
        result = call()
        assert searches == [model]
        return result

    how: dict[str, Any] = {"granularity": "model", "progress": False}
    calibration = once(lambda: sc.calibrate(model, sample, 3, 1, trajectory=True, **how))
    once(lambda: sc.find_layers(model, granularity="model"))
    once(lambda: sc.observe_layers(model, sample, granularity="model"))
    plan = sc.plan_trajectory(calibration, speedup=2)
    once(lambda: sc.Schedule.uniform(model, STEPS, 2, granularity="model"))
    once(lambda: sc.fit(model, sample, plan, calibration, progress=False))
    once(
        lambda: sc.search_trajectory(
            model, sample, calibration, speedup=2, max_cost=2, progress=False
        )
    )
    once(lambda: sc.search(model, sample, calibration, speedup=2, max_cost=12, progress=False))
    handle = once(lambda: sc.enable(model, plan))
    sample(0)
    handle.disable()


def test_the_noise_scheduler_is_read_live() -> None:
    pipe = build_pipeline()
    resolved = Target.of(pipe)
    first = resolved.noise_scheduler
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert resolved.noise_scheduler is pipe.scheduler is not first
    assert resolved.solver == "DPMSolverMultistepScheduler"


def test_a_replaced_denoiser_is_noticed() -> None:
    pipe = build_pipeline()
    resolved = Target.of(pipe)
    assert resolved.replaced() == []
    pipe.transformer = build_pipeline().transformer
    assert resolved.replaced() == [""]
