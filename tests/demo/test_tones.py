"""The audio demo's parts: its data, its classifier, its exported pipeline, the training scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pipeline import build_audio_pipeline
from torch import Tensor

import smoothcache as sc
from smoothcache.demo import audio, tones
from smoothcache.demo.classifier import load_as, save_classifier
from smoothcache.demo.tone_classifier import ToneClassifier
from smoothcache.diffusers_io.sampler import PipelineSampler
from smoothcache.diffusers_io.solvers import _third_order_step, third_order_sde
from smoothcache.errors import InvalidArgumentError, MissingPackageError, ScheduleMismatchError

pytest.importorskip("torchsde")


diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build_audio_pipeline()


# --- data ---------------------------------------------------------------------------------------
def test_a_seed_determines_the_data() -> None:
    sounds, attributes = tones.generate(12, seed=5)
    again, same_attributes = tones.generate(12, seed=5)
    other, _ = tones.generate(12, seed=6)
    assert torch.equal(sounds, again) and torch.equal(attributes, same_attributes)
    assert not torch.equal(sounds, other)


def test_sounds_have_the_promised_shape_range_and_length() -> None:
    sounds, attributes = tones.generate(tones.all_attributes(), seed=0)
    assert sounds.shape == (60, 1, tones.NUM_SAMPLES) and attributes.shape == (60, 3)
    assert sounds.abs().amax() <= 1 and (sounds.abs().amax(dim=(1, 2)) > 0.1).all()
    assert tones.SAMPLING_RATE >= 16_000 and tones.SECONDS >= 1
    assert sounds[..., -10:].abs().max() < 0.01, "notes end before the sound does"


def test_the_rhythm_is_the_number_of_notes() -> None:
    wanted = torch.tensor([[4, 1, rhythm] for rhythm in range(3)])  # drums fade at once
    sounds, _ = tones.generate(wanted, seed=1)
    loud = sounds[:, 0].unflatten(1, (-1, 256)).abs().amax(dim=2) > 0.1
    beginnings = (loud[:, 1:] & ~loud[:, :-1]).sum(dim=1) + loud[:, 0]
    assert beginnings.tolist() == [1, 2, 3]


def test_every_combination_has_a_caption_of_its_own_that_the_encoder_takes(pipe: Any) -> None:
    captions = [tones.caption(row) for row in tones.all_attributes()]
    assert len(set(captions)) == 60
    assert max(len(text.encode()) + 1 for text in captions) <= pipe.tokenizer.model_max_length


# --- classifier ---------------------------------------------------------------------------------
def test_classifier_survives_saving(tmp_path: Path) -> None:
    classifier = ToneClassifier(width=8, feature_dim=16).half().float().eval()
    save_classifier(classifier, tmp_path)
    sounds, _ = tones.generate(2, seed=0)
    for ours, theirs in zip(
        load_as(ToneClassifier, tmp_path)(sounds), classifier(sounds), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert classifier.features(sounds).shape == (2, 16)
    assert [x.shape[1] for x in classifier(sounds)] == list(tones.NUM_CLASSES)


@torch.no_grad()
def test_classifier_recognises_fresh_real_sounds() -> None:
    sounds, attributes = tones.generate(60, seed=2024)
    classifier = load_as(ToneClassifier, audio.FOLDER / "classifier")
    for logits, labels in zip(classifier(sounds), attributes.T, strict=True):
        assert (logits.argmax(1) == labels).float().mean() >= 0.95


# --- solver -------------------------------------------------------------------------------------
def test_the_third_order_is_exact_where_the_denoised_sample_is_linear_in_log_noise() -> None:
    sigmas = torch.tensor([4.0, 2.5, 1.7, 1.0], dtype=torch.float64)
    levels = -sigmas.log()
    start, slope, sample = 0.3, 0.7, torch.tensor(1.3, dtype=torch.float64)
    denoised = tuple(start + slope * level for level in levels[:3])
    got = _third_order_step(sigmas, denoised, sample, torch.zeros_like(sample))
    width = levels[3] - levels[2]
    times = torch.linspace(0, 1, 100_001, dtype=torch.float64) * width
    integrand = 2 * (2 * (times - width)).exp() * (start + slope * (levels[2] + times))
    expected = (-2 * width).exp() * sample + torch.trapezoid(integrand, times)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)


def test_the_noise_of_a_step_has_the_power_that_the_sde_says() -> None:
    sigmas = torch.tensor([4.0, 2.5, 1.7, 1.0])
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    kick = _third_order_step(sigmas, (zero, zero, zero), zero, one)
    assert kick.item() == pytest.approx((1 - (1 / 1.7) ** 2) ** 0.5)


def test_the_third_order_starts_afresh_with_every_generation(pipe: Any) -> None:
    scheduler = third_order_sde(pipe.scheduler)
    assert isinstance(scheduler, diffusers.CosineDPMSolverMultistepScheduler)
    assert scheduler.config.sigma_max == 500
    other = build_audio_pipeline()
    other.scheduler = scheduler
    wanted = tones.all_attributes()[:1]
    first, again = (audio.sample_tones(other, wanted, 3, 6) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, audio.sample_tones(pipe, wanted, 3, 6)), "the second order's"


def test_another_scheduler_has_no_third_order() -> None:
    with pytest.raises(InvalidArgumentError, match=r"CosineDPMSolver.*got DDIMScheduler"):
        third_order_sde(diffusers.DDIMScheduler())


# --- running it under a schedule ------------------------------------------------------------------
@pytest.fixture
def drawn(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Collects the noise that the solver takes."""
    noises: list[Tensor] = []
    base = type(pipe.scheduler)
    for name in ("dpm_solver_first_order_update", "multistep_dpm_solver_second_order_update"):
        original = getattr(base, name)

        def update(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Tensor:
            noises.append(kwargs["noise"].clone())
            return original(self, *args, **kwargs)

        monkeypatch.setattr(base, name, update)
    yield noises


def test_cached_and_uncached_runs_draw_the_same_noise(pipe: Any, drawn: list[Tensor]) -> None:
    wanted = tones.all_attributes()[[0, 59]]

    def run() -> tuple[Tensor, list[Tensor]]:
        drawn.clear()
        return audio.sample_tones(pipe, wanted, seed=7, num_steps=8), list(drawn)

    plain, noise = run()
    schedule = sc.Schedule.uniform(pipe, num_steps=8, interval=2)
    with sc.cached(pipe, schedule) as handle:
        cached, same = run()
    assert handle.summary().reused > 0
    assert len(noise) == len(same) == 8
    assert all(map(torch.equal, noise, same))
    assert not torch.equal(noise[0][0], noise[0][1]), "each sound has a seed of its own"
    assert not torch.equal(plain, cached), "the schedule had an effect"
    with sc.cached(pipe, sc.Schedule.uniform(pipe, num_steps=8, interval=1)):
        assert torch.equal(run()[0], plain), "what computes everything changes nothing"


def test_another_seed_draws_other_noise(pipe: Any, drawn: list[Tensor]) -> None:
    for seed in (1, 2):
        audio.sample_tones(pipe, tones.all_attributes()[:1], seed=seed, num_steps=3)
    assert not torch.equal(drawn[0], drawn[3])


def test_every_kind_of_layer_is_found_and_calibrated(pipe: Any) -> None:
    calibration = sc.calibrate(
        pipe,
        lambda i: audio.sample_tones(pipe, tones.all_attributes()[i : i + 1], i, 5),
        num_samples=2,
        max_gap=2,
        progress=False,
    )
    assert set(calibration.kinds) == {"self_attn", "cross_attn", "ffn"}
    assert len(calibration.layers) == 6
    assert 0 < sc.plan(calibration, alpha=10.0).compute < 1


def test_a_schedule_serves_sounds_of_another_length(pipe: Any) -> None:
    schedule = sc.Schedule.uniform(pipe, num_steps=4, interval=2)
    with sc.cached(pipe, schedule) as run:
        short = pipe(
            "a bell", num_inference_steps=4, audio_end_in_s=0.5,
            generator=torch.Generator().manual_seed(0),
        ).audios  # fmt: skip
        assert short.shape[-1] == 8000
        latents = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
        half = pipe("a bell", num_inference_steps=4, latents=latents).audios
        assert half.shape[-1] == 32 * 256
    assert run.summary().finished == 2 and run.summary().reused > 0
    assert not run.summary().recomputed


def test_a_solver_that_calls_twice_a_step_is_told_apart() -> None:
    pipe = build_audio_pipeline()
    pipe.scheduler = diffusers.HeunDiscreteScheduler()

    def sample(i: int = 0) -> Tensor:
        seed = torch.Generator().manual_seed(i)
        sounds: Tensor = pipe("a bell", num_inference_steps=5, generator=seed).audios
        return sounds

    calibration = sc.calibrate(pipe, sample, num_samples=1, max_gap=2, progress=False)
    assert len(pipe.scheduler.timesteps) == 9 and calibration.num_steps == 5
    plain = sample()
    with sc.cached(pipe, sc.Schedule.uniform(pipe, num_steps=5, interval=1)):
        assert torch.equal(sample(), plain)
    with sc.cached(pipe, sc.Schedule.uniform(pipe, num_steps=9, interval=2)):
        with pytest.raises(ScheduleMismatchError, match=r"announces 5 steps.*made for 9"):
            sample()


def test_a_text_that_the_encoder_would_cut_short_is_refused(pipe: Any) -> None:
    long = "a bell playing a high note, again and again and again and again"
    with pytest.raises(InvalidArgumentError, match=r"takes 48 tokens.*has 64.*Shorten it"):
        PipelineSampler(pipe, prompts=("a bell", long), num_steps=3)
    assert PipelineSampler(pipe, prompts=("a bell",), num_steps=3)(0).shape == (1, 1, 16_384)


def test_the_solver_names_the_extra_that_it_needs(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(MissingPackageError, match=r"torchsde.*pip install '\.\[audio\]'"):
        third_order_sde(pipe.scheduler)


# --- pipeline -----------------------------------------------------------------------------------
def test_folder_is_small_and_names_no_machine() -> None:
    files = [path for path in audio.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    for path in files:
        if path.suffix in {".json", ".md"}:
            assert "_name_or_path" not in path.read_text()


@torch.no_grad()
def test_samples_are_recognised() -> None:
    pipe = audio.load_tones()
    assert type(pipe).__name__ == "StableAudioPipeline"
    wanted = audio.batch_attributes(1)[::2]
    sounds = audio.sample_tones(pipe, wanted, seed=11, num_steps=20)
    logits = load_as(ToneClassifier, audio.FOLDER / "classifier")(sounds)
    for attribute in (0, 1):
        right = logits[attribute].argmax(1) == wanted[:, attribute]
        assert right.float().mean() >= 0.7


# --- training scripts ---------------------------------------------------------------------------
def test_training_runs_and_resumes(run_script: Callable[..., None], tmp_path: Path) -> None:
    vae, dit, exported = (tmp_path / name for name in ("vae", "dit", "pipeline"))
    run_script("audio.train_autoencoder", "--out", vae, "--steps", 1, "--pool", 40)
    options = [
        "--vae",
        vae / "final",
        "--out",
        dit,
        "--export",
        exported,
        "--reading",
        1,
        "--pool",
        40,
    ]
    for steps in (1, 2):
        run_script("audio.train_dit", *options, "--steps", steps)
        assert torch.load(dit / "checkpoint.pt", weights_only=True)["step"] == steps
    pipe = diffusers.StableAudioPipeline.from_pretrained(exported)
    assert pipe.vae.hop_length * pipe.transformer.config.sample_size == tones.NUM_SAMPLES


def test_classifier_training_runs(run_script: Callable[..., None], tmp_path: Path) -> None:
    run_script("audio.train_classifier", "--out", tmp_path, "--steps", 1, "--pool", 40)
    sounds, _ = tones.generate(2, seed=0)
    assert len(load_as(ToneClassifier, tmp_path / "final")(sounds)) == 3
