"""CLIP scores, CMMD and DINOv2 features by tiny random models."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothcache.errors import FileFormatError, InvalidArgumentError, MissingPackageError
from smoothcache.metrics import (
    ClipEncoder,
    DinoFeatures,
    MissingWeightsError,
    clip_score,
    cmmd,
    extract,
    fd_dinov2,
    image_statistics,
    pick_score,
)

transformers = pytest.importorskip("transformers", reason="CLIP and DINOv2 are models of it")


class Letters:
    """A tokenizer: a letter is a token, the end is the largest one."""

    def __call__(self, texts: list[str], **options: Any) -> Any:
        limit = options["max_length"]
        rows = [[1, *(2 + ord(x) % 90 for x in text[: limit - 2]), 98] for text in texts]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return transformers.BatchEncoding({"input_ids": padded, "attention_mask": mask})


@pytest.fixture(scope="module")
def model() -> Any:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    text = {"vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 98}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config=small | text,
            vision_config=small | {"image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
        return transformers.CLIPModel(config)


@pytest.fixture(scope="module")
def encoder(model: Any) -> ClipEncoder:
    return ClipEncoder(model, Letters(), name="tiny")


def pictures(count: int, height: int = 20, width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_scores_are_the_cosines_of_the_model(model: Any, encoder: ClipEncoder) -> None:
    images, prompts = (
        pictures(5, 16, 16),
        ["a cat", "two dogs", "red", "a longer text than 12", "x"],
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    tokens = Letters()(prompts, max_length=12)
    with torch.no_grad():
        output = model(pixel_values=(images / 255 - mean) / deviation, **tokens)
    cosines = (output.image_embeds * output.text_embeds).sum(dim=1)
    expected = 100 * cosines.clamp(min=0)
    result = clip_score(images, prompts, encoder, batch_size=2)
    assert result.value == pytest.approx(float(expected.mean()), abs=1e-4)
    assert result.spread == pytest.approx(float(expected.std()) / math.sqrt(5), abs=1e-4)
    assert result.weights == encoder.digest and "tiny" in result.protocol
    scored = pick_score(images, prompts, encoder, batch_size=2)
    assert scored.value == pytest.approx(output.logits_per_image.diag().mean().item(), abs=1e-3)


def test_images_are_cropped_in_the_middle(encoder: ClipEncoder) -> None:
    images = pictures(1, 24, 16)
    torch.testing.assert_close(encoder.images(images), encoder.images(images[:, :, 4:20]))
    assert not torch.allclose(encoder.images(images), encoder(images)["embedding"])


def test_cmmd_of_embeddings(encoder: ClipEncoder) -> None:
    ours = extract([pictures(20)], encoder).values["embedding"]
    darker = extract([pictures(20, seed=1) // 2], encoder).values["embedding"]
    result = cmmd(ours, darker, weights=encoder.digest)

    def mean(a: Tensor, b: Tensor) -> float:
        squares = (a.double()[:, None] - b.double()).square().sum(dim=2)
        return float((-squares / 200).exp().mean())

    expected = mean(ours, ours) + mean(darker, darker) - 2 * mean(ours, darker)
    assert result.value == pytest.approx(1000 * expected, rel=1e-6)
    assert cmmd(ours, ours).value == pytest.approx(0, abs=1e-9)
    with pytest.raises(InvalidArgumentError, match="length 1"):
        cmmd(2 * ours, darker)


def test_bad_input_is_refused(encoder: ClipEncoder, model: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="3 images and 2 prompts"):
        clip_score(pictures(3), ["a", "b"], encoder)
    with pytest.raises(InvalidArgumentError, match="no tokenizer"):
        ClipEncoder(model).texts(["a"])
    with pytest.raises(InvalidArgumentError, match="uint8"):
        encoder.images(torch.rand(1, 3, 16, 16))


def test_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingWeightsError, match=r"hf download none/such --local-dir"):
        ClipEncoder.load("none/such", local_files_only=True)
    with pytest.raises(MissingWeightsError, match=r"hf download none/such --local-dir"):
        DinoFeatures.load("none/such", local_files_only=True)
    with pytest.raises(FileFormatError, match="no usable weights of CLIP"):
        ClipEncoder.load(str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"\[evaluate\]"):
        ClipEncoder.load()


@pytest.fixture(scope="module")
def dino() -> DinoFeatures:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Dinov2Config(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=56, image_size=224
        )
        return DinoFeatures(transformers.Dinov2Model(config), name="tiny")


def test_dino_gives_the_class_token_after_the_norm(dino: DinoFeatures) -> None:
    images = pictures(2, 224, 224)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected = dino.model((images / 255 - mean) / deviation).pooler_output
    torch.testing.assert_close(dino(images)["class_token"], expected, rtol=1e-4, atol=1e-5)


def test_fd_dinov2_of_images(dino: DinoFeatures) -> None:
    ours, theirs = (
        image_statistics([pictures(24, seed=seed)], dino, ["class_token"], num_groups=4)
        for seed in (0, 1)
    )
    result = fd_dinov2(ours["class_token"], theirs["class_token"].gaussian(), weights=dino.digest)
    assert result.value > 0 and result.num_samples == result.num_references == 24
    assert fd_dinov2(ours["class_token"], ours["class_token"].gaussian()).value < result.value / 100
