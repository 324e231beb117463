"""The video demo's data, classifier, own pipeline class, exported weights and training scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pipeline import build_clip_pipeline
from torch import Tensor

import smoothcache as sc
from smoothcache.demo import clips
from smoothcache.demo.classifier import load_as, save_classifier
from smoothcache.demo.clip_classifier import ClipClassifier
from smoothcache.demo.clips import ATTRIBUTES, all_labels, caption, generate, spread_labels
from smoothcache.diffusers_io.loading import load_pipeline
from smoothcache.diffusers_io.sampler import PipelineSampler
from smoothcache.metrics.distribution import attribute_accuracy

FOLDER = Path(clips.__file__).with_name("clips-stdit")
PROMPT = "a red circle moving left slowly"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build_clip_pipeline()


def run(pipe: Any, prompt: str | list[str] = PROMPT, seed: int = 0, **settings: Any) -> Tensor:
    settings = {"num_inference_steps": 6, "output_type": "pt", **settings}
    generator = torch.Generator().manual_seed(seed)
    clip: Tensor = pipe(prompt, generator=generator, **settings).frames
    return clip


# --- data ---------------------------------------------------------------------------------------
def test_a_seed_determines_the_data() -> None:
    first, labels = generate(8, seed=5)
    again, same_labels = generate(8, seed=5)
    assert torch.equal(first, again) and torch.equal(labels, same_labels)
    assert not torch.equal(first, generate(8, seed=6)[0])


def test_clips_have_the_promised_shape_and_range() -> None:
    made, labels = generate(30, seed=0, frames=5)
    assert made.shape == (30, 5, 3, 32, 32) and made.dtype == torch.float32
    assert made.min() >= -1 and made.max() <= 1
    assert labels.shape == (30, 4)


def test_asked_attributes_are_drawn_and_told() -> None:
    wanted = torch.tensor([[0, 1, 0, 0], [5, 3, 3, 1]])
    assert torch.equal(generate(wanted, seed=0)[1], wanted)
    assert caption(wanted[0]) == "a red square moving left slowly"
    assert caption(wanted[1]) == "a white cross moving down quickly"


def test_there_are_captions_for_all_attributes() -> None:
    texts = {caption(row) for row in all_labels()}
    assert len(texts) == 6 * 4 * 4 * 2
    assert {caption(row) for row in spread_labels(192)} == texts


@pytest.mark.parametrize("count", [12, 24, 48])
def test_spread_labels_are_balanced(count: int) -> None:
    for column, values in zip(spread_labels(count).unbind(1), ATTRIBUTES.values(), strict=True):
        assert torch.bincount(column, minlength=len(values)).unique().numel() == 1


def centres(made: Tensor) -> Tensor:
    """Where the shape is in each frame of clips [n, frames, 3, h, w]: [n, frames, (x, y)]."""
    brightness = (made.amax(2) > 0).float()
    axis = torch.arange(made.shape[-1], dtype=torch.float32)
    total = brightness.sum((2, 3))
    return torch.stack(
        [(brightness.sum(2) * axis).sum(2) / total, (brightness.sum(3) * axis).sum(2) / total], -1
    )


def test_shapes_move_as_the_caption_says() -> None:
    made, labels = generate(all_labels()[::5], seed=0)
    motion = (centres(made).diff(dim=1)).mean(1)
    for (x, y), row in zip(motion.tolist(), labels.tolist(), strict=True):
        along = {"left": -x, "right": x, "up": -y, "down": y}[ATTRIBUTES["direction"][row[2]]]
        assert along == pytest.approx(float(clips.SPEEDS[row[3]]), rel=0.15)
        assert abs(x) + abs(y) < 1.2 * along


# --- classifier ---------------------------------------------------------------------------------
def test_classifier_survives_saving_and_takes_any_length(tmp_path: Path) -> None:
    classifier = ClipClassifier(width=8, feature_dim=16).half().float().eval()
    save_classifier(classifier, tmp_path)
    again = load_as(ClipClassifier, tmp_path)
    for frames in (4, 8):
        made, _ = generate(2, seed=0, frames=frames)
        for name, logits in again(made).items():
            assert logits.shape == (2, len(ATTRIBUTES[name]))
            assert torch.equal(logits, classifier(made)[name])
    assert classifier.features(made).shape == (2, 16)


# --- pipeline -----------------------------------------------------------------------------------
def test_a_folder_loads_as_what_it_was(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    assert torch.equal(run(again), run(pipe))


def test_samples_have_the_form_that_was_asked_for(pipe: Any) -> None:
    made = run(pipe, [PROMPT] * 2)
    assert made.shape == (2, 8, 3, 32, 32)
    assert 0 <= made.min() and made.max() <= 1
    assert run(pipe, num_frames=5).shape == (1, 5, 3, 32, 32)
    assert run(pipe, output_type="latent").shape == (1, 4, 8, 8, 8)
    pictures = pipe(PROMPT, num_inference_steps=1).frames
    assert len(pictures[0]) == 8 and pictures[0][0].size == (32, 32)


def test_text_and_guidance_matter_and_padding_does_not(pipe: Any) -> None:
    other = "a blue triangle moving right quickly"
    assert not torch.equal(run(pipe), run(pipe, other))
    assert not torch.equal(run(pipe), run(pipe, guidance_scale=1.0))
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    settings: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    together = pipe([PROMPT, other], generator=noise, **settings).frames
    alone = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **settings).frames
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=0)


def test_long_text_is_refused_before_any_work(pipe: Any) -> None:
    with pytest.raises(sc.InvalidArgumentError, match=r"is 60 bytes long.* takes 47"):
        run(pipe, "é" * 30)
    with pytest.raises(sc.InvalidArgumentError, match="no prompt"):
        run(pipe, [])


def test_kinds_are_told_apart_in_space_and_time(pipe: Any) -> None:
    layers = sc.find_layers(pipe)
    assert len(layers) == 2 * 2 * 3
    assert [layer.kind for layer in layers[:3]] == [
        "spatial_self_attn",
        "spatial_cross_attn",
        "spatial_ffn",
    ]
    assert layers[-1].kind == "temporal_ffn"


def test_computing_everything_changes_nothing(pipe: Any) -> None:
    plain = run(pipe)
    with sc.cached(pipe, sc.Schedule.uniform(pipe, num_steps=6, interval=1)):
        assert torch.equal(run(pipe), plain)
    with sc.cached(pipe, sc.Schedule.uniform(pipe, num_steps=6, interval=2)) as half:
        assert not torch.equal(run(pipe), plain)
    assert half.summary().reused == 3 * len(sc.find_layers(pipe))
    assert torch.equal(run(pipe), plain)


@pytest.fixture(scope="module")
def calibration(pipe: Any) -> sc.Calibration:
    return sc.calibrate(pipe, lambda i: run(pipe, seed=i), 2, 2, progress=False)


def test_a_schedule_runs_on_clips_of_another_length(pipe: Any, calibration: sc.Calibration) -> None:
    """Curves are a number for each step; the file says on what they were measured."""
    schedule = sc.plan(calibration, alpha=0.3)
    assert schedule.provenance["calibration input"] == "2 x 4 x 8 x 8 x 8"
    with sc.cached(pipe, schedule) as cached:
        assert run(pipe, num_frames=12).shape[1] == 12
        assert run(pipe, num_frames=4).shape[1] == 4
    assert not cached.summary().recomputed


def test_prompts_of_the_command_line_reach_the_pipeline(pipe: Any) -> None:
    sampler = PipelineSampler(pipe, prompts=(PROMPT,), num_steps=2)
    assert sampler(0).shape == (1, 8, 3, 32, 32)


def test_a_solver_of_more_calls_than_steps_is_followed(pipe: Any) -> None:
    """Heun's method calls twice in every step but the last, at two timesteps."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    euler = pipe.scheduler
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=2.0)
    try:
        calibration = sc.calibrate(pipe, lambda i: run(pipe, seed=i), 1, 1, progress=False)
        plain = run(pipe)
        with sc.cached(pipe, sc.plan(calibration, alpha=0.0)):
            assert torch.equal(run(pipe), plain)
        with sc.cached(pipe, sc.plan(calibration, alpha=10.0)) as cached:
            assert not torch.equal(run(pipe), plain)
        assert cached.summary().reused > 0
        with pytest.raises(sc.ScheduleMismatchError):
            with sc.cached(pipe, sc.plan(calibration, alpha=10.0)):
                pipe.scheduler = euler
                run(pipe, num_inference_steps=4)
    finally:
        pipe.scheduler = euler


