"""Plans and weights that aim at the converged trajectory instead of the sampler's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smoothcache as sc
from smoothcache.planners.segments import Segments

STEPS, FINE = 16, 320


class Field(torch.nn.Module):
    """A velocity that bends along the way, the more the larger the latents are."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (1 + 2 * t) * torch.tanh(x) + torch.cos(4 * t) * x


def sampler(model: Field) -> Callable[..., torch.Tensor]:
    """Euler's method from time 1 to 0."""

    @torch.no_grad()
    def sample(i: int, num_inference_steps: int = STEPS) -> torch.Tensor:
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        for step in range(num_inference_steps):
            t = 1 - step / num_inference_steps
            x = x - model(x, torch.tensor(t)) / num_inference_steps
        return x

    return sample


def calibrated(model: Field, **how: Any) -> sc.Calibration:
    given = {"trajectory": True, "converged_steps": FINE, **how}
    return sc.calibrate(model, sampler(model), 5, 1, granularity="model", progress=False, **given)


@pytest.fixture(scope="module")
def calibration() -> sc.Calibration:
    return calibrated(Field())


def error(schedule: sc.Schedule, reference_steps: int) -> float:
    """Distance of unseen samples from runs of so many steps, relative L2."""
    model = Field()
    sample, total = sampler(model), 0.0
    for i in range(10, 14):
        reference = sample(i, reference_steps)
        with sc.cached(model, schedule):
            total += float((sample(i) - reference).norm() / reference.norm()) / 4
    return total


