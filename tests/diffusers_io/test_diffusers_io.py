"""Loading pipelines, and running them with what their call asks for."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pipeline import build_pipeline, save_pipeline

from smoothcache.diffusers_io.loading import load_pipeline
from smoothcache.diffusers_io.sampler import PipelineSampler
from smoothcache.errors import InvalidArgumentError, PipelineLoadError, SmoothCacheError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return build_pipeline()


class TextPipeline:
    """Takes a prompt, as most do, and answers with an image that tells what it was given."""

    components: dict[str, Any] = {}  # noqa: RUF012

    def __call__(
        self,
        prompt: str | None = None,
        num_inference_steps: int = 7,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        self.prompt, self.steps = prompt, num_inference_steps
        return ([torch.rand(3, 16, 16, generator=generator)],)


class ImageToImagePipeline(TextPipeline):
    def __call__(self, prompt: str, image: Any, num_inference_steps: int = 5) -> Any:  # type: ignore[override]
        raise AssertionError


def test_a_saved_pipeline_is_loaded(folder: Path) -> None:
    loaded = load_pipeline(folder)
    assert type(loaded).__name__ == "DiTPipeline"
    assert loaded.transformer.dtype == torch.float32
    assert load_pipeline(str(folder), dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["no-such-device", "meta:x"])
def test_an_unusable_device_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"'{device}' cannot be used"):
        load_pipeline(folder, device=device)


def test_what_is_no_pipeline_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    said = {
        tmp_path / "missing": "there is no folder",
        tmp_path / "empty": "is no pipeline: it has no model_index.json",
        tmp_path / "file": "is a file",
        folder / "transformer": "looks like a single model",
    }
    for path, message in said.items():
        with pytest.raises(PipelineLoadError, match=message) as caught:
            load_pipeline(path)
        assert isinstance(caught.value, SmoothCacheError)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda x: (x / "model_index.json").write_text("{"), "cannot be loaded"),
        (
            lambda x: (x / "model_index.json").write_text('{"_class_name": "No"}'),
            "cannot be loaded",
        ),
        (lambda x: shutil.rmtree(x / "vae"), "cannot be loaded"),
        (
            lambda x: (x / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"),
            "cannot be loaded",
        ),
    ],
)
def test_a_damaged_pipeline_is_refused_in_one_sentence(
    folder: Path, tmp_path: Path, damage: Any, said: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(PipelineLoadError, match=said) as caught:
        load_pipeline(copy)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def failing_with(monkeypatch: pytest.MonkeyPatch, *errors: BaseException) -> None:
    """Lets the hub fail with the last error, which led to the ones before it."""
    from diffusers import DiffusionPipeline

    def fail(*_: Any, **__: Any) -> None:
        for error, cause in itertools.pairwise(errors):
            error.__cause__ = cause
        raise errors[0]

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)


def test_the_hub_out_of_reach_or_without_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    class RepositoryNotFoundError(Exception): ...

    class GatedRepoError(RepositoryNotFoundError): ...

    class OfflineModeIsEnabled(ConnectionError): ...

    said: dict[str, tuple[BaseException, ...]] = {
        r"hub cannot be reached \(Connection refused\)": (
            OSError("Cannot load model"),
            ConnectionError("Connection refused"),
        ),
        "no repository of that name": (OSError("404"), RepositoryNotFoundError("404")),
        "accept its terms": (OSError("403"), GatedRepoError("403")),
        "HF_HUB_OFFLINE is set": (OSError("x"), OfflineModeIsEnabled("x")),
        "cannot be loaded from the hub: Strange": (ValueError("Strange.\nVery strange."),),
    }
    for message, errors in said.items():
        failing_with(monkeypatch, *errors)
        with pytest.raises(PipelineLoadError, match=message) as caught:
            load_pipeline("nobody/nothing")
        assert "\n" not in str(caught.value)


def test_a_sampler_repeats_itself_and_takes_the_inputs_in_turn(pipeline: Any) -> None:
    sampler = PipelineSampler(pipeline, class_labels=(1, 2), num_steps=2, seed=5)
    first = sampler(0)
    assert first.shape == (1, 3, 16, 16)
    assert 0 <= first.min() and first.max() <= 1
    assert torch.equal(first, sampler(0))
    assert not torch.equal(first, sampler(1))
    same = PipelineSampler(pipeline, class_labels=(9, 1), num_steps=2, seed=4)
    assert torch.equal(first, same(1))
    assert not torch.equal(first, sampler(0, 3))


def test_prompts_and_defaults_go_by_the_signature() -> None:
    pipeline = TextPipeline()
    sampler = PipelineSampler(pipeline, prompts=("a", "b"))
    assert sampler.steps == 7 and sampler.inputs == ("a", "b")
    assert sampler(3).shape == (1, 3, 16, 16)
    assert (pipeline.prompt, pipeline.steps) == ("b", 7)
    assert PipelineSampler.with_any_input(pipeline, num_steps=2).prompts
    assert PipelineSampler.with_any_input(build_pipeline(), num_steps=2).class_labels == (0,)


def test_missing_and_unwanted_inputs_are_named(pipeline: Any) -> None:
    said: dict[str, tuple[Any, dict[str, Any]]] = {
        "DiTPipeline needs at least one class label": (pipeline, {}),
        "takes no prompt; it needs a class label": (pipeline, {"prompts": ("x",)}),
        "TextPipeline needs at least one prompt": (TextPipeline(), {}),
        "takes no class label; it needs a prompt": (TextPipeline(), {"class_labels": (1,)}),
        "takes no guidance scale": (TextPipeline(), {"prompts": ("x",), "guidance_scale": 2.0}),
        "needs image; write a function": (ImageToImagePipeline(), {"prompts": ("x",)}),
        "no class 1001": (pipeline, {"class_labels": (1001,)}),
        "num_steps must be an integer": (pipeline, {"class_labels": (1,), "num_steps": 0}),
        "seed must be": (pipeline, {"class_labels": (1,), "seed": -1}),
    }
    for message, (given, arguments) in said.items():
        with pytest.raises(InvalidArgumentError, match=message):
            PipelineSampler(given, **arguments)


def test_classes_with_names_are_the_only_ones() -> None:
    pipeline = build_pipeline()
    pipeline.labels = {"circle": 0, "square": 1}
    PipelineSampler(pipeline, class_labels=(0, 1))
    with pytest.raises(
        InvalidArgumentError, match="no class 2; the labels of this model are 0 to 1"
    ):
        PipelineSampler(pipeline, class_labels=(2,))