# --- trained weights ----------------------------------------------------------------------------
def test_the_folder_is_small_and_names_no_machine() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    for path in files:
        if path.suffix in {".json", ".md"}:
            assert "_name_or_path" not in path.read_text(encoding="utf-8")


@torch.no_grad()
def test_every_attribute_is_recognised_in_real_clips_and_in_samples() -> None:
    trained = load_pipeline(FOLDER)
    trained.set_progress_bar_config(disable=True)
    assert {p.dtype for p in trained.text_encoder.parameters()} == {torch.float32}
    labels = spread_labels(24)
    prompts = [caption(row) for row in labels]
    samples = run(trained, prompts, num_inference_steps=15)
    classifier = load_as(ClipClassifier, FOLDER / "classifier")
    wanted = dict(zip(ATTRIBUTES, labels.unbind(1), strict=True))
    real = attribute_accuracy(classifier(generate(labels, seed=77)[0]), wanted)
    drawn = attribute_accuracy(classifier(2 * samples - 1), wanted)
    assert min(real.values()) >= 0.95 and min(drawn.values()) >= 0.8, (real, drawn)


# --- training scripts ---------------------------------------------------------------------------
def test_training_runs_and_resumes(run_script: Callable[..., None], tmp_path: Path) -> None:
    vae, text, dit, exported = (tmp_path / name for name in ("vae", "text", "dit", "pipeline"))
    run_script("video.train_vae", "--out", vae, "--steps", 1, "--pool", 4)
    run_script("video.train_text_encoder", "--out", text, "--steps", 1)
    options = ["--vae", vae / "final", "--text", text / "final", "--out", dit, "--pool", 4]
    small = ["--width", 24, "--depth", 1, "--export", exported]
    for steps in (1, 2):
        run_script("video.train_dit", *options, *small, "--steps", steps)
        assert torch.load(dit / "checkpoint.pt", weights_only=True)["step"] == steps
    pipe = load_pipeline(exported)
    pipe.set_progress_bar_config(disable=True)
    assert run(pipe).shape == (1, 8, 3, 32, 32)


def test_classifier_training_runs(run_script: Callable[..., None], tmp_path: Path) -> None:
    run_script("video.train_classifier", "--out", tmp_path, "--steps", 1, "--pool", 4)
    made, _ = generate(2, seed=0)
    assert load_as(ClipClassifier, tmp_path / "final")(made)["speed"].shape == (2, 2)