def test_offsets_are_those_of_the_converged_states(calibration: sc.Calibration) -> None:
    trajectories = calibration.trajectories
    assert trajectories is not None and len(trajectories.offsets) == 5
    assert calibration.provenance["converged_steps"] == str(FINE)
    states: list[torch.Tensor] = []

    class Watched(Field):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            states.append(x)
            return super().forward(x, t)

    sampler(Watched())(2, FINE)
    for step in range(STEPS):
        wanted = states[step * FINE // STEPS]
        got = trajectories.latents[2][step].float() + trajectories.offsets[2][step].float()
        torch.testing.assert_close(got, wanted, atol=5e-3, rtol=5e-3)
    end = sampler(Field())(2, FINE) - sampler(Field())(2)
    torch.testing.assert_close(trajectories.offsets[2][STEPS].float(), end, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("computed", [8, 5])
def test_a_converged_target_ends_nearer_to_the_converged_sample(
    calibration: sc.Calibration, computed: int
) -> None:
    model, ends, planned = Field(), {}, {}
    for target in ("uncached", "converged"):
        plan = sc.plan_trajectory(calibration, steps_computed=computed, target=target)
        fitted = sc.fit(model, sampler(model), plan, calibration, target=target, progress=False)
        assert plan.provenance["target"] == fitted.provenance["target"] == target
        ends[target], planned[target] = error(fitted, FINE), error(plan, FINE)
    assert ends["converged"] < 0.7 * ends["uncached"]
    assert planned["converged"] < planned["uncached"]


def test_a_converged_target_beats_the_uncached_run(calibration: sc.Calibration) -> None:
    """Fewer calls of the model end nearer to the converged sample than all of them."""
    model = Field()
    everything = sc.Schedule.uniform(model, STEPS, 1, granularity="model")
    plan = sc.plan_trajectory(calibration, steps_computed=9, target="converged")
    fitted = sc.fit(model, sampler(model), plan, calibration, target="converged", progress=False)
    assert error(fitted, FINE) < 0.7 * error(everything, FINE)


def test_the_reported_error_is_to_the_converged_states(calibration: sc.Calibration) -> None:
    model = Field()
    plan = sc.plan_trajectory(calibration, steps_computed=8, target="converged")
    fitted = sc.fit(model, sampler(model), plan, calibration, target="converged", progress=False)
    held_out = fitted.quality["held_out_state_error"]
    assert 0.4 * error(fitted, FINE) < held_out < 2.5 * error(fitted, FINE)


def test_a_file_keeps_the_offsets(calibration: sc.Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "c.safetensors")
    loaded = sc.Calibration.load(tmp_path / "c.safetensors")
    plans = [
        sc.plan_trajectory(x, steps_computed=6, target="converged") for x in (calibration, loaded)
    ]
    assert plans[0] == plans[1]


def test_planning_for_no_offset_is_planning_for_the_uncached_run(
    calibration: sc.Calibration,
) -> None:
    from dataclasses import replace

    trajectories = calibration.trajectories
    assert trajectories is not None
    still = tuple(torch.zeros_like(x) for x in trajectories.offsets)
    segments = [
        Segments.of(replace(trajectories, offsets=still), 3.0, target)
        for target in ("uncached", "converged")
    ]
    assert segments[0].squares == pytest.approx(segments[1].squares)


def test_bad_input(calibration: sc.Calibration) -> None:
    model = Field()
    plain = calibrated(model, converged_steps=None)
    with pytest.raises(sc.InvalidArgumentError, match="no converged trajectories"):
        sc.plan_trajectory(plain, speedup=2, target="converged")
    plan = sc.plan_trajectory(plain, speedup=2)
    with pytest.raises(sc.InvalidArgumentError, match="no converged trajectories"):
        sc.fit(model, sampler(model), plan, plain, target="converged", progress=False)
    for call in (
        lambda: sc.plan_trajectory(calibration, speedup=2, target="best"),  # type: ignore[arg-type]
        lambda: sc.fit(model, sampler(model), plan, calibration, target="best"),  # type: ignore[arg-type]
    ):
        with pytest.raises(sc.InvalidArgumentError, match="'uncached' or 'converged'"):
            call()
    with pytest.raises(sc.InvalidArgumentError, match="must exceed the 16 steps"):
        calibrated(model, converged_steps=STEPS)
    with pytest.raises(sc.InvalidArgumentError, match="needs trajectory=True"):
        calibrated(model, trajectory="gram")
    sample = sampler(model)
    with pytest.raises(sc.InvalidArgumentError, match="keyword num_inference_steps"):
        sc.calibrate(model, lambda i: sample(i), trajectory=True, converged_steps=99)
    with pytest.raises(sc.CalibrationError, match="starts from other latents"):
        sc.calibrate(
            model,
            lambda i, num_inference_steps=STEPS: sample(
                i + num_inference_steps, num_inference_steps
            ),
            1,
            1,
            granularity="model",
            trajectory=True,
            converged_steps=FINE,
            progress=False,
        )


def test_a_sampler_that_ignores_the_number_of_steps_is_refused() -> None:
    model = Field()
    sample = sampler(model)
    how: dict[str, Any] = {"granularity": "model", "trajectory": True, "converged_steps": FINE}
    with pytest.raises(sc.CalibrationError, match="must pass the number on"):
        sc.calibrate(model, lambda i, num_inference_steps=0: sample(i), 1, 1, **how)


def test_a_sampler_whose_noise_follows_no_path_is_refused() -> None:
    """Its converged sample is another sample, to which no weights lead."""
    model = Field()

    @torch.no_grad()
    def sample(i: int, num_inference_steps: int = STEPS) -> torch.Tensor:
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(2, 4, 8, 8, generator=generator)
        for step in range(num_inference_steps):
            t = 1 - step / num_inference_steps
            x = x - model(x, torch.tensor(t)) / num_inference_steps
            x = x + torch.randn(x.shape, generator=generator) / num_inference_steps**0.5
        return x

    with pytest.raises(sc.CalibrationError, match="as another sample would"):
        sc.calibrate(
            model,
            sample,
            1,
            1,
            granularity="model",
            trajectory=True,
            converged_steps=FINE,
            progress=False,
        )
