"""The image demo: its data, its classifier, its exported pipeline and the training scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smoothcache.demo.shapes as shapes
from smoothcache.demo.classifier import ShapeClassifier, load_classifier, save_classifier

FOLDER = Path(shapes.__file__).with_name("shapes-dit")
SMALL = ("--pool", 32)
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe():
    pipe = diffusers.DiTPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- data ---------------------------------------------------------------------------------------
def test_a_seed_determines_the_data():
    images, labels = shapes.generate(64, seed=5)
    again, same_labels = shapes.generate(64, seed=5)
    other, _ = shapes.generate(64, seed=6)
    assert torch.equal(images, again)
    assert torch.equal(labels, same_labels)
    assert not torch.equal(images, other)


def test_images_have_the_promised_shape_range_and_classes():
    images, labels = shapes.generate(200, seed=0)
    assert images.shape == (200, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    assert labels.unique().tolist() == list(range(10))
    assert len(set(shapes.CLASS_NAMES)) == 10


def test_asked_classes_are_drawn():
    wanted = torch.tensor([3, 3, 0, 9])
    images, labels = shapes.generate(wanted, seed=1)
    assert torch.equal(labels, wanted)
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("name", shapes.CLASS_NAMES)
def test_outlines_stay_near_the_unit_circle(name):
    angle = torch.linspace(0, 6.28, 50)
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
    distance = shapes.OUTLINES[name](torch.stack([1.2 * circle, 0.9 * circle]))
    assert (distance[0] > 0).all()
    assert distance.isfinite().all()


def test_polygons_have_exact_distances():
    points = torch.tensor([[[0.0, 0.0], [1.7, 0.0], [-0.7, 0.2], [0.2, 0.5], [1.0, 1.1]]])
    distance = shapes.OUTLINES["square"](points)
    expected = torch.tensor([[-0.7, 1.0, 0.0, -0.2, 0.5]])
    torch.testing.assert_close(distance, expected, atol=1e-6, rtol=0)


# --- classifier ---------------------------------------------------------------------------------
def test_classifier_survives_saving(tmp_path):
    classifier = ShapeClassifier(width=8, feature_dim=16).half().float().eval()
    save_classifier(classifier, tmp_path)
    images, _ = shapes.generate(4, seed=0)
    assert torch.equal(load_classifier(tmp_path)(images), classifier(images))
    assert classifier.features(images).shape == (4, 16)


@torch.no_grad()
def test_classifier_recognises_fresh_real_images():
    images, labels = shapes.generate(200, seed=2024)
    predicted = load_classifier(FOLDER / "classifier")(images).argmax(1)
    assert (predicted == labels).float().mean() >= 0.95


# --- pipeline -----------------------------------------------------------------------------------
def test_folder_is_small_and_names_no_machine():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    for path in files:
        if path.suffix in {".json", ".md"}:
            assert "_name_or_path" not in path.read_text()


@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pipeline_loads(dtype):
    pipe = diffusers.DiTPipeline.from_pretrained(FOLDER, torch_dtype=dtype)
    assert pipe.transformer.dtype == dtype
    assert pipe.get_label_ids(["star", "bar"]) == [3, 9]
    assert len(pipe.transformer.transformer_blocks) >= 8
    assert all(p.isfinite().all() for p in pipe.transformer.parameters())


@torch.no_grad()
def test_samples_are_recognised(pipe):
    labels = torch.arange(40) % 10
    output = pipe(
        labels.tolist(),
        guidance_scale=3.0,
        num_inference_steps=25,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    )
    predicted = load_classifier(FOLDER / "classifier")(2 * output.images - 1).argmax(1)
    assert (predicted == labels).float().mean() >= 0.85


# --- training scripts ---------------------------------------------------------------------------
def steps_logged(folder: Path) -> int:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["step"]


def test_training_runs_and_resumes(run_script, tmp_path):
    vae, dit, exported = (tmp_path / name for name in ("vae", "dit", "pipeline"))
    run_script("image.train_vae", "--out", vae, "--steps", 2, *SMALL)
    options = ["--vae", vae / "final", "--out", dit, "--export", exported]
    run_script("image.train_dit", *options, "--steps", 2, *SMALL)
    assert steps_logged(dit) == 2
    run_script("image.train_dit", *options, "--steps", 3, *SMALL)
    assert steps_logged(dit) == 3
    pipe = diffusers.DiTPipeline.from_pretrained(exported)
    assert pipe.get_label_ids(["circle"]) == [0]


def test_classifier_training_runs(run_script, tmp_path):
    run_script("image.train_classifier", "--out", tmp_path, "--steps", 2, *SMALL)
    images, _ = shapes.generate(2, seed=0)
    assert load_classifier(tmp_path / "final")(images).shape == (2, 10)
